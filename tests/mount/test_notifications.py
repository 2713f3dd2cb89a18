"""Names that the kernel must forget, while LOOKUPs in the same directory wait: a killed server must not take the
mount with it."""

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.chunk import CHUNK_BYTES
from tests.faults.killing import Killer, tagged
from tests.mount.harness import DEADLINE_S, Mounted, mounted, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer

pytestmark = needs_fuse

BOUND_S = 30.0
"""A dead server is replaced, and the rest of the mount goes on, well within this on any machine."""

STAT = "import os, sys; print(os.stat(sys.argv[1]).st_size)"
READ_AT = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(len(os.pread(fd, 4096, int(sys.argv[2]))))"


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notifier processes that waited in the kernel included."""
    with tagged(monkeypatch):
        yield


def python(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def ended(*processes: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def answers(path: Path) -> None:
    """Another directory of the mount answers: a stat and a read, within a bound."""
    start_s = time.monotonic()
    for code, arguments in ((STAT, ()), (READ_AT, (0,))):
        process = python(code, path, *arguments)
        with ended(process):
            out, err = process.communicate(timeout=BOUND_S)
            assert int(out) == 10, err
    assert time.monotonic() - start_s < BOUND_S


def waiting_notifiers(server: int) -> int:
    """Notifier processes of a server that wait in the kernel where no signal reaches them."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                is_notifier = b"notify_worker.py" in (entry / "cmdline").read_bytes()
                found += is_notifier and state == "D" and int(parent) == server
    return found


def test_killed_server_that_waits_to_invalidate_a_name_is_replaced(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    origin.put("models", "m/d/big", data)
    origin.put("models", "m/e/file", b"0123456789")
    mount = Mounted(tmp_path, [volume("m", "s3://models/m", origin.endpoint_url)])
    mount.server_module = "tests.faults.hanging_daemon"
    with mount:
        if not mount.status()["volumes"][0]["passthrough"]:
            pytest.skip("no passthrough here, so no file gets a new inode when it is sealed")
        killer = Killer(mount)
        path = mount.path() / "d" / "big"
        answers(mount.path() / "e" / "file")
        switch = mount.state_dir / "hang"
        switch.touch()
        with path.open("rb", buffering=0) as cold:
            old_inode = os.fstat(cold.fileno()).st_ino
            waiter = python(STAT, path.with_name("hang"))
            with ended(waiter):
                try:
                    wait_for((mount.state_dir / "waiting").exists, "a LOOKUP waits in the directory")
                    # The last byte seals the file, which gets a new inode: its old name must go, and cannot.
                    assert cold.read(CHUNK_BYTES) + cold.read(2 * CHUNK_BYTES) == data
                    pid = mount.server_pid()
                    wait_for(lambda: waiting_notifiers(pid) > 0, "a notification waits for the LOOKUP")
                    answers(mount.path() / "e" / "file")
                    start_s = time.monotonic()
                    killer.kill_server(pid)
                    assert time.monotonic() - start_s < BOUND_S
                    answers(mount.path() / "e" / "file")
                    assert waiter.poll() is None
                finally:
                    switch.unlink()
                _, err = waiter.communicate(timeout=DEADLINE_S)
                assert b"FileNotFoundError" in err
            cold.seek(0)
            assert cold.readall() == data
            wait_for(lambda: fresh_inode(path) != old_inode, "the sealed file shows under its new inode")
        assert path.read_bytes() == data


def fresh_inode(path: Path) -> int:
    """Of an open: one that is cached though the file is sealed has the server publish it anew."""
    with path.open("rb") as file:
        os.fstat(file.fileno())
    return path.stat().st_ino


def test_killed_server_whose_refresh_hangs_in_a_list_is_replaced(tmp_path: Path, origin: LyingServer) -> None:
    old, new = os.urandom(24 * CHUNK_BYTES), os.urandom(24 * CHUNK_BYTES)
    origin.put("models", "m/d/a", old)
    origin.put("models", "m/d/b", b"0123456789")
    origin.put("models", "m/d/sub/c", b"0123456789")
    origin.put("models", "m/e/file", b"0123456789")
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        killer = Killer(mount)
        path = mount.path() / "d" / "a"
        answers(mount.path() / "e" / "file")
        with path.open("rb", buffering=0) as handle:
            assert handle.read(4096) == old[:4096]
            origin.put("models", "m/d/a", new)
            origin.lie("hang", operation="LIST")
            reader = python(READ_AT, path, 23 * CHUNK_BYTES)  # meets the change: the directory is listed again
            waiter = python(STAT, path.parent / "sub" / "c")  # a directory that was never listed
            with ended(reader, waiter):
                origin.wait_waiting(2)
                answers(path.with_name("b"))
                pid = mount.server_pid()
                start_s = time.monotonic()
                killer.kill_server(pid)
                assert time.monotonic() - start_s < BOUND_S
                answers(mount.path() / "e" / "file")
                answers(path.with_name("b"))
                assert waiter.poll() is None
                origin.tell_the_truth()
                out, err = waiter.communicate(timeout=DEADLINE_S)
                assert int(out) == 10, err
                out, err = reader.communicate(timeout=DEADLINE_S)
                assert f"[Errno {errno.ESTALE}]".encode() in err or out == b"4096\n", err
            with pytest.raises(OSError, match="Stale"):
                os.pread(handle.fileno(), 4096, 22 * CHUNK_BYTES)
            assert os.pread(handle.fileno(), 4096, 0) == old[:4096]
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(new).digest()
