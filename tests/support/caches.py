"""A ChunkCache on a real directory, for tests: opened, run and closed around a block."""

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import trio

from cachefs.cache import ChunkCache
from cachefs.config import ServerConfig
from cachefs.index import Index
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.tier import BlobStat
from cachefs.tier.local import LocalTier

MIB = 1024 * 1024
TIMEOUT_S = 60.0


def config_for(state: Path, **options: object) -> ServerConfig:
    return ServerConfig(
        state_dir=state,
        runtime_dir=state / "run",
        **{"cache_bytes_max": 1024 * MIB, **options},  # type: ignore[arg-type]
    )


class BusyDisk(LocalTier):
    """Writes nothing while `writes` is clear."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, capacity_bytes=1024 * MIB, free_fraction_min=0.0)
        self.writes = threading.Event()
        self.writes.set()

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        assert self.writes.wait(TIMEOUT_S)
        return super().write(name, size, offset, data, create=create)


@contextlib.asynccontextmanager
async def opened_cache(
    state: Path,
    *,
    tier: LocalTier | None = None,
    index: Index | None = None,
    drain: bool = True,
    buffers: int = 24,
    hook: Callable[[str], None] = lambda step: None,
    clock: Callable[[], float] | None = None,
    **options: object,
) -> AsyncIterator[ChunkCache]:
    """`drain=False` abandons everything in flight, as a crash does. `index` is closed at the end.

    `cache.metrics` is the caller's to look at.
    """
    config = config_for(state, **options)
    index = index or Index(state / "index", map_bytes=256 * MIB)
    tier = tier or LocalTier(state / "blobs", capacity_bytes=config.cache_bytes_max, free_fraction_min=0.0)
    extra = {"clock": clock} if clock is not None else {}
    try:
        cache = ChunkCache(
            index=index,
            tier=tier,
            offload=Offload(),
            metrics=Metrics(),
            config=config,
            buffers=buffers,
            hook=hook,
            **extra,  # type: ignore[arg-type]
        )
        await cache.recover()
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            try:
                yield cache
                if drain:
                    await cache.drain()
            finally:
                nursery.cancel_scope.cancel()
    finally:
        index.close()


def content(size: int, seed: int = 1) -> bytes:
    """Bytes of which no two aligned pieces are equal."""
    return b"".join((seed * 1_000_003 + n).to_bytes(8, "big") for n in range(size // 8 + 1))[:size]


def run(function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
    async def bounded() -> None:
        with trio.fail_after(TIMEOUT_S):
            await function(*args)

    trio.run(bounded)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.005)
