"""`cachefs csi`: runs `python -m csi`, which has the flags. Here only, because cachefs never imports csi."""

import os
import subprocess
import sys
from importlib.util import find_spec

import click

from cachefs.errors import UsageError


@click.command(
    name="csi",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
    short_help="Run the CSI driver (in a Kubernetes pod).",
)
@click.option("--state-dir", metavar="DIR", help="Where the driver keeps its records.")
@click.option("--json", "as_json", is_flag=True, help="Log JSON lines.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def csi(arguments: tuple[str, ...], state_dir: str | None, as_json: bool) -> None:
    """Run the CSI driver in this process's place. `cachefs csi --help` lists its flags."""
    command = [sys.executable, "-m", "csi", *arguments]
    if {"-h", "--help"} & set(arguments):
        click.echo(subprocess.run(command, capture_output=True, text=True, check=False).stdout, nl=False)
        return
    # One by one: find_spec of a dotted name raises when its first part is not there.
    if not all(find_spec(name) for name in ("csi", "grpc", "google", "google.protobuf")):
        raise UsageError("the CSI driver needs grpcio and protobuf: install cachefs-fuse[csi]")
    command += [f"--state-dir={state_dir}"] if state_dir is not None else []
    command += ["--log-format=json"] if as_json else []
    # exec, not import: the driver is a small process of its own, without what the command line has loaded.
    os.execv(sys.executable, command)
