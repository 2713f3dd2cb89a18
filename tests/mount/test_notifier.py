"""Names that the kernel is told to forget, and inodes that it is asked about, on a real mount."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.keeper_support import DEADLINE_S, TinyMount, is_alive, needs_root_mount, run_on_mount, wait_until

pytestmark = needs_root_mount
ROOT = 1


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        for name in "abcde":
            (mount.data / name).write_bytes(name.encode() * 4096)
        yield mount


def stat_of(tiny: TinyMount, name: str) -> None:
    run_on_mount("stat", str(tiny.mountpoint / name))


def workers(tiny: TinyMount) -> list[int]:
    server = tiny.facts()["pid"]
    pids = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [int(pid) for pid in pids if b"notify_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def start_lookup(tiny: TinyMount, name: str) -> "subprocess.Popen[bytes]":
    script = "import os, sys; os.access(sys.argv[1], 0)"
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", script, str(tiny.mountpoint / name)])


def test_forgotten_entry_is_looked_up_again(tiny: TinyMount) -> None:
    tiny.start()
    stat_of(tiny, "a")
    stat_of(tiny, "a")
    assert tiny.command("lookups") == 1
    tiny.command("forget_entry", ROOT, "a")
    wait_until(lambda: stat_of(tiny, "a") or tiny.command("lookups") == 2, "a second LOOKUP")
    tiny.command("forget_entry", ROOT, "never seen")  # ENOENT is no error
    assert len(workers(tiny)) == 1


def test_kernel_knows_an_inode_from_its_lookup_on(tiny: TinyMount) -> None:
    tiny.start()
    assert tiny.command("is_known", 2) is False
    stat_of(tiny, "a")
    assert tiny.command("is_known", 2) is True


def test_server_with_waiting_notifications_can_be_killed_and_the_mount_goes_on(tiny: TinyMount) -> None:
    """The directory's lock is held by a LOOKUP that the server does not answer: the notification waits for it."""
    tiny.start()
    stat_of(tiny, "a")
    tiny.switch("hang_lookup")
    looking = start_lookup(tiny, "b")
    wait_until(lambda: tiny.command("lookups") == 2, "a LOOKUP that waits")
    tiny.command("forget_entry", ROOT, "c")
    tiny.command("forget_entry", ROOT, "d")
    wait_until(lambda: len(workers(tiny)) == 2, "two workers")
    assert tiny.command("ping") == "pong"
    old_workers, server = workers(tiny), tiny.facts()["pid"]
    tiny.kill_server()
    assert not is_alive(server)
    tiny.switch("hang_lookup", on=False)
    assert looking.wait(DEADLINE_S) == 0
    wait_until(lambda: not any(is_alive(pid) for pid in old_workers), "the end of the old workers")
    assert tiny.listing()


def test_worker_that_dies_is_replaced(tiny: TinyMount) -> None:
    tiny.start()
    stat_of(tiny, "a")
    assert tiny.command("is_known", 2) is True
    os.kill(workers(tiny)[0], signal.SIGKILL)
    assert tiny.command("is_known", 2) is True
    assert len(workers(tiny)) == 1


def test_workers_end_with_the_server(tiny: TinyMount) -> None:
    tiny.start()
    tiny.command("is_known", 2)
    pids = workers(tiny)
    assert len(pids) == 1
    os.kill(tiny.keeper_pid(), signal.SIGTERM)
    tiny.wait_for_end()
    wait_until(lambda: not is_alive(pids[0]), "the worker's end")
