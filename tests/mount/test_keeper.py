"""The keeper on a real mount: servers die, readers do not notice."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cachefs.kernel.mounts import find_mount
from tests.mount.keeper_support import DEADLINE_S, TinyMount, needs_root_mount, wait_until

pytestmark = needs_root_mount
MIB = 1 << 20


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        yield mount


def put(tiny: TinyMount, name: str = "f", size: int = 4 * MIB) -> str:
    data = os.urandom(size)
    (tiny.data / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def start_reader(tiny: TinyMount, name: str = "f") -> "subprocess.Popen[str]":
    """In a process of its own: the tests' process must not hang on a mount."""
    return subprocess.Popen(["sha256sum", str(tiny.mountpoint / name)], stdout=subprocess.PIPE, text=True)


def finish(reader: "subprocess.Popen[str]") -> str:
    output, _ = reader.communicate(timeout=DEADLINE_S)
    assert reader.returncode == 0
    return output.split()[0]


def test_mount_answers_when_start_returns(tiny: TinyMount) -> None:
    digest = put(tiny)
    tiny.start()
    assert tiny.listing() == ["f"]
    assert finish(start_reader(tiny)) == digest
    mount = find_mount(tiny.mountpoint)
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.cachefs", "cachefs")
    assert {"ro", "nosuid", "nodev", "default_permissions"} <= set(mount.options)
    facts = tiny.facts()
    assert (facts["generation"], facts["restarted"], facts["ledger_starts"]) == (0, False, 1)


def test_reader_does_not_notice_that_servers_are_killed(tiny: TinyMount) -> None:
    digest = put(tiny, size=48 * MIB)
    tiny.switch("slow")
    tiny.start()
    reader = start_reader(tiny)
    for _ in range(4):
        wait_until(lambda: tiny.live()["reads"] >= 2 or reader.poll() is not None)
        tiny.kill_server()
    tiny.switch("slow", on=False)
    assert finish(reader) == digest
    assert tiny.facts()["ledger_starts"] == 5
    assert tiny.log().count("killed by SIGKILL") == 4


def test_request_that_a_dead_server_had_taken_is_answered_by_the_next(tiny: TinyMount) -> None:
    digest = put(tiny, size=MIB)
    tiny.switch("hang")
    tiny.start()
    reader = start_reader(tiny)
    wait_until(lambda: tiny.live()["reads"] > 0, "a READ")
    assert tiny.kill_server()["restarted"]
    tiny.switch("hang", on=False)
    assert finish(reader) == digest


def test_without_resend_what_a_dead_server_had_taken_fails_and_the_rest_works(tmp_path: Path) -> None:
    with TinyMount(tmp_path, kernel_disable=("resend",)) as tiny:
        put(tiny, size=MIB)
        digest = put(tiny, "g", size=MIB)
        tiny.switch("hang")
        tiny.start()
        assert "resend" not in tiny.facts()["features"]
        reader = start_reader(tiny)
        wait_until(lambda: tiny.live()["reads"] > 0, "a READ")
        tiny.kill_server()
        tiny.switch("hang", on=False)
        reader.communicate(timeout=DEADLINE_S)  # it got an error, or its READ was asked again: it does not hang
        assert finish(start_reader(tiny, "g")) == digest
        tiny.kill_keeper()
        tiny.kill_server()
        assert finish(start_reader(tiny, "f"))


@pytest.mark.parametrize("feature", ["passthrough", "async_dio", "parallel_dirops", "readdirplus", "max_pages"])
def test_masked_feature_is_not_used(tmp_path: Path, feature: str) -> None:
    with TinyMount(tmp_path, kernel_disable=(feature,)) as tiny:
        digest = put(tiny, size=MIB)
        tiny.start()
        assert feature not in tiny.facts()["features"]
        assert finish(start_reader(tiny)) == digest
        if feature == "passthrough":
            assert "kernel refused" in tiny.command("hostile", "good")


def test_read_ahead_is_raised_unless_it_is_masked(tmp_path: Path) -> None:
    def read_ahead_kib(tiny: TinyMount) -> int:
        return int(Path(f"/sys/class/bdi/{tiny.device}/read_ahead_kb").read_text())

    with TinyMount(tmp_path / "raised") as tiny:
        assert read_ahead_kib(tiny.start()) == 1024
    with TinyMount(tmp_path / "masked", kernel_disable=("readahead",)) as tiny:
        assert read_ahead_kib(tiny.start()) != 1024


@pytest.mark.parametrize("restarts", [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_restarts_leak_nothing_in_a_small_keeper(tiny: TinyMount, restarts: int) -> None:
    def descriptors() -> list[str]:
        directory = Path(f"/proc/{tiny.keeper_pid()}/fd")
        return sorted(os.readlink(directory / fd).partition(":[")[0] for fd in os.listdir(directory))

    put(tiny)
    tiny.switch("passthrough")
    tiny.start()
    finish(start_reader(tiny))
    tiny.kill_server()
    tiny.command("close_backing", 0)  # answered by the keeper: it is done with the start
    before = descriptors()
    for _ in range(restarts):
        tiny.kill_server()
    wait_until(lambda: descriptors() == before, f"the descriptors {before}")
    assert len(tiny.facts()["backings"]) == 1
    assert tiny.facts()["generation"] == restarts + 1
    status = Path(f"/proc/{tiny.keeper_pid()}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert resident_kib < 25 * 1024
    children = Path(f"/proc/{tiny.keeper_pid()}/task/{tiny.keeper_pid()}/children").read_text().split()
    assert len(children) == 1


def test_server_has_its_link_and_the_handed_descriptors_only(tiny: TinyMount) -> None:
    """Nothing of the keeper, or of whoever started it, is inherited; and nothing can be inherited from the server."""
    leaked = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        tiny.start()
    finally:
        os.close(leaked)
    for pid in (tiny.facts()["pid"], tiny.keeper_pid()):
        directory = Path(f"/proc/{pid}")
        targets = {fd: os.readlink(directory / "fd" / fd) for fd in os.listdir(directory / "fd")}
        assert "/dev/zero" not in targets.values()
        for fd, target in targets.items():
            if int(fd) > 2 and ("fuse" in target or "memfd" in target or "socket" in target):
                flags = int((directory / "fdinfo" / fd).read_text().split("flags:")[1].split()[0], 8)
                assert flags & os.O_CLOEXEC, target


def test_server_that_cannot_start_again_is_tried_until_the_keeper_gives_up(tmp_path: Path) -> None:
    with TinyMount(tmp_path, keeper_give_up_s=6.0) as tiny:
        put(tiny, size=MIB)
        tiny.switch("hang")
        tiny.start()
        reader = start_reader(tiny)
        wait_until(lambda: tiny.live()["reads"] > 0, "a READ")
        tiny.switch("die_at_start")
        os.kill(tiny.facts()["pid"], signal.SIGKILL)
        reader.communicate(timeout=DEADLINE_S)
        assert reader.returncode != 0
        tiny.wait_for_end()
        assert tiny.log().count("exit status 7") >= 1
        assert "aborting the mount" in tiny.log()


def test_keeper_that_may_never_give_up_waits_for_the_next_server(tmp_path: Path) -> None:
    with TinyMount(tmp_path, keeper_give_up_s=0.0) as tiny:
        put(tiny, size=MIB)
        tiny.start()
        tiny.kill_server()
        assert tiny.listing()
        assert "aborting" not in tiny.log()


def test_request_that_ends_every_server_ends_the_mount_at_last(tmp_path: Path) -> None:
    """It comes again and again; servers that become ready in between do not reset the clock."""
    with TinyMount(tmp_path, keeper_give_up_s=6.0) as tiny:
        put(tiny, size=MIB)
        tiny.switch("die_at_read")
        tiny.start()
        reader = start_reader(tiny)
        reader.communicate(timeout=DEADLINE_S)
        assert reader.returncode != 0
        tiny.wait_for_end()
        assert tiny.log().count("exit status 9") >= 2


def test_restarted_server_has_the_volumes_that_were_set(tiny: TinyMount) -> None:
    tiny.start()
    tiny.command("set_volume_region", "eu-central-1")
    assert tiny.kill_server()["region"] == "eu-central-1"
    tiny.kill_keeper()
    assert tiny.kill_server()["region"] == "eu-central-1"


def test_clients_that_are_killed_do_not_freeze_the_server(tiny: TinyMount) -> None:
    """The receive shim: a request can be withdrawn between epoll and read."""
    put(tiny, size=8 * MIB)
    tiny.switch("slow")
    tiny.start()
    script = (
        "import os, sys\nwhile True:\n  os.listdir(sys.argv[1]); os.access(sys.argv[1] + '/' + os.urandom(4).hex(), 0)"
    )
    for _ in range(20):
        clients = [
            subprocess.Popen([os.path.realpath("/proc/self/exe"), "-I", "-S", "-c", script, str(tiny.mountpoint)])
            for _ in range(3)
        ]
        looked_up = tiny.live()["lookups"]
        wait_until(lambda looked_up=looked_up: tiny.live()["lookups"] > looked_up + 20, "busy clients")
        for client in clients:
            client.kill()
        for client in clients:
            client.wait(DEADLINE_S)
        assert tiny.command("ping") == "pong"
