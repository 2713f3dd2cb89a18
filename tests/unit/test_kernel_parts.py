"""mountinfo, messages with descriptors, trusted programs, how processes end, mount points that cannot be used."""

import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import pytest

from cachefs.config import MountConfig, ServerConfig, VolumeConfig
from cachefs.errors import UsageError
from cachefs.kernel.backing import BackingRefused, check_backing, trusted_program
from cachefs.kernel.mounts import check_mountpoint, find_mount, parse_mountinfo, probe, read_mounts, recover_dead_mount
from cachefs.kernel.process import how_it_ended, peer_credentials, spawn
from cachefs.kernel.session import (
    Backing,
    Message,
    Session,
    close_all,
    pack_session,
    pack_volumes,
    packet_pair,
    receive_message,
    send_message,
    unpack_session,
    unpack_volumes,
)

MOUNTINFO = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
36 22 0:39 / /mnt/a\040b ro,nosuid,nodev master:3 propagate_from:2 - fuse.cachefs cachefs ro,user_id=0
37 22 0:39 /v /mnt/back\134slash ro - fuse.cachefs cachefs ro,user_id=0
38 22 0:40 / /mnt/x rw -  src rw"""


def session() -> Session:
    server = ServerConfig(state_dir=Path("/s"), runtime_dir=Path("/r"), cache_bytes_max=1)
    config = MountConfig(
        server=server,
        volumes=(VolumeConfig(name="v", source="s3://b/p"),),
        mountpoint=Path("/m m"),
        as_root=True,
        session="x",
    )
    backings = tuple(Backing(number, number + 1, 2, 3, "ff" * 20) for number in range(1, 3000))
    return Session(4, b"\x00\xffinit", True, 7, backings, config, 99, ledger_fd=5, device="0:39", python="/p")


def test_mountinfo_is_parsed_with_optional_fields_and_escapes() -> None:
    mounts = parse_mountinfo(MOUNTINFO.replace(" -  src", " - none src"))
    assert [mount.mountpoint for mount in mounts] == ["/", "/mnt/a b", "/mnt/back\\slash", "/mnt/x"]
    assert (mounts[1].mount_id, mounts[1].parent_id, mounts[1].major_minor) == (36, 22, "0:39")
    assert (mounts[2].root, mounts[2].fstype, mounts[2].source) == ("/v", "fuse.cachefs", "cachefs")
    assert mounts[1].options == ("ro", "nosuid", "nodev", "user_id=0")


def test_this_machines_mounts_are_read() -> None:
    assert any(mount.mountpoint == "/" for mount in read_mounts())
    assert find_mount("/proc") is not None
    assert find_mount("/no such mount") is None


def test_session_of_any_size_survives_the_wire() -> None:
    before = session()
    memory_fd = pack_session(before)
    ours, theirs = packet_pair()
    with ours, theirs:
        send_message(ours, Message("session"), [memory_fd])
        os.close(memory_fd)
        packet = receive_message(theirs)
        assert packet is not None
        message, (memory_fd,) = packet
        assert message.kind == "session"
        assert not os.get_inheritable(memory_fd)
        assert unpack_session(memory_fd, fuse_fd=4, ledger_fd=5) == before
        os.close(memory_fd)


def test_volumes_survive_the_wire() -> None:
    volumes = session().config.volumes
    memory_fd = pack_volumes(volumes)
    assert unpack_volumes(memory_fd) == volumes
    os.close(memory_fd)


def test_nonsense_is_refused_and_its_descriptors_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = packet_pair()
    for data, count in ((b"{", 2), (b'{"kind": "rule"}', 1), (b'{"kind": "ready"}', 20), (b" " * 70000, 0)):
        socket.send_fds(ours, [data], [0] * count)
        with pytest.raises(msgspec.DecodeError):
            receive_message(theirs)
    ours.close()
    assert receive_message(theirs) is None
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_peer_is_known_by_the_kernels_word() -> None:
    ours, theirs = packet_pair()
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid(), os.getgid())


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("import sys; sys.exit(3)", 3, "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "killed by SIGKILL"),
    ],
)
def test_how_a_child_ended_is_told(script: str, status: int, words: str) -> None:
    ours, theirs = packet_pair()
    with ours, theirs:
        pidfd = os.pidfd_open(spawn([sys.executable, "-c", script], link=theirs.fileno(), stderr=2))
        assert how_it_ended(pidfd) == (status, words)
        assert how_it_ended(pidfd)[0] is None  # no longer our child
        os.close(pidfd)


def test_spawned_process_finds_its_link() -> None:
    ours, theirs = packet_pair()
    script = "import os; os.write(3, '|'.join(os.readlink(f'/proc/self/fd/{n}') for n in range(4)).encode())"
    with ours, theirs:
        pidfd = os.pidfd_open(spawn([sys.executable, "-I", "-S", "-c", script], link=theirs.fileno(), stderr=2))
        how_it_ended(pidfd)
        os.close(pidfd)
        stdin, stdout, stderr, link = ours.recv(1000).decode().split("|")
        assert stdin == "/dev/null"
        assert stdout == stderr
        assert link.startswith("socket:")


def test_own_regular_file_below_the_directory_may_be_a_backing_file(tmp_path: Path) -> None:
    directory = os.path.realpath(tmp_path)
    device = os.stat(directory).st_dev
    blob = tmp_path / "blob"
    blob.write_bytes(b"x")
    descriptor = os.open(blob, os.O_RDONLY)
    assert check_backing(descriptor, directory=directory, device=device, uid=os.getuid()).st_size == 1
    for wrong in (
        {"directory": directory + "/blo"},
        {"directory": "/proc"},
        {"device": device + 1},
        {"uid": os.getuid() + 1},
    ):
        arguments = {"directory": directory, "device": device, "uid": os.getuid(), **wrong}
        with pytest.raises(BackingRefused):
            check_backing(descriptor, **arguments)  # type: ignore[arg-type]
    close_all([descriptor])


def test_program_is_trusted_only_when_nobody_else_can_change_its_path(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert trusted_program(str(program), os.getuid())
    link = tmp_path / "link"
    link.symlink_to(program)
    assert trusted_program(str(link), os.getuid())
    assert not trusted_program("bin/python", os.getuid())
    assert not trusted_program(str(tmp_path), os.getuid())
    assert not trusted_program(str(program), os.getuid() + 1) or os.getuid() == 0
    program.parent.chmod(0o777)
    assert not trusted_program(str(program), os.getuid())
    assert not trusted_program(str(link), os.getuid())


def test_mount_points_that_cannot_be_used_are_one_clear_line(tmp_path: Path) -> None:
    check_mountpoint(tmp_path)
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "not empty"),
        (tmp_path / "file", "not a directory"),
        (tmp_path / "no", "does not exist"),
        (Path("/proc"), "is busy: a proc file system"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            check_mountpoint(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_dead_mount_of_ours_is_left_alone(tmp_path: Path) -> None:
    assert recover_dead_mount(tmp_path) == []
    assert recover_dead_mount("/proc") == []
    assert probe("/proc") == "alive"
