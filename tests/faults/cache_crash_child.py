"""Run by test_cache_crash.py: fills and evicts, says what it has done, and kills itself at a named step.

    python -m tests.faults.cache_crash_child STATE STEP COUNT

STEP is a step of ChunkCache's hook or `tier:half` (half of a chunk is written); COUNT its occurrence, from 1.
STATE/said gets a line `kept PATH INDEX` after each ensure, `evict PATH` before each eviction, `end` at the end.
"""

import os
import signal
import sys
from pathlib import Path

import trio

from cachefs import chunk
from cachefs.tier import BlobStat
from cachefs.tier.local import LocalTier
from tests.support.caches import content, opened_cache
from tests.support.memory_store import MemoryStore

CHUNK = 64 * 1024
PATHS = ("a", "b", "c", "d")
CHUNKS = 3
CAPACITY = 1000 * CHUNK


def crash_store() -> MemoryStore:
    """The same in parent and child, versions included. The last chunk is short and not a multiple of a block."""
    return MemoryStore({path: content(CHUNKS * CHUNK - 777, seed) for seed, path in enumerate(PATHS)})


class Killer:
    def __init__(self, step: str, count: int) -> None:
        self._step = step
        self._left = count

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class HalfTier(LocalTier):
    """A tier that passes `tier:half` between the halves of each write."""

    killer: Killer

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        half = len(data) // 2
        super().write(name, size, offset, data[:half], create=create)
        self.killer("tier:half")
        return super().write(name, size, offset, data, create=create)


async def work(state: Path, killer: Killer) -> None:
    store = crash_store()
    said = os.open(state / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tier = HalfTier(state / "blobs", capacity_bytes=CAPACITY, free_fraction_min=0.0)
    tier.killer = killer

    def say(line: str) -> None:
        os.write(said, line.encode() + b"\n")

    async with opened_cache(state, tier=tier, hook=killer) as cache:

        async def keep(path: str, index: int) -> None:
            await cache.ensure(store, store.id_of(path), index)
            say(f"kept {path} {index}")

        async def evict(path: str) -> None:
            say(f"evict {path}")
            await cache.evict([store.id_of(path)])

        for first, second in (("a", "b"), ("c", "d")):
            async with trio.open_nursery() as nursery:
                for index in range(CHUNKS):
                    nursery.start_soon(keep, first, index)
                    nursery.start_soon(keep, second, index)
            await evict(first)
        await evict("b")
        say("end")


def main() -> None:
    chunk.CHUNK_BYTES = CHUNK
    state, step, count = sys.argv[1:]
    trio.run(work, Path(state), Killer(step, int(count)))


if __name__ == "__main__":
    main()
