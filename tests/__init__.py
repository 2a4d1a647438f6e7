"""The tests."""

import quantplane_server  # noqa: F401 - before gRPC, which reads what it sets
