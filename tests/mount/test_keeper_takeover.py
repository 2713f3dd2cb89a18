"""A keeper dies, a server dies, both by turns: the mount goes on. And what a new keeper must know."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.keeper_support import DEADLINE_S, TinyMount, is_alive, needs_root_mount, run_on_mount, wait_until

pytestmark = needs_root_mount
MIB = 1 << 20


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        yield mount


@pytest.mark.parametrize(
    ("turns", "mib"), [(3, 48), pytest.param(100, 1024, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_keeper_and_server_die_by_turns_under_a_reader(tiny: TinyMount, turns: int, mib: int) -> None:
    data = os.urandom(mib * MIB)
    (tiny.data / "f").write_bytes(data)
    tiny.switch("slow")
    tiny.start()
    reader = subprocess.Popen(["sha256sum", str(tiny.mountpoint / "f")], stdout=subprocess.PIPE, text=True)
    keepers = {tiny.keeper_pid()}
    for _ in range(turns):
        keepers.add(tiny.kill_keeper())
        tiny.kill_server()
    tiny.switch("slow", on=False)
    output, _ = reader.communicate(timeout=2 * DEADLINE_S)
    assert output.split()[0] == hashlib.sha256(data).hexdigest()
    assert len(keepers) == turns + 1
    facts = tiny.facts()
    assert (facts["generation"], facts["ledger_starts"]) == (turns, turns + 1)
    assert "exit status" not in tiny.log()


def test_new_keeper_knows_the_backing_files(tiny: TinyMount) -> None:
    for name in "ab":
        (tiny.data / name).write_bytes(name.encode() * MIB)
    tiny.switch("passthrough")
    tiny.start()
    holder = subprocess.Popen(["tail", "-f", str(tiny.mountpoint / "a")], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: os.path.exists(f"/proc/{holder.pid}/fd/3"), "an open file")
        run_on_mount("cat", str(tiny.mountpoint / "b"))
        tiny.kill_keeper()
        backings = tiny.kill_server()["backings"]
        assert len(backings) == 2
        # `a` is still open: a second id for its inode would be EIO.
        assert run_on_mount("cat", str(tiny.mountpoint / "a")) == "a" * MIB
        assert tiny.command("reads") == 0
        for backing_id in backings:
            tiny.command("close_backing", backing_id)
        assert tiny.kill_server()["backings"] == []
    finally:
        holder.kill()
        holder.wait()


def test_server_that_waits_for_nothing_ends_with_a_later_keeper(tiny: TinyMount) -> None:
    tiny.start()
    keeper = tiny.kill_keeper()
    os.kill(keeper, signal.SIGTERM)
    tiny.wait_for_end()


def test_unmount_that_was_asked_of_a_dying_keeper_is_asked_of_the_next(tiny: TinyMount) -> None:
    tiny.start()
    keeper = tiny.keeper_pid()
    os.kill(keeper, signal.SIGSTOP)
    tiny.command("unmount")
    os.kill(keeper, signal.SIGKILL)
    tiny.wait_for_end()


def test_new_keeper_goes_on_when_the_server_dies_before_the_takeover(tiny: TinyMount) -> None:
    """It had everything before it started."""
    tiny.start()
    for _ in range(3):
        server, keeper = tiny.facts()["pid"], tiny.keeper_pid()
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda keeper=keeper: tiny.live()["keeper_pid"] != keeper, "a new keeper's start")
        os.kill(server, signal.SIGKILL)
        wait_until(lambda server=server: tiny.facts()["pid"] != server, "a new server")
    assert tiny.listing() == []


def test_keeper_deaths_leak_no_processes_and_no_descriptors(tiny: TinyMount) -> None:
    tiny.start()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{tiny.facts()['pid']}/fd"))

    tiny.kill_keeper()
    before = descriptors()  # a file that it writes just now may be among them
    for _ in range(5):
        tiny.kill_keeper()
    wait_until(lambda: descriptors() <= before, "no more descriptors than before")
    server = tiny.facts()["pid"]
    children = Path(f"/proc/{server}/task/{server}/children")
    wait_until(lambda: children.read_text().split() == [str(tiny.keeper_pid())], "the reaping of dead keepers")
    assert is_alive(server)
