"""The runtime directory, which the command line names after the state directory: it goes with the last session."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.kernel.locks import KEEPER_LOCK, STATE_LOCK, is_locked, runtime_name
from cachefs.settings import runtime_base
from tests.mount.cli_support import Cli
from tests.mount.harness import needs_fuse, wait_for
from tests.support.lying import LyingServer

pytestmark = needs_fuse


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """With the runtime directory that it has by default."""
    found = Cli(tmp_path)
    found.runtime_dir.rmdir()
    del found.environ["CACHEFS_RUNTIME_DIR"]
    found.runtime_dir = runtime_base(os.environ, 0) / runtime_name(os.path.realpath(tmp_path / "state"))
    yield found
    found.close()


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"hello")
    return f"file://{tmp_path}/source"


def kill(cli: Cli, *pids: int) -> None:
    """All at once: stopped first, so that none sees the other's death."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    cli.wait_gone(*pids)


def test_umount_leaves_nothing_also_of_two_volumes(cli: Cli, source: str) -> None:
    one, two = cli.place("one"), cli.place("two")
    for _ in range(2):
        cli.run("mount", source, one)
        cli.run("mount", source, two, "--include", "a")
        cli.run("umount", one)
        assert (two / "a").read_bytes() == b"hello"
        assert cli.answers()
        cli.run("umount", two)
        assert not cli.runtime_dir.exists()


def test_umount_of_the_system_leaves_nothing(cli: Cli, source: str) -> None:
    cli.run("mount", source, cli.place())
    subprocess.run(["umount", cli.place()], check=True, timeout=60)
    wait_for(lambda: not cli.runtime_dir.exists(), "the runtime directory is gone")


def test_after_both_were_killed_the_next_session_leaves_nothing(cli: Cli, source: str) -> None:
    pids = cli.json("mount", source, cli.place())
    kill(cli, pids["keeper_pid"], pids["server_pid"])
    assert (cli.runtime_dir / "control.sock").exists()
    cli.run("mount", source, cli.place())
    assert (cli.place() / "a").read_bytes() == b"hello"
    cli.run("umount", cli.place())
    assert not cli.runtime_dir.exists()


@pytest.mark.parametrize("what", ["place", "--all", "place without the state directory's name"])
def test_umount_after_both_were_killed_leaves_nothing(cli: Cli, source: str, what: str) -> None:
    pids = cli.json("mount", source, cli.place())
    kill(cli, pids["keeper_pid"], pids["server_pid"])
    state_dir = cli.environ["CACHEFS_STATE_DIR"]
    if "without" in what:
        del cli.environ["CACHEFS_STATE_DIR"]
    cli.run("umount", "--all" if what == "--all" else cli.place())
    cli.environ["CACHEFS_STATE_DIR"] = state_dir
    assert cli.mounts() == []
    assert not cli.runtime_dir.exists()


def test_a_session_whose_keeper_was_killed_leaves_nothing(cli: Cli, source: str) -> None:
    pids = cli.json("mount", source, cli.place())
    os.kill(pids["keeper_pid"], signal.SIGKILL)
    wait_for(lambda: cli.status()["keeper"]["pid"] != pids["keeper_pid"], "another keeper has taken over")
    cli.run("umount", cli.place())
    wait_for(lambda: not cli.runtime_dir.exists(), "the runtime directory is gone")


def test_a_mount_that_fails_leaves_the_directory_of_a_live_session_and_none_of_its_own(cli: Cli, source: str) -> None:
    missing = f"file://{cli.directory}/missing"
    cli.run("mount", missing, cli.place("one"), code=2)
    assert not cli.runtime_dir.exists()
    assert f"{missing} cannot be mounted" in cli.log()  # the state directory stays: the server's log says why
    assert not is_locked(cli.state_dir / STATE_LOCK)
    cli.run("mount", source, cli.place())
    before = sorted(os.listdir(cli.runtime_dir))
    cli.run("mount", missing, cli.place("one"), code=2)
    assert sorted(os.listdir(cli.runtime_dir)) == before
    assert (cli.place() / "a").read_bytes() == b"hello"


def test_mounts_that_come_while_others_go_all_succeed_and_leave_nothing(cli: Cli, source: str) -> None:
    failures: list[BaseException] = []

    def come_and_go(name: str) -> None:
        try:
            for _ in range(3):
                cli.run("mount", source, place := cli.place(name))
                assert (place / "a").read_bytes() == b"hello"
                cli.run("umount", place)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert cli.mounts() == []
    wait_for(lambda: not cli.runtime_dir.exists(), "the runtime directory is gone")


def test_one_runtime_directory_does_not_serve_two_state_directories(cli: Cli, source: str) -> None:
    one, two = cli.place("one"), cli.place("two")
    cli.environ["CACHEFS_RUNTIME_DIR"] = str(cli.runtime_dir)
    cli.json("mount", source, one)
    other = cli.directory / "other"
    asked = [("mount", source, two), ("umount", "--all"), ("umount", one), ("status",), ("evict", source)]
    for arguments in asked:
        said = cli.run(*arguments, "--state-dir", other, code=2).stderr
        assert f"{cli.state_dir}, not by {other}" in said, said
    assert cli.mounts() == [str(cli.runtime_dir / "root"), str(one)]
    assert (one / "a").read_bytes() == b"hello"
    cli.run("umount", one, "--state-dir", cli.state_dir)
    cli.json("mount", source, two, "--state-dir", other)  # nobody has it any more
    assert (two / "a").read_bytes() == b"hello"
    del cli.environ["CACHEFS_STATE_DIR"]
    cli.run("umount", two)  # by its name alone
    assert cli.mounts() == []


def has_probe(pid: int) -> bool:
    """Whether a command is looking now whether a mount answers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with contextlib.suppress(OSError):  # one has just ended
        return any(b"statvfs" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
    return False


def test_a_mount_waits_for_a_server_whose_keeper_was_killed_in_mid_mount(cli: Cli, origin: LyingServer) -> None:
    origin.put("models", "m/a", b"hello")
    origin.lie("hang", operation="LIST", times=100)
    place = cli.place()
    arguments = ["mount", "s3://models/m", str(place), "--endpoint-url", origin.endpoint_url]
    command = [sys.executable, "-P", "-m", "cachefs.cli", *arguments]
    first = subprocess.Popen(command, env=cli.environ, cwd=cli.directory)
    origin.wait_waiting(1)
    keeper = int((cli.runtime_dir / KEEPER_LOCK).read_text().split()[0])
    server = int((cli.state_dir / STATE_LOCK).read_text())
    cli.watch(keeper, server)
    os.kill(server, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    assert first.wait(60) == 1
    second = subprocess.Popen(command, env=cli.environ, cwd=cli.directory)
    wait_for(lambda: second.poll() is not None or has_probe(second.pid), "the second has met the mount")
    os.kill(server, signal.SIGCONT)
    origin.tell_the_truth()
    assert second.wait(120) == 0
    assert (place / "a").read_bytes() == b"hello"
    cli.run("umount", place)
    wait_for(lambda: not cli.runtime_dir.exists(), "the runtime directory is gone")
