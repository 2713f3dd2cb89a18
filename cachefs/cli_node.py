"""`keeper` and `serve`: the two processes of node mode beside the CSI driver."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cachefs.cli_context import Command
from cachefs.config import NodeConfig, encode_node
from cachefs.errors import UsageError
from cachefs.kernel.process import python_command
from cachefs.settings import SOCKET_PATH_BYTES_MAX

RUN_NAME, CACHE_NAME, SOCKET_NAME = "run", "cache", "keeper.sock"  # as in node_keeper.py


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
    short_help="Hold a node's FUSE root (in a Kubernetes pod).",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def keeper(arguments: tuple[str, ...]) -> None:
    """Run the keeper of a node in this process's place. `cachefs keeper --help` lists its flags."""
    command = python_command(sys.executable, "-m", "cachefs.node_keeper", *arguments)
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
    run = node_dir / RUN_NAME
    if len(os.fsencode(run / "control.sock")) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"the socket path {run}/control.sock is longer than 107 bytes: give a shorter --node-dir")
    command = Command.of({**chosen, "runtime_dir": str(run), "allow_other": True})
    return NodeConfig(
        server=command.server_config(),
        keeper_socket=run / SOCKET_NAME,
        allow_endpoints=endpoints,
        allow_node_credentials=node_credentials,
        sts_endpoint=None if sts_endpoint is None else node_policy.normal_endpoint(sts_endpoint),
    )
