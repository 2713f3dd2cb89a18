"""Freezing directories: single flight, sessions, failures. On a store in memory and a real index."""

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.config import VolumeConfig
from cachefs.errors import AccessDenied, IntegrityError, NotFound, Offline, StoreUnavailable
from cachefs.index import MAP_BYTES, Index
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.snapshot import Listing, Snapshots, Volume
from tests.support.memory_store import MemoryStore

DEADLINE_S = 50.0


def volume_of(store: MemoryStore, **options: object) -> Volume:
    return Volume(VolumeConfig(name="v", source=store.url, **options), store)  # type: ignore[arg-type]


def names(listing: Listing) -> list[str]:
    return [entry.name for entry in listing.entries]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await trio.sleep(0.01)


class Bench:
    """One index; `run` gives a body the Snapshots of one server."""

    def __init__(self, directory: Path, map_bytes: int = MAP_BYTES) -> None:
        self.index = Index(directory, map_bytes=map_bytes)
        self.offload = Offload()
        self.now_s = 1000.0

    def snapshots(self, session: str = "one", **options: object) -> Snapshots:
        return Snapshots(
            self.index,
            self.offload,
            lambda: self.now_s,
            session=session,
            backoff_s=(0.001, 0.01),
            **options,  # type: ignore[arg-type]
        )

    def run(self, body: Callable[[Snapshots], Awaitable[None]], session: str = "one", **options: object) -> Snapshots:
        snapshots = self.snapshots(session, **options)

        async def main() -> None:
            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    await nursery.start(snapshots.run)
                    await body(snapshots)
                    snapshots.check_invariants()
                    nursery.cancel_scope.cancel()

        trio.run(main)
        return snapshots


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "index")
    yield bench
    bench.index.close()


def test_directory_is_listed_once_and_then_frozen(bench: Bench) -> None:
    store = MemoryStore({"a.bin": b"abc", "sub/x": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        first = await snapshots.freeze(volume, "")
        assert names(first) == ["a.bin", "sub"]
        assert (first.frozen_s, first.session) == (1000.0, "one")
        store.put("b.bin", b"new")
        assert await snapshots.freeze(volume, "") is first
        assert await snapshots.peek(volume, "") is first
        assert await snapshots.peek(volume, "sub") is None
        assert store.list_count == 1
        file = first.entries[0]
        assert snapshots.object_id(volume, "", file) == store.id_of("a.bin")

    bench.run(body)


def test_pages_are_put_together_whatever_the_order_of_keys(bench: Bench) -> None:
    store = MemoryStore(page_keys=3)
    store.put_many([f"d/{name}" for name in ("zz", "b/1", "a", "ü", "b/2", "with space", "M", "c/x", "0")])
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        listing = await snapshots.freeze(volume, "d")
        assert names(listing) == ["0", "M", "a", "b", "c", "with space", "zz", "ü"]
        assert [entry.name for entry in listing.entries if entry.is_directory] == ["b", "c"]
        assert store.list_counts == {"d": 3}

    metrics = Metrics()
    bench.run(body, metrics=metrics)
    assert metrics.registry.get_sample_value("cachefs_store_requests_total", {"kind": "list", "result": "ok"}) == 3


def test_same_session_uses_the_kept_listing_without_list(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        assert names(await snapshots.freeze(volume, "")) == ["a"]

    bench.run(body)
    store.put("b", b"2")
    bench.run(body)
    assert store.list_count == 1


def test_another_session_lists_first(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume, "")

    bench.run(body)
    store.put("b", b"2")

    async def again(snapshots: Snapshots) -> None:
        assert names(await snapshots.freeze(volume, "")) == ["a", "b"]

    bench.run(again, "two")
    assert store.list_count == 2


def test_another_session_shows_the_old_listing_when_the_store_is_gone(bench: Bench) -> None:
    store = MemoryStore({"a": b"1", "d/x": b"2"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume, "")
        await snapshots.freeze(volume, "d")

    bench.run(body)
    store.unavailable = True
    counted = store.list_count

    async def again(snapshots: Snapshots) -> None:
        assert names(await snapshots.freeze(volume, "")) == ["a", "d"]
        tried = store.list_count
        assert tried > counted
        assert names(await snapshots.freeze(volume, "d")) == ["x"]
        assert store.list_count == tried  # known to be away: the next directory does not wait for it again
        with pytest.raises(StoreUnavailable):
            await snapshots.freeze(volume, "never-seen")

    snapshots = bench.run(again, "two", list_deadline_s=0.05)
    assert snapshots.counts["stale"] == 2


def test_a_refused_listing_never_falls_back_to_an_old_one(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume, "")

    bench.run(body)

    async def again(snapshots: Snapshots) -> None:
        for error in (AccessDenied("403"), NotFound("404")):
            store.list_errors.append(error)
            with pytest.raises(type(error)):
                await snapshots.freeze(volume, "")

    bench.run(again, "two")


def test_offline_shows_what_was_listed_and_never_asks(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume, "")

    bench.run(body)
    counted = store.list_count

    async def offline(snapshots: Snapshots) -> None:
        assert names(await snapshots.freeze(volume, "")) == ["a"]
        with pytest.raises(Offline):
            await snapshots.freeze(volume, "other")
        with pytest.raises(Offline):
            await snapshots.refreeze(volume, "")

    bench.run(offline, "two", offline=True)
    assert store.list_count == counted


def test_other_credentials_do_not_share_a_listing(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume_of(store), "")
        assert await snapshots.peek(volume_of(store), "") is not None
        assert await snapshots.peek(volume_of(store, profile="someone"), "") is None
        assert await snapshots.peek(volume_of(store, anonymous=True), "") is None

    bench.run(body)


def test_failed_pages_are_retried_and_never_truncate(bench: Bench) -> None:
    store = MemoryStore(page_keys=2)
    store.put_many([f"f{n}" for n in range(6)])
    volume = volume_of(store)
    store.list_errors.extend([None, None, StoreUnavailable("503"), None, StoreUnavailable("503")])

    async def body(snapshots: Snapshots) -> None:
        assert len((await snapshots.freeze(volume, "")).entries) == 6

    bench.run(body)


def test_a_store_that_stays_away_is_an_error_and_asked_again_next_time(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    store.unavailable = True

    async def body(snapshots: Snapshots) -> None:
        with pytest.raises(StoreUnavailable):
            await snapshots.freeze(volume, "")
        store.unavailable = False
        assert names(await snapshots.freeze(volume, "")) == ["a"]

    bench.run(body, list_deadline_s=0.05)


def test_a_page_that_lies_is_an_error_at_once(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    store.list_errors.append(IntegrityError("no end"))

    async def body(snapshots: Snapshots) -> None:
        with pytest.raises(IntegrityError):
            await snapshots.freeze(volume, "")
        assert store.list_count == 1

    bench.run(body)


def test_many_lookers_share_one_listing(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    results: list[Listing] = []

    async def look(snapshots: Snapshots) -> None:
        results.append(await snapshots.freeze(volume, ""))

    async def body(snapshots: Snapshots) -> None:
        with store.lists.held():
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(look, snapshots)
                await until(lambda: store.lists.waiting == 1)
                store.lists.open()
        assert len(results) == 50
        assert all(result is results[0] for result in results)
        assert store.list_count == 1

    bench.run(body)


def test_cancelled_waiter_does_not_cancel_the_shared_listing(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    results: list[Listing] = []

    async def look(snapshots: Snapshots) -> None:
        results.append(await snapshots.freeze(volume, ""))

    async def body(snapshots: Snapshots) -> None:
        with store.lists.held():
            first = trio.CancelScope()

            async def cancelled() -> None:
                with first:
                    await look(snapshots)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancelled)
                await until(lambda: store.lists.waiting == 1)
                nursery.start_soon(look, snapshots)
                first.cancel()
                await until(lambda: first.cancelled_caught)
                store.lists.open()
        assert len(results) == 1
        assert store.list_count == 1

    bench.run(body)


def test_a_failure_reaches_every_waiter(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    errors: list[AccessDenied] = []
    store.list_errors.append(AccessDenied("403"))

    async def look(snapshots: Snapshots) -> None:
        try:
            await snapshots.freeze(volume, "")
        except AccessDenied as exc:
            errors.append(exc)

    async def body(snapshots: Snapshots) -> None:
        with store.lists.held():
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(look, snapshots)
                await until(lambda: store.lists.waiting == 1)
                store.lists.open()
        assert len(errors) == len({id(error) for error in errors}) == 5
        assert names(await snapshots.freeze(volume, "")) == ["a"]

    bench.run(body)


def test_refreeze_during_a_listing_lists_once_more(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    results: list[Listing] = []

    async def body(snapshots: Snapshots) -> None:
        async def again() -> None:
            results.append(await snapshots.refreeze(volume, ""))

        with store.lists.held():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(snapshots.freeze, volume, "")
                await until(lambda: store.lists.waiting == 1)
                store.put("b", b"2")  # too late for the listing in flight
                nursery.start_soon(again)
                nursery.start_soon(again)
                await trio.testing.wait_all_tasks_blocked()
                store.lists.open()
        assert [names(result) for result in results] == [["a", "b"], ["a", "b"]]
        assert store.list_count == 2
        assert names(await snapshots.freeze(volume, "")) == ["a", "b"]

    bench.run(body)


def test_failed_refreeze_leaves_the_frozen_listing(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        await snapshots.freeze(volume, "")
        store.list_errors.append(AccessDenied("403"))
        with pytest.raises(AccessDenied):
            await snapshots.refreeze(volume, "")
        assert names(await snapshots.freeze(volume, "")) == ["a"]

    bench.run(body)


def test_collisions_and_names_that_cannot_be_shown(bench: Bench) -> None:
    store = MemoryStore()
    keys = ["d/a", "d/a/x", "d/a~file", "d//y", "d/../z", "d/./z", "d/..", "d/nul\0", "d/" + "n" * 256, "d/", "d/ok"]
    store.put_many(keys)
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        listing = await snapshots.freeze(volume, "d")
        assert [(entry.name, entry.key_name, entry.is_directory) for entry in listing.entries] == [
            ("a", "a", True),
            ("a~file", "a~file", False),
            ("a~file2", "a", False),
            ("ok", "ok", False),
        ]
        assert listing.hidden == 6
        assert snapshots.object_id(volume, "d", listing.entries[2]) == store.id_of("d/a")
        assert snapshots.counts["hidden_names"] == 6

    bench.run(body)


def test_include_and_exclude_filter_what_is_shown_not_what_is_kept(bench: Bench) -> None:
    store = MemoryStore()
    store.put_many(["m.safetensors", "m.bin", "onnx/m.onnx", "sub/m.safetensors", "sub/x.bin"])
    filtered = volume_of(store, include=("*.safetensors",), exclude=("onnx",))

    async def body(snapshots: Snapshots) -> None:
        assert names(await snapshots.freeze(filtered, "")) == ["m.safetensors", "sub"]
        assert names(await snapshots.freeze(filtered, "sub")) == ["m.safetensors"]
        assert len((await snapshots.freeze(volume_of(store), "")).entries) == 4
        assert store.list_count == 2
        assert snapshots.totals(filtered).objects == 2
        assert snapshots.totals(volume_of(store)).objects == 4

    bench.run(body)


def test_walk_and_totals_cover_the_whole_volume_also_after_a_restart(bench: Bench) -> None:
    store = MemoryStore({"a": b"1", "d/b": b"22", "d/e/c": b"333", "d/e/d": b"4444"})
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        found = [(directory, entry.name) async for directory, entry in snapshots.walk(volume)]
        assert found == [("", "a"), ("d", "b"), ("d/e", "c"), ("d/e", "d")]

    bench.run(body)

    async def again(snapshots: Snapshots) -> None:
        totals = snapshots.totals(volume)
        assert (totals.directories, totals.objects, totals.size_bytes) == (3, 4, 10)

    bench.run(again)
    assert store.list_count == 3


def test_a_full_index_costs_only_the_next_restart(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "full", map_bytes=200 * 1024)
    store = MemoryStore()
    store.put_many([f"file-with-a-long-name-{n}" for n in range(20_000)])
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        assert len((await snapshots.freeze(volume, "")).entries) == 20_000
        assert len((await snapshots.freeze(volume, "")).entries) == 20_000

    try:
        bench.run(body)
        bench.run(body)
    finally:
        bench.index.close()
    assert store.list_counts == {"": 40}


def test_a_million_keys_cost_one_list_for_the_root(bench: Bench) -> None:
    store = MemoryStore()
    for shard in range(100):
        store.put_many([f"shard-{shard:03d}/{n}" for n in range(10_000)])
    volume = volume_of(store)

    async def body(snapshots: Snapshots) -> None:
        assert len((await snapshots.freeze(volume, "")).entries) == 100
        assert store.list_count <= 2

    bench.run(body)


def test_end_of_the_server_fails_what_is_in_flight(bench: Bench) -> None:
    store = MemoryStore({"a": b"1"})
    volume = volume_of(store)
    snapshots = bench.snapshots()
    errors: list[StoreUnavailable] = []

    async def look() -> None:
        try:
            await snapshots.freeze(volume, "")
        except StoreUnavailable as exc:
            errors.append(exc)

    async def main() -> None:
        with trio.fail_after(DEADLINE_S), store.lists.held():
            async with trio.open_nursery() as waiters:
                async with trio.open_nursery() as server:
                    await server.start(snapshots.run)
                    waiters.start_soon(look)
                    await until(lambda: store.lists.waiting == 1)
                    server.cancel_scope.cancel()
                await look()  # after the end

    trio.run(main)
    assert len(errors) == 2
