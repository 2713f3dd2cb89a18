"""The disk of the state directory becomes read-only under a mount: what is known, what is new and what is open is
served by whatever server comes, and when it can be written again all is as ever."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.config import MIB
from cachefs.kernel.mounts import find_mount
from tests.mount.cli_support import Cli, cli
from tests.mount.harness import needs_fuse, read_only, wait_for

__all__ = ["cli"]
pytestmark = needs_fuse

SEALED, COLD = os.urandom(9 * MIB + 17), os.urandom(17 * MIB + 3)
OTHERS = {f"{name}/x": os.urandom(MIB + number) for number, name in enumerate("defg")}
DATA = {"sealed": SEALED, "cold": COLD, **OTHERS}


@pytest.fixture
def source(tmp_path: Path) -> str:
    directory = tmp_path / "source"
    for name, data in DATA.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"file://{directory}"


def mounted(cli: Cli, source: str) -> Path:
    """With "sealed" and "d/x" sealed."""
    place = cli.place()
    cli.json("mount", source, place, "--prefetch", "none", "--prefetch-bytes", "0")
    read(place, "sealed", "d/x")
    wait_sealed(cli, 2)
    return place


def wait_sealed(cli: Cli, objects: int) -> None:
    wait_for(lambda: cli.status()["tiers"][0]["objects_sealed"] == objects, "sealed")


def kill_server(cli: Cli) -> None:
    """The next one answers when this returns."""
    before = cli.status()["server"]["pid"]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: cli.answers() and cli.status()["server"]["pid"] != before, "the next server")


def read_anew(path: Path) -> bytes:
    """Not what the kernel keeps of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.readall()


def reads_directly(cli: Cli, path: Path) -> bool:
    """Whether a sealed file is read without the server; its bytes are right."""
    assert cli.status()["volumes"][0]["passthrough"]
    before = cli.status()["cache"]
    assert read_anew(path) == SEALED
    return bool(cli.status()["cache"] == before)


def trouble(cli: Cli) -> str:
    return str(cli.status()["tiers"][0]["trouble"])


def read(place: Path, *names: str) -> None:
    """Their bytes are right."""
    for name in names:
        assert read_anew(place / name) == DATA[name], name


def numbers(place: Path, *names: str) -> dict[str, int]:
    found = {name: (place / name).stat().st_ino for name in names}
    assert len(set(found.values())) == len(found)
    return found


def test_servers_come_and_go_on_a_read_only_disk_and_nothing_is_lost(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    known = numbers(place, "sealed", "d/x", "cold")
    with (place / "cold").open("rb", buffering=0) as old:
        assert old.read(1000) == COLD[:1000]
        with read_only(cli.state_dir):
            kill_server(cli)
            assert "cannot be written" in trouble(cli)
            assert "nothing can be kept" in cli.run("warm", source, code=1).stderr
            cli.run("evict", source)  # it could not be deleted, and so is not given up
            assert reads_directly(cli, place / "sealed")
            assert old.read(1000) == COLD[1000:2000]
            kept = cli.status()["tiers"][0]["used_bytes"]
            read(place, "e/x", *known)
            found = numbers(place, "e/x", *known)
            assert known.items() <= found.items()
            kill_server(cli)
            assert numbers(place, *found) == found
            read(place, "f/x", *found)
            found |= numbers(place, "f/x")
            assert old.read(1000) == COLD[2000:3000]
            assert reads_directly(cli, place / "sealed")
            assert cli.status()["tiers"][0]["used_bytes"] == kept
            assert (cli.runtime_dir / "spill").is_dir()
        kill_server(cli)
        assert trouble(cli) == ""
        assert not (cli.runtime_dir / "spill").exists()
        found |= numbers(place, "g/x")
        # Before anything is read: a file that is open when it is sealed gets another number.
        assert numbers(place, *found) == found
        assert len(set(found.values())) == len(found) == len(DATA)
        read(place, *found)
        assert old.read(1000) == COLD[3000:4000]
    wait_sealed(cli, len(DATA))
    kill_server(cli)
    read(place, *found)
    cli.run("umount", place)
    assert not list(cli.runtime_dir.iterdir())


def test_a_mount_of_a_read_only_disk_ends_as_any(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    with read_only(cli.state_dir):
        kill_server(cli)
        read(place, "e/x")
        assert (cli.runtime_dir / "spill").is_dir()
        cli.run("umount", place)
        assert not list(cli.runtime_dir.iterdir())
        refused = cli.run("mount", source, place, code=2).stderr
        assert "cannot be written" in refused
        assert refused.count("\n") == 1
    cli.run("mount", source, place)
    read(place, *DATA)
    cli.run("umount", place)


def test_numbers_of_a_spill_that_somebody_deletes_are_not_given_out_again(cli: Cli, source: str) -> None:
    place = mounted(cli, source)
    with read_only(cli.state_dir):
        kill_server(cli)
        read(place, "e/x")
        told = {**numbers(place, "e/x"), "e": (place / "e").stat().st_ino}
        shutil.rmtree(cli.runtime_dir / "spill")
        kill_server(cli)
        read(place, "f/x")
        assert numbers(place, "f/x")["f/x"] > max(told.values())
        read(place, "e/x")  # what it was is forgotten, and the kernel is told to look the name up again
    cli.run("umount", place)


@pytest.fixture
def failing(cli: Cli, tmp_path: Path) -> Iterator[Path]:
    """The state directory is a small ext4; what is written to this path lets it find an error: it becomes read-only."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no ext4 here")
    cli.state_dir.mkdir()
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    command = ["mount", "-o", "loop,errors=remount-ro", image, cli.state_dir]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no loop devices here")
    try:
        found = find_mount(cli.state_dir)
        assert found is not None
        device = Path(os.path.realpath(f"/sys/dev/block/{found.major_minor}")).name
        trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this ext4 cannot be told to fail")
        yield trigger
        cli.run("umount", "--all", "--lazy", code=None)
    finally:
        subprocess.run(["umount", "--lazy", cli.state_dir], check=True)


def test_a_server_goes_on_when_its_file_system_has_failed_and_so_does_the_next(
    cli: Cli, source: str, failing: Path
) -> None:
    place = mounted(cli, source)
    known = numbers(place, "sealed", "d/x")
    failing.write_text("test")
    with pytest.raises(OSError, match="Read-only"):
        (cli.state_dir / "new").touch()
    read(place, "cold", "e/x", *known)
    found = numbers(place, "cold", "e/x", *known)
    assert known.items() <= found.items()
    assert "names are kept" in trouble(cli)
    assert "names are kept" in cli.run("status").stdout
    kill_server(cli)
    assert numbers(place, *found) == found
    assert "cannot be written" in trouble(cli)
    assert reads_directly(cli, place / "sealed")
    read(place, "f/x", *found)
    assert len(set(numbers(place, "f/x", *found).values())) == len(found) + 1
    cli.run("umount", place)
    assert not list(cli.runtime_dir.iterdir())
