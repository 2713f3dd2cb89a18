"""A disk that others have filled: reads go on, names are found, and a killed server comes back."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.config import MIB
from tests.mount.cli_support import Cli, cli
from tests.mount.harness import needs_fuse
from tests.support.lying import LyingServer

__all__ = ["cli"]
pytestmark = [needs_fuse, pytest.mark.skipif(os.getuid() != 0, reason="mounts a tmpfs")]

DATA = os.urandom(9 * MIB + 17)


@pytest.fixture
def small(cli: Cli) -> Iterator[Path]:
    """The state directory's file system: 48 MiB of memory."""
    cli.state_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "cachefs-test", cli.state_dir], check=True)
    yield cli.state_dir
    cli.run("umount", "--all", "--lazy", code=None)
    subprocess.run(["umount", "--lazy", cli.state_dir], check=True)


def fill(directory: Path) -> None:
    with (directory / "of-others").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError:
            return


def test_reads_names_and_restarts_go_on(cli: Cli, origin: LyingServer, small: Path) -> None:
    for number in range(3):
        origin.put("models", f"m/{number}/weights.bin", DATA)
    place = cli.place()
    cli.run("mount", "s3://models/m", place, "--endpoint-url", origin.endpoint_url)
    fill(small)
    assert (place / "0" / "weights.bin").read_bytes() == DATA
    os.kill(cli.status()["server"]["pid"], signal.SIGKILL)
    assert (place / "1" / "weights.bin").read_bytes() == DATA
    assert cli.status()["server"]["restarts"] == 1
    warnings = [line for line in cli.json("logs")["lines"] if "served without being kept" in line]
    assert len(warnings) == 2  # one of each server
    cli.run("umount", place)
    cli.run("mount", "s3://models/m", place, "--endpoint-url", origin.endpoint_url)
    assert (place / "2" / "weights.bin").read_bytes() == DATA


def test_a_new_state_directory_there_is_refused(cli: Cli, origin: LyingServer, small: Path) -> None:
    origin.put("models", "m/weights.bin", DATA)
    fill(small)
    refused = cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", origin.endpoint_url, code=2)
    assert "make room" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_warming_more_than_fits_is_no_success(cli: Cli, origin: LyingServer, small: Path) -> None:
    for number in range(6):
        origin.put("models", f"m/{number}.bin", DATA)
    at = ("--endpoint-url", origin.endpoint_url)
    assert "larger --cache-size" in cli.run("warm", "s3://models/m", *at, code=1).stderr
