"""Readers of a real mount see nothing but pauses when server and keeper are killed with SIGKILL.

The long form (`make soak`) is TEST_KILLS=20 TEST_KILL_BYTES=2GiB TEST_KILL_CYCLES=200, or less when set by hand;
TEST_FIGURES names a directory for the figures.
"""

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from cachefs.chunk import CHUNK_BYTES, MIB
from cachefs.config import GIB
from cachefs.settings import parse_size
from tests.faults.killing import (
    LONG,
    Board,
    Killer,
    Readers,
    assert_state_is_whole,
    dead_index_readers,
    descriptors,
    keeper_log,
    make_object,
    notifiers,
    pauses_s,
    report,
    tagged,
    wait_while,
)
from tests.mount.harness import Mounted, mounted, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer

pytestmark = [needs_fuse, pytest.mark.timeout(3600 if LONG else 180), *([pytest.mark.soak] if LONG else [])]

KILLS = int(os.environ.get("TEST_KILLS", "20" if LONG else "3"))
OBJECT_BYTES = parse_size(os.environ.get("TEST_KILL_BYTES", "2GiB" if LONG else "48MiB"))
CYCLES = int(os.environ.get("TEST_KILL_CYCLES", "200" if LONG else "6"))
KILLS_PER_OBJECT = 20 if LONG else 1
OBJECTS = -(-KILLS // KILLS_PER_OBJECT)
PAUSE_MEDIAN_S_MAX = 1.0 if LONG else 15.0
"""The short form runs beside everything else that a CI machine does."""

BUCKET = "models"


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tagged(monkeypatch):
        yield


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Path, str]]]:
    """Files of random bytes and their sha256, for all tests."""
    directory = tmp_path_factory.mktemp("objects")
    paths = [directory / f"object-{number}" for number in range(OBJECTS)]
    yield [(path, make_object(path, 100 + number, OBJECT_BYTES)) for number, path in enumerate(paths)]
    shutil.rmtree(directory)


@contextlib.contextmanager
def serving(tmp_path: Path, origin: LyingServer, files: list[Path], **options: object) -> Iterator[Mounted]:
    """A cold mount of these files."""
    for file in files:
        origin.put(BUCKET, f"m/{file.name}", file)
    options = {"cache_bytes_max": max(4 * GIB, 2 * len(files) * OBJECT_BYTES), **options}
    with mounted(tmp_path, volume("m", f"s3://{BUCKET}/m", origin.endpoint_url), **options) as mount:
        yield mount


def kill_while_reading(
    mount: Mounted, files: list[Path], victim: str, *, how: str = "read", count: int = 1, seed: int = 1
) -> tuple[Killer, list[dict[str, list[str]]]]:
    """Kill at seeded random places of each object while `count` processes read all of them; what they say."""
    generator = random.Random(seed)
    killer = Killer(mount)
    board = Board(mount.directory / "board")
    paths = [mount.path() / file.name for file in files]
    with Readers(paths, board, how=how, count=count) as readers:
        for number, file in enumerate(files):
            size = file.stat().st_size
            for place in sorted(generator.uniform(0, 0.8) for _ in range(KILLS_PER_OBJECT)):
                wait_while(lambda: board.progress_bytes() < (number + place) * size, readers)  # noqa: B023
                time.sleep(generator.uniform(0, 0.02))
                killer.kill(victim)
            board.done_with_object()
        return killer, readers.results(300.0)


def judge(name: str, killer: Killer, results: list[dict[str, list[str]]], wanted: list[str], **more: object) -> None:
    pauses = pauses_s(killer.kills, results)
    report(name, killer.kills, pauses, bytes=OBJECT_BYTES, **more)
    for result in results:
        assert result["sums"] == wanted
    assert statistics.median(pauses) < PAUSE_MEDIAN_S_MAX


@pytest.mark.parametrize("victim", ["server", "keeper", "turns"])
def test_sequential_reader_gets_every_byte(
    tmp_path: Path, origin: LyingServer, objects: list[tuple[Path, str]], victim: str
) -> None:
    files, sums = [file for file, _ in objects], [digest for _, digest in objects]
    with serving(tmp_path, origin, files) as mount:
        killer, results = kill_while_reading(mount, files, victim, seed=11)
        judge(f"sequential-{victim}", killer, results, sums)
        assert_state_is_whole(mount)


def test_eight_readers_get_every_byte(tmp_path: Path, origin: LyingServer, objects: list[tuple[Path, str]]) -> None:
    files, sums = [file for file, _ in objects], [digest for _, digest in objects]
    with serving(tmp_path, origin, files) as mount:
        killer, results = kill_while_reading(mount, files, "turns", count=8, seed=12)
        judge("eight-readers-turns", killer, results, sums)


@pytest.mark.parametrize("how", ["read", "mmap"])
def test_reader_of_a_slow_store_gets_every_byte(
    tmp_path: Path, origin: LyingServer, objects: list[tuple[Path, str]], how: str
) -> None:
    files, sums = [file for file, _ in objects], [digest for _, digest in objects]
    origin.latency_s = 0.3
    with serving(tmp_path, origin, files, prefetch_bytes=2 * CHUNK_BYTES) as mount:
        killer, results = kill_while_reading(mount, files, "server", how=how, seed=13)
        judge(f"slow-store-{how}-server", killer, results, sums)


def test_safetensors_load_through_mmap_gets_every_tensor(tmp_path: Path, origin: LyingServer) -> None:
    generator = numpy.random.default_rng(14)
    rows = 2 * 1024
    wanted: list[str] = []
    files = []
    for number in range(OBJECTS):
        layers = OBJECT_BYTES // (2 * MIB)
        tensors = {f"layer.{layer:04}": generator.bytes(rows * 1024) for layer in range(layers)}
        arrays = {name: numpy.frombuffer(data, dtype=numpy.uint8).reshape(rows, 1024) for name, data in tensors.items()}
        files.append(tmp_path / f"model-{number}.safetensors")
        save_file(arrays, files[-1])
        wanted.append(_sha256_of(tensors[name] for name in sorted(tensors)))
    with serving(tmp_path, origin, files) as mount:
        killer, results = kill_while_reading(mount, files, "turns", how="safetensors", seed=14)
        judge("safetensors-turns", killer, results, wanted)


def _sha256_of(parts: Iterator[bytes]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_fio_verifies_every_block(tmp_path: Path, origin: LyingServer, engine: str) -> None:
    if shutil.which("fio") is None:
        assert os.environ.get("CI") != "true", "CI without fio"
        pytest.skip("needs fio (apt-get install fio)")
    size = min(OBJECT_BYTES, GIB)
    common = ["fio", "--name=v", f"--size={size}", "--bs=128k", "--verify=crc32c", "--verify_fatal=1"]
    file = tmp_path / "verified"
    write = [*common, f"--filename={file}", "--rw=write", "--do_verify=0"]
    subprocess.run(write, check=True, capture_output=True, cwd=tmp_path)
    origin.latency_s = 0.1
    with serving(tmp_path, origin, [file], prefetch_bytes=2 * CHUNK_BYTES) as mount:
        killer = Killer(mount)
        command = [*common, f"--filename={mount.path() / file.name}", "--rw=read", "--readonly", f"--ioengine={engine}"]
        fio = subprocess.Popen(
            [*command, "--output-format=json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        try:
            generator = random.Random(15)
            for place in sorted(generator.uniform(0.1, 0.8) for _ in range(max(2, KILLS))):
                wanted = int(place * size / CHUNK_BYTES)
                wait_for(lambda: origin.gets() >= wanted or fio.poll() is not None, "fio gets on", 120)  # noqa: B023
                killer.kill("server")
            out, _ = fio.communicate(timeout=300)
        finally:
            fio.kill()
            fio.communicate()
        assert fio.returncode == 0, out.decode()
        job = json.loads(out[out.index(b"{") :])["jobs"][0]
        assert (job["error"], job["read"]["io_bytes"]) == (0, size)
        report(f"fio-{engine}-server", killer.kills, [], longest_read_s=round(job["read"]["lat_ns"]["max"] / 1e9, 3))


def test_kill_between_the_write_of_a_chunk_and_its_record(
    tmp_path: Path, origin: LyingServer, objects: list[tuple[Path, str]]
) -> None:
    files, sums = [file for file, _ in objects], [digest for _, digest in objects]
    origin.latency_s = 0.05
    with serving(tmp_path, origin, files, prefetch_bytes=2 * CHUNK_BYTES) as mount:
        killer = Killer(mount)
        board = Board(tmp_path / "board")
        with Readers([mount.path() / file.name for file in files], board) as readers:
            generator = random.Random(16)
            for number in range(KILLS):
                pid = int(mount.call("ping")["pid"])
                before = blob_blocks(mount)
                skip = generator.randrange(2) * CHUNK_BYTES // 512
                # The very next moment in which a blob has grown: its data is (half) written, its record is not.
                wait_while(
                    lambda before=before, skip=skip: (
                        blob_blocks(mount) <= before + skip and board.progress_bytes() < len(files) * OBJECT_BYTES
                    ),
                    readers,
                )
                killer.kill_server(pid)
                if (number + 1) % KILLS_PER_OBJECT == 0:
                    board.done_with_object()
            board.done_with_object()
            results = readers.results(300.0)
        judge("in-chunk-write-server", killer, results, sums)
        assert_state_is_whole(mount)
        for file, digest in objects:
            assert _sha256_of(iter([(mount.path() / file.name).read_bytes()])) == digest


def blob_blocks(mount: Mounted) -> int:
    """What all blobs take on disk, in blocks of 512 bytes."""
    total = 0
    for directory, _, names in os.walk(mount.state_dir / "blobs"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(directory, name)).st_blocks
    return total


def test_cycles_of_kills_leak_nothing(tmp_path: Path, origin: LyingServer) -> None:
    sizes = [4096, CHUNK_BYTES, 2 * CHUNK_BYTES + 5]
    files = [tmp_path / f"file-{number}" for number in range(len(sizes))]
    sums = [make_object(file, 200 + number, size) for number, (file, size) in enumerate(zip(files, sizes, strict=True))]
    with serving(tmp_path, origin, files) as mount, contextlib.ExitStack() as held:
        killer = Killer(mount)

        def open_all() -> None:
            for file, digest in zip(files, sums, strict=True):
                data = (mount.path() / file.name).read_bytes()
                assert _sha256_of(iter([data])) == digest

        open_all()
        wait_for(lambda: mount.status()["volumes"][0]["objects_sealed"] == len(files), "all files are sealed")
        warm = held.enter_context((mount.path() / files[2].name).open("rb", buffering=0))
        killer.kill("server")
        killer.kill("keeper")
        open_all()
        before = counted(mount)
        started_s = time.monotonic()
        for cycle in range(CYCLES):
            killer.kill("turns")
            open_all()
            if cycle % 10 == 0:
                mount.call("evict", source={"name": "m", "source": f"s3://{BUCKET}/m/{files[0].name}"})
        seconds = time.monotonic() - started_s
        assert _sha256_of(iter([os.pread(warm.fileno(), sizes[2], 0)])) == sums[2]
        wait_for(lambda: no_more_than(counted(mount), before), f"descriptors {counted(mount)} are {before} again")
        assert dead_index_readers(mount) == []
        assert backing_files(mount) <= len(files)
        assert_state_is_whole(mount)
        report("cycles-turns", killer.kills, [], cycles=CYCLES, seconds=round(seconds, 1), descriptors=counted(mount))


def counted(mount: Mounted) -> dict[str, int]:
    """Descriptors of keeper and server, without those of the notifier processes."""
    answer = mount.call("ping")
    server, keeper = int(answer["pid"]), int(answer["keeper_pid"])
    return {"server": len(descriptors(server)) - 2 * notifiers(server), "keeper": len(descriptors(keeper))}


def no_more_than(now: dict[str, int], before: dict[str, int], slack: int = 2) -> bool:
    """Within what comes and goes: a thread's blob, one request on the control socket."""
    return all(now[name] <= before[name] + slack for name in before)


def backing_files(mount: Mounted) -> int:
    """How many backing files the newest server was told of."""
    lines = [line for line in keeper_log(mount).splitlines() if "backing files)" in line]
    return int(lines[-1].rpartition(", ")[2].split()[0])


# argv: directory, how many files, names of which are numbers and whose contents are their names. Until stdin ends.
WALKER = """
import os, random, select, sys
directory, count = sys.argv[1], int(sys.argv[2])
rounds = 0
while not select.select([0], [], [], 0)[0]:
    assert len(os.listdir(directory)) == count
    for _ in range(50):
        name = f"{random.randrange(count):04}"
        path = os.path.join(directory, name)
        assert os.stat(path).st_size == 4
        with open(path, "rb", buffering=0) as file:
            assert file.read(100) == name.encode(), name
    rounds += 1
print(rounds)
"""


def test_walkers_of_a_tree_see_every_file_and_leave_none_open(tmp_path: Path, origin: LyingServer) -> None:
    count = 200
    for number in range(count):
        origin.put(BUCKET, f"m/d/{number:04}", f"{number:04}".encode())
    with serving(tmp_path, origin, []) as mount:
        killer = Killer(mount)
        command = [sys.executable, "-S", "-c", WALKER, os.fspath(mount.path() / "d"), str(count)]
        walkers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(4)
        ]
        generator = random.Random(17)
        try:
            for _ in range(2 * KILLS):
                time.sleep(generator.uniform(0, 0.2))
                killer.kill("turns" if generator.random() < 0.3 else "server")
                assert all(walker.poll() is None for walker in walkers), [walker.communicate() for walker in walkers]
            for walker in walkers:
                out, err = walker.communicate(b"stop\n", timeout=120)
                assert walker.returncode == 0, err.decode()
                assert int(out) > 0
        finally:
            for walker in walkers:
                walker.kill()
                walker.communicate()

        def kept() -> list[str]:
            report = mount.call("evict", source={"name": "m", "source": f"s3://{BUCKET}/m"})
            return [f"{each['path']}: {each['reason']}" for each in report["skipped"]]

        wait_for(lambda: kept() == [], f"nothing counts as open: {kept()}")
