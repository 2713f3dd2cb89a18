"""Background fills: bounded, in the order of reading, fair, and never in the way of demand."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from cachefs.chunk import CHUNK_BYTES, MIB, ObjectId
from cachefs.prefetch import Prefetcher
from cachefs.readahead import WINDOWS
from cachefs.store import Store
from tests.support.memory_store import MemoryStore
from tests.vfs.stage import Mount

STORE: Store = MemoryStore()
FULL = WINDOWS[-1]


def an_object(name: str, chunks: int = 100) -> ObjectId:
    return ObjectId("memory://x", name, chunks * CHUNK_BYTES, "1")


class Budget:
    """Fills with room for `room` chunks; what was started is noted in order."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.started: list[tuple[str, int]] = []
        self.refused: set[str] = set()

    def has(self, object_id: ObjectId, index: int) -> bool:
        return (object_id.path, index) in self.started

    def offer(self, store: Store, object_id: ObjectId, index: int, *, spare: bool = False) -> bool:
        if (object_id.path, index) in self.started:
            return True
        if object_id.path in self.refused or self.room == 0:
            return False
        self.room -= 1
        self.started.append((object_id.path, index))
        return True


async def settle(prefetcher: Prefetcher, budget: Budget, count: int) -> None:
    with trio.fail_after(30):
        while len(budget.started) < count:
            await trio.sleep(0.001)


def run(test, budget: Budget) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            prefetcher = Prefetcher(budget)
            nursery.start_soon(prefetcher.run)
            await test(prefetcher)
            nursery.cancel_scope.cancel()

    trio.run(main)


def read_on(prefetcher: Prefetcher, handle: int, name: str, start: int = 0, count: int = 4) -> None:
    """`count` sequential READs of 1 MiB."""
    for number in range(count):
        prefetcher.note_read(handle, STORE, an_object(name), start * CHUNK_BYTES + number * MIB, MIB)


def test_window_is_offered_in_order_and_never_blocks_the_reader():
    budget = Budget(room=100)

    async def test(prefetcher: Prefetcher) -> None:
        read_on(prefetcher, 1, "a")
        assert budget.started == []  # the reader's own demand starts first: offers wait for its first await
        await settle(prefetcher, budget, FULL)
        assert budget.started == [("a", index) for index in range(1, 1 + FULL)]

    run(test, budget)


def test_readers_take_turns():
    budget = Budget(room=100)

    async def test(prefetcher: Prefetcher) -> None:
        for handle in range(4):
            read_on(prefetcher, handle, "abcd"[handle])
        await settle(prefetcher, budget, 100)
        assert {name for name, _ in budget.started[:4]} == set("abcd")
        assert {name for name, _ in budget.started[4:8]} == set("abcd")

    run(test, budget)


def test_refused_reader_does_not_hold_up_another_and_goes_on_when_there_is_room():
    budget = Budget(room=100)
    budget.refused.add("hung")

    async def test(prefetcher: Prefetcher) -> None:
        read_on(prefetcher, 1, "hung")
        read_on(prefetcher, 2, "fine")
        await settle(prefetcher, budget, FULL)
        assert {name for name, _ in budget.started} == {"fine"}
        budget.refused.clear()
        await settle(prefetcher, budget, 2 * FULL)
        assert budget.started[FULL:] == [("hung", index) for index in range(1, 1 + FULL)]

    run(test, budget)


def test_used_up_budget_is_used_again_as_it_frees():
    budget = Budget(room=3)

    async def test(prefetcher: Prefetcher) -> None:
        read_on(prefetcher, 1, "a")
        for wanted in range(3, 1 + FULL):
            await settle(prefetcher, budget, wanted)
            assert len(budget.started) == wanted
            budget.room += 1

    run(test, budget)


def test_released_handle_is_offered_no_more():
    budget = Budget(room=0)

    async def test(prefetcher: Prefetcher) -> None:
        read_on(prefetcher, 1, "a")
        read_on(prefetcher, 2, "b")
        await trio.testing.wait_all_tasks_blocked()
        prefetcher.forget(1)
        prefetcher.forget(1)
        budget.room = 100
        await settle(prefetcher, budget, FULL)
        assert {name for name, _ in budget.started} == {"b"}

    run(test, budget)


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path)
    yield mount
    os.close(mount.ledger_fd)


def test_bytes_in_flight_stay_within_the_budget_over_all_readers(mount):
    store = MemoryStore({name: bytes(8 * CHUNK_BYTES) for name in "abc"})

    async def main() -> None:
        async with mount.server(store, prefetch_bytes=2 * CHUNK_BYTES) as stage:
            handles = [(await stage.open(name))[1] for name in "abc"]
            with store.gets.held():
                async with trio.open_nursery() as nursery:
                    for handle in handles:
                        nursery.start_soon(stage.vfs.read, handle, 0, 4 * MIB)
                    with trio.fail_after(30):
                        while store.gets.waiting < 5:  # three demands, two in the background
                            await trio.sleep(0.005)
                    for _ in range(20):
                        await trio.sleep(0.005)
                        assert store.gets.waiting <= 5
                    store.gets.open()
            for handle in handles:
                assert await stage.read_all(handle, 8 * CHUNK_BYTES, CHUNK_BYTES) == bytes(8 * CHUNK_BYTES)
                await stage.vfs.release(handle)
            assert set(store.get_counts.values()) == {1}

    trio.run(main)


def test_the_first_reads_of_a_file_drive_sixteen_gets_within_two_round_trips(mount):
    """Each time that the gate is open is a round trip: what waits at it was asked for at the same time."""
    store = MemoryStore({"a": bytes(20 * CHUNK_BYTES)})

    async def waiting(count: int) -> None:
        with trio.fail_after(30):
            while store.gets.waiting < count:
                await trio.sleep(0.001)

    async def main() -> None:
        async with mount.server(store, prefetch_bytes=24 * CHUNK_BYTES, buffers=34) as stage:
            _, handle = await stage.open("a")
            store.gets.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage.vfs.read, handle, 0, MIB)
                await waiting(1)
                store.gets.open()
            store.gets.close()
            before = sum(store.get_counts.values())
            assert before <= 3
            await stage.vfs.read(handle, MIB, MIB)  # of the chunk that has come
            await waiting(16 - before)
            store.gets.open()
            await stage.vfs.release(handle)

    trio.run(main)
