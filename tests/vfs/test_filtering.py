"""What a volume's patterns show of long listings: found out in a thread, once."""

import sys
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import trio

from cachefs.offload import Offload
from cachefs.snapshot import Listing, Snapshots, Volume
from tests.support.memory_store import MemoryStore
from tests.vfs.test_snapshots import Bench, bench, names, until, volume_of

__all__ = ["bench"]

P = ParamSpec("P")
T = TypeVar("T")


class HeldOffload(Offload):
    """The first `most` filters begin (`late`: end) only when `go` is set."""

    def __init__(self, *, most: int, late: bool = False) -> None:
        super().__init__()
        self.go = trio.Event()
        self.matches = 0
        self._most = most
        self._late = late

    async def match(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.matches += 1
        held = self.matches <= self._most
        if held and not self._late:
            await self.go.wait()
        result = await super().match(function, *args, **kwargs)
        if held and self._late:
            await self.go.wait()
        return result


def test_a_long_listing_is_filtered_once_and_in_a_thread(bench: Bench) -> None:
    store = MemoryStore()
    store.put_many([f"{number}.bin" for number in range(3000)] + ["m.safetensors", "few/m.bin"])
    filtered = volume_of(store, include=(*(f"*a?{number}" for number in range(60)), "*.safetensors"))
    bench.offload = held = HeldOffload(most=sys.maxsize)

    async def body(snapshots: Snapshots) -> None:
        found: list[Listing | None] = []

        async def look(ask: Callable[[Volume, str], Awaitable[Listing | None]]) -> None:
            found.append(await ask(filtered, ""))

        async with trio.open_nursery() as nursery:
            for ask in (snapshots.freeze, snapshots.freeze, snapshots.refreeze):
                nursery.start_soon(look, ask)
            await until(lambda: held.matches > 0)
            nursery.start_soon(look, snapshots.peek)
            assert names(await snapshots.freeze(filtered, "few")) == []  # nobody else waits for it
            assert len((await snapshots.freeze(volume_of(store), "")).entries) == 3002
            assert not found
            held.go.set()
        shown = await snapshots.freeze(filtered, "")
        assert names(shown) == ["few", "m.safetensors"]
        assert [listing and names(listing) for listing in found] == [names(shown)] * 4
        assert held.matches <= 2  # the first listing, and the one of refreeze()
        assert await snapshots.peek(filtered, "") is shown
        assert await snapshots.freeze(filtered, "") is shown
        assert await snapshots.refreeze(filtered, "") is not shown
        assert held.matches <= 3

    bench.run(body)


def test_a_filter_of_an_older_listing_that_ends_later_displaces_nothing(bench: Bench) -> None:
    store = MemoryStore()
    store.put_many([f"{number}.bin" for number in range(3000)])
    filtered = volume_of(store, include=tuple(f"*a?{number}" for number in range(60)))
    bench.offload = late = HeldOffload(most=1, late=True)

    async def body(snapshots: Snapshots) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshots.freeze, filtered, "")
            await until(lambda: late.matches == 1)
            newer = await snapshots.refreeze(filtered, "")
            late.go.set()
        assert await snapshots.freeze(filtered, "") is newer
        assert late.matches == 2

    bench.run(body)
