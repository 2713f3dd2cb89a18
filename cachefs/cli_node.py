"""`keeper` and `serve`: the two processes of node mode beside the CSI driver."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cachefs.cli_context import Command
from cachefs.config import NodeConfig, encode_node
from cachefs.kernel.spawn import python_command
from cachefs.settings import check_runtime_dir

RUN_NAME, CACHE_NAME, SOCKET_NAME = "run", "cache", "keeper.sock"  # as in node_keeper.py


@click.command(short_help="Hold a node's FUSE root (in a Kubernetes pod, as root).")
@click.option("--node-dir", metavar="DIR", required=True, help="Holds root (the mount), run and cache (the server's).")
@click.option("--server-uid", metavar="N", type=int, default=65534, show_default=True, help="Whom the server runs as.")
@click.option("--state-dir", metavar="DIR", help="Where the server's files must lie (default: NODE_DIR/cache).")
@click.option(
    "--give-up", metavar="SECONDS", type=float, help="Abort the mount without a server for so long (3600; 0: never)."
)
@click.option("--kernel-disable", metavar="FEATURES", help="Kernel features not to use, with commas.")
@click.option("--unmount", is_flag=True, help="Unmount what an earlier keeper mounted, and end.")
def keeper(unmount: bool, **flags: Any) -> None:
    """Hold the FUSE root of a node, for a server that runs without any right. SIGTERM ends the keeper, not the mount:
    the next one takes it over."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    command = python_command(sys.executable, "-m", "cachefs.node_keeper", *given, *["--unmount"] * unmount)
    # exec, not import: the keeper stays small.
    os.execv(command[0], command)


def serve(flags: Mapping[str, Any]) -> None:
    """Become the supervisor of a node's server. Raises UsageError."""
    config = node_config(flags)
    memory_fd = os.memfd_create("cachefs-config", os.MFD_CLOEXEC)
    os.write(memory_fd, encode_node(config))
    os.set_inheritable(memory_fd, True)
    command = python_command(sys.executable, "-m", "cachefs.supervisor", str(memory_fd))
    os.execv(command[0], command)


def node_config(flags: Mapping[str, Any]) -> NodeConfig:
    """From click's parameters. Raises UsageError."""
    from cachefs import node_policy

    chosen = dict(flags)
    node_dir = Path(os.path.abspath(chosen.pop("node_dir")))
    endpoints = tuple(node_policy.normal_endpoint(item) for item in chosen.pop("allow_endpoint"))
    node_credentials = bool(chosen.pop("allow_node_credentials"))
    sts_endpoint = chosen.pop("sts_endpoint")
    if chosen["state_dir"] is None and "CACHEFS_STATE_DIR" not in os.environ:
        chosen["state_dir"] = str(node_dir / CACHE_NAME)
    run = check_runtime_dir(node_dir / RUN_NAME, what_to_do="give a shorter --node-dir")
    command = Command.of({**chosen, "as_json": False, "runtime_dir": str(run), "allow_other": True})
    return NodeConfig(
        server=command.server_config(),
        keeper_socket=run / SOCKET_NAME,
        allow_endpoints=endpoints,
        allow_node_credentials=node_credentials,
        sts_endpoint=None if sts_endpoint is None else node_policy.normal_endpoint(sts_endpoint),
    )
