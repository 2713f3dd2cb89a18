"""Every way a mount ends: both processes end, nothing stays mounted; and what a death of both leaves is cleared."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cachefs import launch
from cachefs.config import VolumeConfig
from cachefs.errors import StateBusy, UsageError, WorkFailed
from cachefs.kernel.mounts import find_mount, probe, recover_dead_mount, unmount
from cachefs.kernel.spawn import python_command
from tests.mount.keeper_support import (
    DEADLINE_S,
    REPOSITORY,
    TinyMount,
    is_alive,
    kill_both,
    needs_root_mount,
    wait_until,
)

pytestmark = needs_root_mount


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        (mount.data / "f").write_bytes(os.urandom(1 << 20))
        yield mount


def bind(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["keeper_pid", "pid"])
def test_signal_to_keeper_or_server_ends_both(tiny: TinyMount, whom: str, number: int) -> None:
    tiny.start()
    os.kill(tiny.facts()[whom], number)
    tiny.wait_for_end()
    assert "the mount has ended" in tiny.log()


@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]])
def test_unmounting_ends_both(tiny: TinyMount, command: list[str]) -> None:
    tiny.start()
    subprocess.run([*command, str(tiny.mountpoint)], check=True, timeout=DEADLINE_S)
    tiny.wait_for_end()
    assert "the file system was unmounted" in tiny.log() or "the mount has ended" in tiny.log()


def test_unmounting_ends_both_when_the_server_is_deaf_and_stopped(tiny: TinyMount) -> None:
    tiny.start()
    server = tiny.facts()["pid"]
    os.kill(server, signal.SIGSTOP)
    try:
        subprocess.run(["umount", "-l", str(tiny.mountpoint)], check=True, timeout=DEADLINE_S)
        wait_until(lambda: "the file system was unmounted" in tiny.log(), "the keeper to notice")
        os.kill(tiny.keeper_pid(), signal.SIGTERM)  # a second request does not wait for the server
        tiny.wait_for_end()
    finally:
        if is_alive(server):
            os.kill(server, signal.SIGCONT)


def test_unmount_while_no_server_lives_ends_the_keeper(tiny: TinyMount) -> None:
    tiny.start()
    tiny.switch("die_at_start")
    os.kill(tiny.facts()["pid"], signal.SIGKILL)
    wait_until(lambda: "exit status 7" in tiny.log(), "a failed restart")
    unmount(tiny.mountpoint, as_root=True)  # umount(8) would wait for a server: it asks the root for its attributes
    tiny.wait_for_end()


def test_server_that_asks_ends_mount_binds_and_keeper(tiny: TinyMount) -> None:
    tiny.start()
    bound = tiny.directory / "bound"
    bind(tiny.mountpoint, bound)
    tiny.command("unmount")
    tiny.wait_for_end()
    assert find_mount(bound) is None


def test_busy_mount_is_ended_too(tiny: TinyMount) -> None:
    tiny.start()
    holder = subprocess.Popen(["tail", "-f", str(tiny.mountpoint / "f")], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: tiny.live()["reads"] > 0, "a READ")
        os.kill(tiny.keeper_pid(), signal.SIGTERM)
        tiny.wait_for_end()
    finally:
        holder.kill()
        holder.wait()


def test_keeper_in_the_foreground_is_waited_for(tiny: TinyMount) -> None:
    tiny.start(foreground=True)
    assert tiny.process is not None
    os.kill(tiny.process.pid, signal.SIGINT)
    assert tiny.process.wait(DEADLINE_S) == 0
    tiny.wait_for_end()


def test_failed_first_start_tells_the_command_and_leaves_nothing(tiny: TinyMount) -> None:
    tiny.switch("fail")
    with pytest.raises(UsageError, match="the bucket does not exist"):
        tiny.start()
    assert not tiny.is_mounted()
    tiny.switch("fail", on=False)
    tiny.start()


def test_server_that_dies_in_its_first_start_tells_the_command(tiny: TinyMount) -> None:
    tiny.switch("die_at_start")
    with pytest.raises(WorkFailed, match=r"exit status 7; see .*server\.log"):
        tiny.start()
    assert not tiny.is_mounted()


@pytest.fixture(params=["dead", "takes"])
def ended_first_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first server dies before its session is sent, or before it has looked at it."""

    def command(python: str, *arguments: str) -> list[str]:
        words = ["tests.mount.ended_first_server" if word == "cachefs.first_start" else word for word in arguments]
        return python_command(python, *words)

    monkeypatch.setattr(launch, "python_command", command)
    monkeypatch.setenv("CACHEFS_TEST_FIRST_SERVER", request.param)
    return request.param


def test_first_server_that_dies_without_its_session_is_replaced(tiny: TinyMount, ended_first_server: str) -> None:
    tiny.start()
    assert tiny.facts()["generation"] == (0 if ended_first_server == "dead" else 1)
    assert ("ended before it had its session" in tiny.log()) == (ended_first_server == "dead")
    assert tiny.listing() == ["f"]


@pytest.mark.usefixtures("ended_first_server")
def test_who_comes_for_a_dead_first_server_probes_the_volumes(tiny: TinyMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    volume = VolumeConfig(name="v", source=f"file://{tiny.directory}/nowhere")
    try:
        with pytest.raises(UsageError, match="nowhere cannot be mounted"):
            launch.start_keeper(msgspec.structs.replace(tiny.config, volumes=(volume,)))
        assert not tiny.is_mounted()
    finally:
        if tiny.is_mounted():
            unmount(tiny.mountpoint, as_root=True)


def test_command_that_waits_no_longer_leaves_nothing(tiny: TinyMount) -> None:
    tiny.switch("never_ready")
    with pytest.raises(WorkFailed, match="does not answer"):
        tiny.start(timeout_s=1.0)
    wait_until(lambda: "the mount has ended" in tiny.log(), "the keeper's end")
    assert not tiny.is_mounted()


def test_second_keeper_on_one_state_directory_is_refused(tiny: TinyMount) -> None:
    tiny.start()
    with pytest.raises(StateBusy):
        TinyMount(tiny.directory).start()
    assert tiny.listing() == ["f"]


def test_mount_point_that_is_a_file_or_not_empty_is_one_clear_line(tiny: TinyMount) -> None:
    tiny.mountpoint.mkdir()
    (tiny.mountpoint / "x").touch()
    with pytest.raises(UsageError, match="not empty"):
        tiny.start()
    (tiny.mountpoint / "x").unlink()
    tiny.mountpoint.rmdir()
    tiny.mountpoint.touch()
    with pytest.raises(UsageError, match="not a directory"):
        tiny.start()


def test_next_start_clears_what_the_death_of_both_left(tiny: TinyMount) -> None:
    tiny.start()
    bound = tiny.directory / "bound"
    bind(tiny.mountpoint, bound)
    kill_both(tiny)
    wait_until(lambda: probe(tiny.mountpoint) == "dead", "a dead mount")
    (tiny.state / "server.json").unlink()
    tiny.start()
    assert find_mount(bound) is None
    assert tiny.listing() == ["f"]


def test_live_mount_is_not_taken_for_a_dead_one(tiny: TinyMount) -> None:
    tiny.start()
    assert recover_dead_mount(tiny.mountpoint) == []
    assert recover_dead_mount(tiny.directory) == []
    assert tiny.listing() == ["f"]


def test_mount_that_hangs_is_cleared_only_when_nobody_supervises_it(tiny: TinyMount) -> None:
    tiny.start()
    keeper, server = tiny.keeper_pid(), tiny.facts()["pid"]
    for pid in (keeper, server):
        os.kill(pid, signal.SIGSTOP)
    try:
        assert recover_dead_mount(tiny.mountpoint, probe_timeout_s=1.0) == []
        assert recover_dead_mount(tiny.mountpoint, unsupervised=True, probe_timeout_s=1.0) == [str(tiny.mountpoint)]
        assert not tiny.is_mounted()
    finally:
        for pid in (keeper, server):
            os.kill(pid, signal.SIGCONT)
    tiny.wait_for_end()


def test_keeper_imports_only_what_it_may() -> None:
    script = "import sys, cachefs.keeper; print(*[m for m in sys.modules if m.startswith('cachefs') or m in HEAVY])"
    heavy = "HEAVY = {'trio', 'pyfuse3', 'lmdb', 'obstore', 's3fs', 'grpc', 'rich', 'click', 'structlog', 'asyncio'}; "
    done = subprocess.run([sys.executable, "-c", heavy + script], capture_output=True, text=True, check=True)
    names = {name for name in done.stdout.split() if not name.startswith("cachefs.kernel")}
    assert names == {"cachefs", "cachefs.keeper", "cachefs.config", "cachefs.errors"}
