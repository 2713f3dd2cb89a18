"""`cachefs csi`: runs `python -m csi`, which has the flags. Here only, because cachefs never imports csi."""

import os
import sys

import click

from cachefs.errors import UsageError


@click.command(
    name="csi",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
    short_help="Run the CSI driver (in a Kubernetes pod).",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def csi(arguments: tuple[str, ...]) -> None:
    """Run the CSI driver in this process's place. `cachefs csi --help` lists its flags."""
    from importlib.util import find_spec

    if find_spec("csi") is None or find_spec("grpc") is None or find_spec("google.protobuf") is None:
        raise UsageError("the CSI driver needs grpcio and protobuf: install cachefs-fuse[csi]")
    # exec, not import: the driver is a small process of its own, without what the command line has loaded.
    os.execv(sys.executable, [sys.executable, "-m", "csi", *arguments])
