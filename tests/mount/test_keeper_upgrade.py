"""Hand-over to another interpreter's cachefs, and back when it is not healthy."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.mount.keeper_support import TinyMount, needs_root_mount, run_on_mount, wait_until

pytestmark = needs_root_mount


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        (mount.data / "f").write_bytes(b"x" * (1 << 20))
        yield mount


def version(tiny: TinyMount, name: str, broken: str = "") -> str:
    """An interpreter of its own; a broken one runs `broken` instead of the server, but is a keeper all the same."""
    path = tiny.directory / f"python-{name}"
    server = f'case "$*" in *tiny_server*) {broken};; esac\n' if broken else ""
    path.write_text(f'#!/bin/sh\n{server}TINY_VERSION={name} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def wait_for_generation(tiny: TinyMount, number: int) -> dict:
    wait_until(lambda: tiny.facts()["generation"] >= number, f"generation {number}")
    return tiny.facts()


def test_upgrade_goes_to_the_new_version_and_the_keeper_follows(tiny: TinyMount) -> None:
    tiny.start()
    keeper = tiny.keeper_pid()
    assert tiny.command("upgrade", version(tiny, "new")) == "done"
    facts = wait_for_generation(tiny, 1)
    assert (facts["version"], facts["upgrade_result"]) == ("new", "ok")
    wait_until(lambda: "took over" in tiny.log(), "the new keeper")
    assert tiny.keeper_pid() == keeper
    assert len(run_on_mount("cat", str(tiny.mountpoint / "f"))) == 1 << 20
    assert tiny.kill_server()["version"] == "new"
    tiny.kill_keeper()
    assert tiny.kill_server()["version"] == "new"


def test_broken_version_is_rolled_back(tiny: TinyMount) -> None:
    tiny.start()
    keeper = tiny.keeper_pid()
    assert tiny.command("upgrade", version(tiny, "broken", "exit 3")) == "done"
    facts = wait_for_generation(tiny, 2)
    assert facts["version"] == ""
    assert "exit status 3" in facts["upgrade_result"]
    assert "rolled back" in facts["upgrade_result"]
    assert tiny.keeper_pid() == keeper
    assert len(run_on_mount("cat", str(tiny.mountpoint / "f"))) == 1 << 20


def test_version_that_never_gets_ready_is_rolled_back(tiny: TinyMount) -> None:
    tiny.start()
    assert tiny.command("upgrade", version(tiny, "sleepy", "exec sleep 1000")) == "done"
    wait_until(lambda: "generation 1" in tiny.log(), "the new version's start")
    line = next(line for line in tiny.log().splitlines() if "generation 1" in line)
    sleepy = int(line.partition("started server ")[2].split()[0])
    os.kill(sleepy, signal.SIGKILL)  # what the keeper itself does after 20 s
    assert "killed by SIGKILL" in wait_for_generation(tiny, 2)["upgrade_result"]


def test_version_that_cannot_be_started_is_rolled_back(tiny: TinyMount) -> None:
    tiny.start()
    path = tiny.directory / "nonsense"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    assert tiny.command("upgrade", str(path)) == "done"
    assert "rolled back: cannot start" in wait_for_generation(tiny, 1)["upgrade_result"]


def test_program_that_others_can_change_is_refused(tiny: TinyMount) -> None:
    tiny.start()
    path = version(tiny, "evil")
    os.chmod(path, 0o777)
    assert "only root and this user can change" in str(tiny.command("upgrade", path))
    os.chmod(path, 0o755)
    os.chown(path, 1234, 1234)
    assert "only root and this user can change" in str(tiny.command("upgrade", path))
    assert "only root and this user can change" in str(tiny.command("upgrade", "/nowhere/python"))
    assert tiny.command("ping") == "pong"
    assert tiny.facts()["generation"] == 0
