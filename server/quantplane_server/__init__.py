"""The quantplane server."""

import os

# A process is only forked to become another program, which has no use for what gRPC
# does about forks: its threads get in the way of that, and the new process fails.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
