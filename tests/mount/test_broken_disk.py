"""A disk on which blobs cannot be deleted, are gone or are no files: the mount lives, and bytes are right."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.config import MIB
from cachefs.kernel.locks import failure_of
from tests.mount.cli_support import Cli, cli
from tests.mount.harness import needs_fuse, wait_for

__all__ = ["cli"]
pytestmark = needs_fuse

DATA = {"a": os.urandom(9 * MIB + 17), "b": os.urandom(MIB + 1), "c": os.urandom(MIB + 2)}


@pytest.fixture
def source(tmp_path: Path) -> str:
    directory = tmp_path / "source"
    directory.mkdir()
    for name, data in DATA.items():
        (directory / name).write_bytes(data)
    return f"file://{directory}"


def blobs(cli: Cli) -> list[Path]:
    return [path for path in (cli.state_dir / "blobs").rglob("*") if len(path.name) == 32]


def mounted(cli: Cli, source: str) -> Path:
    """With "a" sealed, and read once more from its blob."""
    place = cli.place()
    cli.json("mount", source, place, "--prefetch", "none")
    for _ in range(2):
        assert (place / "a").read_bytes() == DATA["a"]
        wait_for(lambda: cli.status()["tiers"][0]["objects_sealed"] == 1, "sealed")
    return place


@pytest.fixture
def immutable(cli: Cli, source: str) -> Iterator[Path]:
    """Where it is mounted; the only blob is wrong and cannot be deleted."""
    place = mounted(cli, source)
    (blob,) = blobs(cli)
    with blob.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(bytes(255 - byte for byte in DATA["a"][5 * MIB : 5 * MIB + 10]))
    if subprocess.run(["chattr", "+i", blob], capture_output=True, check=False).returncode:
        pytest.skip("no immutable files here")
    yield place
    subprocess.run(["chattr", "-i", blob], check=True)


def test_a_blob_that_cannot_be_deleted_ends_neither_the_mount_nor_the_next_server(cli: Cli, immutable: Path) -> None:
    server = cli.status()["server"]
    assert (immutable / "a").read_bytes() == DATA["a"]
    wait_for(lambda: "cannot be deleted" in cli.log(), "the bad blob is given up")
    assert [(immutable / name).read_bytes() == data for name, data in DATA.items()] == [True] * 3
    assert cli.status()["server"] == server
    os.kill(server["pid"], signal.SIGKILL)
    assert [(immutable / name).read_bytes() == data for name, data in DATA.items()] == [True] * 3
    assert cli.status()["server"]["restarts"] == 1
    assert cli.run("gc").returncode == 0
    cli.run("umount", immutable)


def test_without_the_directory_of_blobs_reads_go_on_and_status_says_what_is_wrong(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    shutil.rmtree(cli.state_dir / "blobs")
    assert [(place / name).read_bytes() == data for name, data in DATA.items()] == [True] * 3
    assert "No such file" in cli.status()["tiers"][0]["trouble"]
    assert "nothing is kept in it" in cli.run("status").stdout
    cli.run("umount", place)


def test_a_fifo_in_the_place_of_a_blob_hangs_nobody(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    (blob,) = blobs(cli)
    blob.unlink()
    os.mkfifo(blob)
    assert (place / "a").read_bytes() == DATA["a"]
    cli.run("umount", place)


IMPATIENT = "from cachefs import cli, cli_data, cli_mount; cli_data.BUSY_S = cli_mount.COMING_UP_S = 0.1; cli.main()"


def impatient(cli: Cli, *arguments: object) -> str:
    """What a command says that ends with exit code 2 without waiting for 20 s."""
    command = [sys.executable, "-P", "-c", IMPATIENT, *map(str, arguments)]
    done = subprocess.run(command, env=cli.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    return done.stderr


@contextlib.contextmanager
def killed_without_its_disk(cli: Cli) -> Iterator[None]:
    """The server is killed, and none can start meanwhile: in the place of its disk is an empty one, read-only."""
    pid = cli.status()["server"]["pid"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "cachefs-test", cli.state_dir], check=True)
    try:
        os.kill(pid, signal.SIGKILL)
        yield
    finally:
        subprocess.run(["umount", "--lazy", cli.state_dir], check=True)


def test_why_no_server_comes_up_is_one_line_of_status_and_mount(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    with killed_without_its_disk(cli):
        wait_for(lambda: "state directory" in failure_of(cli.runtime_dir), "told")
        for arguments in (["status"], ["mount", source, cli.place("other")]):
            said = impatient(cli, *arguments)
            assert failure_of(cli.runtime_dir) in said
            assert said.count("\n") == 1
    assert (place / "c").read_bytes() == DATA["c"]  # mended: the next server comes
    assert failure_of(cli.runtime_dir) == ""
    assert cli.status()["server"]["restarts"] >= 1
    cli.run("umount", place)
    assert not list(cli.runtime_dir.iterdir())


def test_a_mount_whose_server_cannot_start_is_unmounted(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    with killed_without_its_disk(cli):
        wait_for(lambda: failure_of(cli.runtime_dir) != "", "told")
        cli.run("umount", "--all")
        assert cli.mounts() == [str(cli.state_dir)]
    assert not place.is_mount()
