"""Tests of the CSI driver. Set before anything imports grpc: no fork handlers, no chatter on stderr."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
