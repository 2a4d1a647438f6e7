"""The messages and stubs of quantplane.v1. Generated; do not edit."""

from quantplane.v1.admin_pb2 import *  # noqa: F403
from quantplane.v1.admin_pb2_grpc import *  # noqa: F403
from quantplane.v1.annotations_pb2 import *  # noqa: F403
from quantplane.v1.audit_pb2 import *  # noqa: F403
from quantplane.v1.audit_pb2_grpc import *  # noqa: F403
from quantplane.v1.broker_pb2 import *  # noqa: F403
from quantplane.v1.broker_pb2_grpc import *  # noqa: F403
from quantplane.v1.configurations_pb2 import *  # noqa: F403
from quantplane.v1.configurations_pb2_grpc import *  # noqa: F403
from quantplane.v1.errors_pb2 import *  # noqa: F403
from quantplane.v1.market_data_pb2 import *  # noqa: F403
from quantplane.v1.market_data_pb2_grpc import *  # noqa: F403
from quantplane.v1.models_pb2 import *  # noqa: F403
from quantplane.v1.models_pb2_grpc import *  # noqa: F403
from quantplane.v1.options_pb2 import *  # noqa: F403
from quantplane.v1.options_pb2_grpc import *  # noqa: F403
from quantplane.v1.orders_pb2 import *  # noqa: F403
from quantplane.v1.orders_pb2_grpc import *  # noqa: F403
from quantplane.v1.portfolio_pb2 import *  # noqa: F403
from quantplane.v1.portfolio_pb2_grpc import *  # noqa: F403
from quantplane.v1.signals_pb2 import *  # noqa: F403
from quantplane.v1.signals_pb2_grpc import *  # noqa: F403
from quantplane.v1.strategies_pb2 import *  # noqa: F403
from quantplane.v1.strategies_pb2_grpc import *  # noqa: F403
from quantplane.v1.stream_pb2 import *  # noqa: F403
