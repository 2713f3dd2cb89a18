"""Reading through a real kernel mount: trees, many readers, mmap, sealed files, changes, restarts."""

import contextlib
import errno
import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from cachefs.chunk import CHUNK_BYTES, MIB
from tests.mount.harness import DEADLINE_S, Mounted, mounted, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer

pytestmark = needs_fuse

# argv: file, reference, seed, "mmap" or "pread". Compares 60 random pieces, prints "ok".
READER = """
import mmap, os, random, sys
path, reference, seed, how = sys.argv[1:]
size = os.stat(path).st_size
generator = random.Random(int(seed))
with open(path, "rb", buffering=0) as file, open(reference, "rb", buffering=0) as other:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if how == "mmap" else None
    for _ in range(60):
        offset = generator.randrange(size)
        length = generator.choice((1, 100, 4096, 131072, 3 << 20))
        got = view[offset:offset + length] if view else os.pread(file.fileno(), length, offset)
        wanted = os.pread(other.fileno(), length, offset)
        assert got == wanted, (offset, length)
print("ok")
"""


def run(*command: str | os.PathLike[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S).stdout


@contextlib.contextmanager
def processes(commands: Sequence[Sequence[str]]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """All at once; whatever still runs at the end is killed."""
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def errno_of(attempt: Callable[[], object]) -> int:
    """What an attempt fails with; 0 when it does not."""
    try:
        attempt()
    except OSError as exc:
        return exc.errno or 0
    return 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def objects_sealed(mount: Mounted) -> int:
    return sum(each["objects_sealed"] for each in mount.status()["volumes"])


def read_upcall_bytes(mount: Mounted) -> int:
    cache = mount.status()["cache"]
    return int(cache["hit_bytes"]) + int(cache["miss_bytes"])


def test_random_tree_is_copied_and_is_all_there_without_the_origin(tmp_path: Path, origin: LyingServer) -> None:
    generator = random.Random(20)
    tree: dict[str, bytes] = {"top.bin": generator.randbytes(CHUNK_BYTES + 17), "empty": b"", "dir/empty file": b""}
    for number in range(60):
        directory = generator.choice(("", "dir/", "dir/sub dir/", "größe/", "größe/深い/", "a/b/c/d/e/"))
        tree[f"{directory}file {number} ä"] = generator.randbytes(generator.choice((0, 1, 4095, 4096, 70_000)))
    for path, data in tree.items():
        origin.put("models", f"m/{path}", data)
    origin.put("models", "m/dir/", b"")  # a "directory marker"
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        run("cp", "-r", mount.path(), tmp_path / "copy")
        copied = {
            os.fspath(path.relative_to(tmp_path / "copy")): path.read_bytes()
            for path in (tmp_path / "copy").rglob("*")
            if path.is_file()
        }
        assert copied.keys() == tree.keys()
        assert all(copied[path] == data for path, data in tree.items())
        found = run("find", mount.path(), "-type", "f", "-printf", "%P:%s:%m\\0").decode().split("\0")
        assert sorted(found[:-1]) == sorted(f"{path}:{len(data)}:444" for path, data in tree.items())
        listing = run("ls", "-R", mount.path()).decode()
        assert "深い" in listing
        assert ".cachefs" not in listing
        origin.stop()
        for path, data in tree.items():
            assert (mount.path() / path).read_bytes() == data


def test_many_readers_cost_one_get_per_chunk(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(5 * CHUNK_BYTES + 333)
    reference = tmp_path / "reference"
    reference.write_bytes(data)
    origin.put("models", "m/big", data)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        path = os.fspath(mount.path() / "big")
        commands = [
            [sys.executable, "-S", "-c", READER, path, os.fspath(reference), str(seed), ("mmap", "pread")[seed % 2]]
            for seed in range(16)
        ]
        with processes(commands) as readers:
            for reader in readers:
                out, err = reader.communicate(timeout=DEADLINE_S)
                assert out == b"ok\n", err.decode()
        assert sha256(Path(path).read_bytes()) == sha256(data)
        assert origin.gets("m/big") == 6


def test_sealed_file_is_read_by_the_kernel_alone(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    origin.put("models", "m/big", data)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        volume_status = mount.status()["volumes"][0]
        if not volume_status["passthrough"]:
            assert volume_status["mode_reasons"]
            pytest.skip(f"no passthrough here: {volume_status['mode_reasons']}")
        path = mount.path() / "big"
        with path.open("rb") as cold, path.open("rb") as other:
            assert sha256(cold.read()) == sha256(data)
            wait_for(lambda: objects_sealed(mount) == 1, "the object is sealed")
            old_inode = os.fstat(cold.fileno()).st_ino
            wait_for(lambda: path.stat().st_ino != old_inode, "the sealed file has an inode of its own")
            before = read_upcall_bytes(mount)
            for _ in range(2):
                with path.open("rb") as warm:
                    view = mmap.mmap(warm.fileno(), 0, prot=mmap.PROT_READ)
                assert sha256(view) == sha256(data)  # the map outlives the descriptor
                view.close()
            assert read_upcall_bytes(mount) == before
            assert sha256(other.read()) == sha256(data)  # the old handle lives on


def test_without_passthrough_a_warm_file_is_right_too(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 5)
    origin.put("models", "m/big", data)
    options = {"kernel_disable": ("passthrough",)}
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url), **options) as mount:
        status = mount.status()["volumes"][0]
        assert not status["passthrough"]
        assert "kernel_disable" in status["mode_reasons"][0]
        for _ in range(2):
            assert sha256((mount.path() / "big").read_bytes()) == sha256(data)
        assert origin.gets("m/big") == 3


def test_second_mount_of_the_same_state_starts_warm(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(CHUNK_BYTES + 99)
    origin.put("models", "m/a", data)
    source = volume("m", "s3://models/m", origin.endpoint_url)
    with mounted(tmp_path, source) as mount:
        assert (mount.path() / "a").read_bytes() == data
    assert origin.gets("m/a") == 2
    with mounted(tmp_path, source) as mount:
        assert (mount.path() / "a").read_bytes() == data
    assert origin.gets("m/a") == 2


def test_ten_thousand_files_in_one_directory(tmp_path: Path, origin: LyingServer) -> None:
    for number in range(10_000):
        origin.put("models", f"m/{number:05}", b"")
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        assert sorted(os.listdir(mount.path())) == [f"{number:05}" for number in range(10_000)]
        lists = origin.lists()
        assert (mount.path() / "04711").stat().st_size == 0
        assert len(list(os.scandir(mount.path()))) == 10_000
        assert origin.lists() == lists


def test_far_end_of_a_huge_object(tmp_path: Path, origin: LyingServer) -> None:
    huge = tmp_path / "huge"
    size = 100 * 1024 * MIB + 7
    with huge.open("wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    origin.put("models", "m/huge", huge)
    with (
        mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount,
        (mount.path() / "huge").open("rb") as file,
    ):
        assert os.fstat(file.fileno()).st_size == size
        file.seek(size - 5)
        assert file.read() == b"\0\0end"
        file.seek(50 * 1024 * MIB)
        assert file.read(10) == bytes(10)


def test_tree_is_read_only(tmp_path: Path, origin: LyingServer) -> None:
    origin.put("models", "m/a", b"bytes")
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url, uid=1234, gid=2345)) as mount:
        path = mount.path() / "a"
        attempts = [
            lambda: path.open("wb"),
            lambda: path.open("r+b"),
            lambda: path.unlink(),
            lambda: path.chmod(0o777),
            lambda: path.rename(path.with_name("b")),
            lambda: (mount.path() / "new").mkdir(),
            lambda: (mount.path() / "link").symlink_to("a"),
            lambda: os.truncate(path, 1),
            lambda: os.setxattr(path, "user.x", b"y"),
        ]
        for attempt in attempts:
            assert errno_of(attempt) == errno.EROFS
        assert errno_of(lambda: os.getxattr(path, "user.x")) in (errno.ENOTSUP, errno.ENODATA)
        assert path.read_bytes() == b"bytes"
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
        with pytest.raises(FileNotFoundError):
            (mount.path() / "nothing").stat()
        with pytest.raises(FileNotFoundError):
            (mount.mountpoint / ".cachefs-self-check").stat()
        assert os.listdir(mount.mountpoint) == ["m"]


def test_object_that_changes_under_an_open_handle_is_never_mixed(tmp_path: Path, origin: LyingServer) -> None:
    old, new = os.urandom(24 * CHUNK_BYTES), os.urandom(24 * CHUNK_BYTES)
    origin.put("models", "m/a", old)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        path = mount.path() / "a"
        with path.open("rb", buffering=0) as handle:
            assert handle.read(4096) == old[:4096]
            origin.put("models", "m/a", new)
            assert errno_of(lambda: os.pread(handle.fileno(), 4096, 23 * CHUNK_BYTES)) == errno.ESTALE
            assert os.pread(handle.fileno(), 4096, 0) == old[:4096]
        assert sha256(path.read_bytes()) == sha256(new)


def test_hung_origin_delays_neither_stat_nor_local_bytes_nor_another_volume(
    tmp_path: Path, origin: LyingServer
) -> None:
    origin.put("hung", "big", os.urandom(4 * CHUNK_BYTES))
    origin.put("hung", "local", b"here")
    origin.put("fine", "file", b"fine bytes")
    origin.lie("hang", key="big")
    with mounted(
        tmp_path,
        volume("hung", "s3://hung", origin.endpoint_url),
        volume("fine", "s3://fine", origin.endpoint_url),
    ) as mount:
        assert (mount.path("hung") / "local").read_bytes() == b"here"
        big = os.fspath(mount.path("hung") / "big")
        code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.pread(fd, 4096, int(sys.argv[2])); print(1)"
        commands = [[sys.executable, "-S", "-c", code, big, str(number * 65536)] for number in range(40)]
        with processes(commands) as readers:
            origin.wait_waiting(1)
            stat = run(sys.executable, "-S", "-c", "import os, sys; print(os.stat(sys.argv[1]).st_size)", big)
            assert int(stat) == 4 * CHUNK_BYTES
            assert run("cat", mount.path("hung") / "local") == b"here"
            assert run("cat", mount.path("fine") / "file") == b"fine bytes"
            assert all(reader.poll() is None for reader in readers)
            origin.tell_the_truth()
            for reader in readers:
                out, err = reader.communicate(timeout=DEADLINE_S)
                assert out == b"1\n", err.decode()


def test_reader_sees_only_a_pause_when_the_server_is_killed(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(12 * CHUNK_BYTES + 1)
    origin.put("models", "m/big", data)
    origin.latency_s = 0.05
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        digest = hashlib.sha256()
        pids = {mount.first_server_pid}
        with (mount.path() / "big").open("rb", buffering=0) as file:
            for piece in range(13):
                digest.update(file.read(CHUNK_BYTES))
                if piece in (2, 6, 9):
                    pid = mount.server_pid()
                    pids.add(pid)
                    os.kill(pid, signal.SIGKILL)
        assert digest.hexdigest() == sha256(data)
        assert len(pids) == 3
        assert mount.server_pid() not in pids
        assert sha256((mount.path() / "big").read_bytes()) == sha256(data)


def test_passthrough_handles_go_on_when_the_server_is_killed(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(CHUNK_BYTES + 3)
    origin.put("models", "m/big", data)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        path = mount.path() / "big"
        assert path.read_bytes() == data
        wait_for(lambda: objects_sealed(mount) == 1, "the object is sealed")
        with path.open("rb", buffering=0) as held:
            for _ in range(3):
                pid = mount.server_pid()
                os.kill(pid, signal.SIGKILL)
                assert os.pread(held.fileno(), len(data), 0) == data
                with path.open("rb", buffering=0) as again:  # the same backing id, or EIO
                    assert again.readall() == data
                wait_for(lambda pid=pid: mount.server_pid() != pid, "the next server serves")
        with path.open("rb") as last:
            assert last.read() == data


def test_one_volume_at_the_fuse_root(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(100_000)
    origin.put("models", "m/sub/a", data)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url), as_root=False) as mount:
        assert os.listdir(mount.mountpoint) == ["sub"]
        for _ in range(2):
            assert (mount.mountpoint / "sub" / "a").read_bytes() == data


def test_mapped_file_is_not_evicted_and_an_idle_one_is_also_after_a_restart(
    tmp_path: Path, origin: LyingServer
) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    origin.put("models", "m/big", data)
    source = volume("m", "s3://models/m", origin.endpoint_url)
    with mounted(tmp_path, source) as mount:
        path = mount.path() / "big"

        def evicted() -> int:
            return int(mount.call("evict", source=msgspec.to_builtins(source))["evicted_objects"])

        for killed in (False, True):
            assert path.read_bytes() == data
            wait_for(lambda: objects_sealed(mount) == 1, "the object is sealed")
            with path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            if killed:
                pid = mount.server_pid()
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: mount.server_pid() != pid, "the next server serves")
            assert evicted() == 0  # closed long ago, but mapped
            assert sha256(view) == sha256(data)
            view.close()
            # After a restart the backing id goes when the kernel has forgotten the inode.
            wait_for(lambda: evicted() == 1, "the idle object is evicted")
        assert path.read_bytes() == data
        assert origin.gets("m/big") == 6
