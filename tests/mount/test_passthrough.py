"""Sealed files are read by the kernel from their blobs: modes, restarts, eviction under maps, tampered blobs."""

import contextlib
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest

from cachefs.chunk import CHUNK_BYTES
from cachefs.config import MIB
from tests.faults.killing import Killer, keeper_log
from tests.mount.harness import DEADLINE_S, Mounted, alive, mounted, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer
from tests.support.servers import free_ports

pytestmark = needs_fuse

# argv: directory, names and sha256 alternating. Opens, maps, closes, compares; until its standard input ends.
MAPPER = """
import hashlib, mmap, os, select, sys
names = dict(zip(sys.argv[2::2], sys.argv[3::2]))
rounds = 0
while not select.select([0], [], [], 0)[0]:
    for name, wanted in names.items():
        with open(os.path.join(sys.argv[1], name), "rb", buffering=0) as file:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for _ in range(3):
            assert hashlib.sha256(view).hexdigest() == wanted, name
        view.close()
    rounds += 1
print(rounds)
"""


def sha256(data: "bytes | mmap.mmap") -> str:
    return hashlib.sha256(data).hexdigest()


class Stage:
    """A mount with a metrics endpoint and a volume `m`."""

    def __init__(self, mount: Mounted, origin: LyingServer, port: int) -> None:
        self.mount = mount
        self.origin = origin
        self._port = port

    def metric(self, line: str) -> int:
        """One sample, by its name and labels as they are printed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=DEADLINE_S) as answer:
            text = answer.read().decode()
        for found in text.splitlines():
            if found.startswith(line + " "):
                return int(float(found.split()[-1]))
        raise AssertionError(f"no {line} in {text}")

    def opens(self, mode: str) -> int:
        return self.metric(f'cachefs_opens_total{{mode="{mode}"}}')

    def upcalls(self) -> int:
        """READ requests that reached a server."""
        return sum(self.metric(f'cachefs_read_requests_total{{result="{each}"}}') for each in ("hit", "miss", "error"))

    def sealed(self) -> int:
        return int(self.mount.status()["volumes"][0]["objects_sealed"])

    def path(self, name: str) -> Path:
        return self.mount.path() / name

    def fill(self, name: str, data: bytes) -> Path:
        """Put an object, read it through the mount; returns when it is sealed, with no page of it in memory."""
        before = self.sealed()
        self.origin.put("models", f"m/{name}", data)
        path = self.path(name)
        assert path.read_bytes() == data
        wait_for(lambda: self.sealed() > before, f"{name} is sealed")
        drop_pages(path)
        return path

    def evict(self) -> dict[str, Any]:
        found: dict[str, Any] = self.mount.call("evict", source=msgspec.to_builtins(self.mount.volumes[0]))
        return found

    def blob(self) -> Path:
        """The only blob that there is."""
        (found,) = blobs(self.mount)
        return found


def blobs(mount: Mounted) -> list[Path]:
    return [path for path in (mount.state_dir / "blobs").rglob("*") if path.is_file()]


def drop_pages(path: Path) -> None:
    """The kernel forgets the pages of a file that nobody has mapped."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def stage(tmp_path: Path, origin: LyingServer, **options: Any) -> Iterator[Stage]:
    """Skips where the kernel or the file system do not let files be read by the kernel itself."""
    (port,) = free_ports(1)
    source = volume("m", "s3://models/m", origin.endpoint_url)
    with mounted(tmp_path, source, metrics=f"127.0.0.1:{port}", **options) as mount:
        status = mount.status()["volumes"][0]
        if not status["passthrough"] and not options.get("kernel_disable"):
            assert status["mode_reasons"]
            assert os.environ.get("CI") != "true", status["mode_reasons"]
            pytest.skip(f"no passthrough here: {status['mode_reasons']}")
        yield Stage(mount, origin, port)


@pytest.fixture
def data() -> bytes:
    return os.urandom(2 * CHUNK_BYTES + 4097)


def put_and(origin: LyingServer, data: bytes, *names: str) -> None:
    for name in names:
        origin.put("models", f"m/{name}", data)


def test_sealed_file_is_opened_in_passthrough_and_asks_the_server_for_nothing(
    tmp_path: Path, origin: LyingServer, data: bytes
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        path = on.fill("big", data)
        upcalls, opens, cached = on.upcalls(), on.opens("passthrough"), on.opens("cached")
        for _ in range(3):
            assert path.read_bytes() == data
            with path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert sha256(view) == sha256(data)  # the map outlives the descriptor
            view.close()
        assert on.upcalls() == upcalls
        assert on.opens("passthrough") == opens + 6
        assert on.opens("cached") == cached
        status = on.mount.status()["volumes"][0]
        assert (status["passthrough"], status["mode_reasons"]) == (True, [])


def test_file_that_seals_under_cold_handles_is_published_under_a_new_inode(
    tmp_path: Path, origin: LyingServer, data: bytes
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        path = on.path("big")
        with path.open("rb", buffering=0) as cold, path.open("rb", buffering=0) as mapped:
            old_inode = os.fstat(cold.fileno()).st_ino
            view = mmap.mmap(mapped.fileno(), 0, prot=mmap.PROT_READ)
            assert sha256(view) == sha256(data)
            wait_for(lambda: path.stat().st_ino != old_inode, "the sealed file has a new inode")
            upcalls, opens = on.upcalls(), on.opens("passthrough")
            assert path.read_bytes() == data
            assert (on.upcalls(), on.opens("passthrough")) == (upcalls, opens + 1)
            os.posix_fadvise(cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert sha256(cold.readall()) == sha256(data)
            assert sha256(view) == sha256(data)
            view.close()
        assert path.read_bytes() == data


@pytest.mark.parametrize("victim", ["server", "keeper"])
def test_backing_ids_outlive_server_and_keeper(tmp_path: Path, origin: LyingServer, data: bytes, victim: str) -> None:
    other = os.urandom(CHUNK_BYTES)
    put_and(origin, data, "big")
    put_and(origin, other, "other")
    with stage(tmp_path, origin) as on:
        killer = Killer(on.mount)
        path, later = on.fill("big", data), on.fill("other", other)
        with path.open("rb", buffering=0) as held:
            upcalls = on.upcalls()
            for _ in range(2):
                killer.kill(victim)
                assert held.seek(0) == 0
                assert sha256(held.readall()) == sha256(data)
                with path.open("rb", buffering=0) as again:  # through the same backing id, or it would be EIO
                    assert sha256(again.readall()) == sha256(data)
                assert later.read_bytes() == other  # a new id, by the keeper that is there now
            assert on.upcalls() == upcalls
            assert "1 backing files" in keeper_log(on.mount)
        assert path.read_bytes() == data


def test_eviction_never_takes_a_byte_from_readers_that_map_and_close(tmp_path: Path, origin: LyingServer) -> None:
    contents = {f"file-{number}": os.urandom(CHUNK_BYTES + 1000 + number) for number in range(3)}
    for name, content in contents.items():
        put_and(origin, content, name)
    with stage(tmp_path, origin) as on:
        killer = Killer(on.mount)
        arguments = [text for name, content in contents.items() for text in (name, sha256(content))]
        command = [sys.executable, "-S", "-c", MAPPER, os.fspath(on.mount.path()), *arguments]
        readers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        evicted = in_use = 0
        try:
            end = time.monotonic() + 60
            killed = 0
            # Until both have happened, and a server and a keeper were killed in between.
            while (evicted < 3 or in_use < 3 or killed < 2) and time.monotonic() < end:
                report = on.evict()
                evicted += report["evicted_objects"]
                in_use += sum(each["reason"] in ("in use", "open") for each in report["skipped"])
                assert all(reader.poll() is None for reader in readers), [reader.communicate() for reader in readers]
                if evicted >= 1 + killed and killed < 2:
                    killer.kill("turns")
                    killed += 1
            for reader in readers:
                out, err = reader.communicate(b"stop\n", timeout=DEADLINE_S)
                assert reader.returncode == 0, err.decode()
                assert int(out) > 0
        finally:
            for reader in readers:
                reader.kill()
                reader.communicate()
        assert evicted, "nothing was evicted"
        assert in_use, "nothing was refused"


def test_map_keeps_its_blob_from_eviction_after_restarts_of_both(
    tmp_path: Path, origin: LyingServer, data: bytes
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        killer = Killer(on.mount)
        path = on.fill("big", data)
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for victim in ("server", "keeper", "server"):
            killer.kill(victim)
            report = on.evict()
            assert report["evicted_objects"] == 0
            assert report["skipped"][0]["reason"] in ("in use", "open")
            assert sha256(view) == sha256(data)
        view.close()
        wait_for(lambda: on.evict()["evicted_objects"] == 1, "the blob goes once nobody uses it")
        assert blobs(on.mount) == []
        assert path.read_bytes() == data


def flip_a_byte(blob: Path) -> None:
    with blob.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        byte = file.read(1)
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([byte[0] ^ 1]))


def replace_by_wrong_bytes(blob: Path) -> None:
    wrong = blob.with_name("wrong")
    wrong.write_bytes(os.urandom(blob.stat().st_size))
    wrong.rename(blob)


def replace_by_a_copy(blob: Path) -> None:
    copy = blob.with_name("copy")
    shutil.copyfile(blob, copy)
    copy.rename(blob)


TAMPERINGS: list[Callable[[Path], None]] = [
    lambda blob: os.utime(blob),
    lambda blob: os.truncate(blob, CHUNK_BYTES + 100),
    lambda blob: os.truncate(blob, blob.stat().st_size + 4096),
    lambda blob: blob.unlink(),
    flip_a_byte,
    replace_by_wrong_bytes,
    replace_by_a_copy,
]
NAMES = ["touched", "cut", "longer", "deleted", "a flipped byte", "wrong bytes", "another inode"]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=NAMES)
def test_tampered_blob_is_verified_before_the_kernel_gets_it(
    tmp_path: Path, origin: LyingServer, data: bytes, tamper: Callable[[Path], None]
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        path = on.fill("big", data)
        blob = on.blob()
        mode = blob.stat().st_mode
        tamper(blob)
        if blob.exists():
            blob.chmod(mode)
        cached = on.opens("cached")
        drop_pages(path)  # the open that notices it
        with path.open("rb", buffering=0) as file:
            assert sha256(file.readall()) == sha256(data)
        assert on.opens("cached") > cached
        # Verified, or fetched again; in the end it is served by the kernel once more, and right.
        wait_for(lambda: opens_in_passthrough(on, path), "the file opens in passthrough again")
        drop_pages(path)
        upcalls = on.upcalls()
        assert path.read_bytes() == data
        assert on.upcalls() == upcalls


def opens_in_passthrough(on: Stage, path: Path) -> bool:
    before = on.opens("passthrough")
    drop_pages(path)  # or what was dropped from the cache would not be missed
    with path.open("rb", buffering=0) as file:
        while file.read(4 * MIB):
            pass
    return on.opens("passthrough") > before


def test_after_an_unclean_boot_blobs_are_verified_first(tmp_path: Path, origin: LyingServer, data: bytes) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        on.fill("big", data)
        (blob,) = blobs(on.mount)
        crash(on.mount)
        pretend_another_boot(on.mount.state_dir / "index")
        with blob.open("r+b") as file:  # a write that was lost in the power cut, behind an unchanged stat
            before = blob.stat()
            file.write(bytes(4096))
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
        gets = origin.gets()
        on.mount.start()
        path = on.path("big")
        cached = on.opens("cached")
        assert sha256(path.read_bytes()) == sha256(data)
        assert on.opens("cached") > cached
        assert origin.gets() > gets  # what was lost was noticed
        wait_for(lambda: opens_in_passthrough(on, path), "the file opens in passthrough again")
        drop_pages(path)
        assert path.read_bytes() == data


def test_after_a_clean_end_blobs_are_believed(tmp_path: Path, origin: LyingServer, data: bytes) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        on.fill("big", data)
        on.mount.stop()
        pretend_another_boot(on.mount.state_dir / "index")
        on.mount.start()
        opens = on.opens("passthrough")
        assert on.path("big").read_bytes() == data
        assert on.opens("passthrough") == opens + 1


@pytest.mark.parametrize("how", ["kill", "upgrade"])
def test_file_opened_after_a_server_went_during_its_check_is_read_by_the_kernel(
    tmp_path: Path, origin: LyingServer, data: bytes, how: str
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin) as on:
        on.fill("big", data)
        on.mount.stop()
        on.mount.server_module = "tests.mount.held_check_server"
        on.mount.start()
        wait_for((on.mount.state_dir / "checking").exists, "the first server is at its check")
        if how == "kill":
            Killer(on.mount).kill_server()
        else:
            on.mount.call("upgrade", python=sys.executable)
        assert on.path("big").read_bytes() == data  # the next server's check ends after this open has come
        assert (on.opens("passthrough"), on.opens("cached"), on.upcalls()) == (1, 0, 0)
        status = on.mount.status()
        assert (status["volumes"][0]["passthrough"], status["volumes"][0]["mode_reasons"]) == (True, [])
        assert status["server"]["pid"] != on.mount.first_server_pid or how == "kill"
        assert list((on.mount.state_dir / "blobs").glob(".*")) == []


def crash(mount: Mounted) -> None:
    """As a power cut does: keeper and server at once, nothing is unmounted."""
    pids = {mount.keeper_pid, mount.server_pid()}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # or one would start the other again
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)), "both are dead")


def pretend_another_boot(index: Path) -> None:
    environment = lmdb.open(os.fspath(index), max_dbs=32, create=False)
    try:
        meta = environment.open_db(b"meta")
        with environment.begin(meta, write=True) as transaction:
            assert transaction.get(b"boot")
            transaction.put(b"boot", b"a boot before this one")
    finally:
        environment.close()


def test_masked_passthrough_serves_warm_files_from_the_cache(tmp_path: Path, origin: LyingServer, data: bytes) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin, kernel_disable=("passthrough",)) as on:
        status = on.mount.status()["volumes"][0]
        assert not status["passthrough"]
        assert "kernel_disable" in status["mode_reasons"][0]
        path = on.fill("big", data)
        Killer(on.mount).kill_server()
        assert sha256(path.read_bytes()) == sha256(data)
        assert on.opens("passthrough") == 0
        assert origin.gets("m/big") == 3


def test_masked_resend_fails_what_the_dead_server_had_taken_and_nothing_else(
    tmp_path: Path, origin: LyingServer, data: bytes
) -> None:
    put_and(origin, data, "big")
    with stage(tmp_path, origin, kernel_disable=("resend",)) as on:
        origin.lie("hang", key="m/big")
        path = on.path("big")
        code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(len(os.read(fd, 4096)))"
        reader = subprocess.Popen(
            [sys.executable, "-S", "-c", code, os.fspath(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            origin.wait_waiting(1)
            Killer(on.mount).kill_server()
            origin.tell_the_truth()
            out, err = reader.communicate(timeout=DEADLINE_S)
            # An error, or the right bytes where the kernel tried again by itself; in no case a hang.
            assert out == b"4096\n" or b"OSError" in err, err
        finally:
            reader.kill()
            reader.communicate()
        assert sha256(path.read_bytes()) == sha256(data)
        Killer(on.mount).kill_keeper()
        assert sha256(path.read_bytes()) == sha256(data)
