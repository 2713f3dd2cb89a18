"""kill -9 at every step of fills and evictions: no committed chunk is lost, no byte is wrong, nothing is left over."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachefs import chunk
from cachefs.errors import Offline
from tests.faults.cache_crash_child import CHUNK, PATHS, crash_store
from tests.support.caches import opened_cache, run

ROOT = Path(__file__).resolve().parents[2]
STEPS = {
    "fill:fetched": 12,
    "tier:half": 12,
    "fill:written": 12,
    "commit:synced": 2,
    "commit:recorded": 2,
    "evict:begun": 3,
    "evict:recorded": 3,
    "evict:unlinked": 3,
}
"""Each step, and how often the child surely comes by."""


@pytest.fixture(autouse=True)
def _chunks_of_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


def start_child(state: Path, step: str, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.cache_crash_child", os.fspath(state), step, str(count)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.fspath(ROOT)})


def said(state: Path) -> tuple[set[tuple[str, int]], set[str]]:
    """Chunks that were kept, objects whose eviction began."""
    kept: set[tuple[str, int]] = set()
    evicted: set[str] = set()
    file = state / "said"
    for line in file.read_text().splitlines() if file.exists() else []:
        words = line.split()
        if words[0] == "kept":
            kept.add((words[1], int(words[2])))
        elif words[0] == "evict":
            evicted.add(words[1])
    return kept, evicted


def check_after_the_crash(state: Path) -> None:
    store = crash_store()
    kept, evicted = said(state)

    async def offline() -> None:
        async with opened_cache(state, drain=False, offline=True) as cache:
            cache.check_invariants()
            for path, index in kept:
                assert path in evicted or cache.is_local(store.id_of(path), index), f"chunk {index} of {path} was lost"
            known = {record.object.key.hex() for record in cache.objects()}
            left = {file.name for file in (state / "blobs").glob("*/*")}
            assert left == known
            for path in PATHS:
                object_id = store.id_of(path)
                for index in range(chunk.chunk_count(object_id.size)):
                    if cache.is_local(object_id, index):
                        data = bytes(await cache.read(store, object_id, index * CHUNK, CHUNK))
                        assert data == store.objects[path][0][index * CHUNK :][:CHUNK]
                    else:
                        with pytest.raises(Offline):
                            await cache.read(store, object_id, index * CHUNK, CHUNK)

    async def online() -> None:
        async with opened_cache(state) as cache:
            for path in PATHS:
                assert bytes(await cache.read(store, store.id_of(path), 0, 10 * CHUNK)) == store.objects[path][0]
            cache.check_invariants()

    run(offline)
    run(online)
    run(offline)


@pytest.mark.parametrize(("step", "count"), [(step, n) for step, last in STEPS.items() for n in sorted({1, 2, last})])
def test_killed_at_a_step_it_loses_nothing_that_was_committed(tmp_path: Path, step: str, count: int) -> None:
    child = start_child(tmp_path, step, count)
    try:
        assert child.wait(60) == -signal.SIGKILL, "the child never came to this step"
    finally:
        child.kill()
        child.wait()
    check_after_the_crash(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_loses_nothing_that_was_committed(tmp_path: Path, seed: int) -> None:
    """The seed chooses how long after the state directory came to life the child is killed."""
    delay_s = random.Random(seed).uniform(0.0, 0.08)
    child = start_child(tmp_path, "never", 1)
    try:
        deadline_s = time.monotonic() + 60
        while not (tmp_path / "said").exists() and child.poll() is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        time.sleep(delay_s)  # the point of the test is a random moment, nothing waits for it
    finally:
        child.kill()
        child.wait()
    check_after_the_crash(tmp_path)


def test_without_a_crash_the_child_does_all_its_work(tmp_path: Path) -> None:
    child = start_child(tmp_path, "never", 1)
    try:
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
    kept, evicted = said(tmp_path)
    assert len(kept) == 12
    assert evicted == {"a", "b", "c"}
    check_after_the_crash(tmp_path)
