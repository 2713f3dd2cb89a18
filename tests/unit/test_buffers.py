"""The buffer pool: fixed, shared fairly, demand first."""

import mmap
import resource

import pytest
import trio
import trio.testing

from cachefs.buffers import WRITES, Buffer, BufferPool

BYTES = 4096


def test_buffers_are_page_aligned_reused_and_never_more_than_the_count() -> None:
    pool = BufferPool(BYTES, 3)
    taken = [pool.take_nowait(None) for _ in range(4)]
    assert taken[3] is None
    first = taken[0]
    assert first is not None
    assert len(first.view) == BYTES
    pool.give_back(first)
    assert pool.take_nowait(None) is first
    pool.check_invariants()


def test_the_longest_held_buffer_is_reclaimed_and_a_touched_one_stays() -> None:
    pool = BufferPool(BYTES, 2)
    gone: list[str] = []
    one, two = pool.take_nowait(None), pool.take_nowait(None)
    assert one is not None
    assert two is not None
    pool.hold(one, lambda: gone.append("one"))
    pool.hold(two, lambda: gone.append("two"))
    pool.touch(one)
    assert pool.available == 2
    assert pool.take_nowait(None) is two
    assert gone == ["two"]
    pool.give_back(one)
    assert pool.take_nowait(None) is one
    assert gone == ["two"]
    pool.check_invariants()


def test_one_owner_never_takes_all() -> None:
    pool = BufferPool(BYTES, 24)
    counts = [0, 0, 0]
    for owner in range(3):
        while pool.take_nowait(str(owner)) is not None:
            counts[owner] += 1
    assert counts[0] == 17
    assert min(counts) >= 1
    assert pool.take_nowait(None) is not None
    pool.check_invariants()


def test_what_waits_for_the_disk_takes_nothing_of_a_share_but_the_last_ones_are_for_others() -> None:
    pool = BufferPool(BYTES, 34)

    def take_all(owner: str) -> int:
        count = 0
        while (buffer := pool.take_nowait(owner)) is not None:
            taken.append(buffer)
            count += 1
        return count

    taken: list[Buffer] = []
    assert take_all("a") == 24
    for buffer in taken[:4]:
        pool.charge(buffer, WRITES)
    assert take_all("a") == 4
    for buffer in taken[4:]:
        pool.charge(buffer, WRITES)
    assert take_all("a") == 2
    assert [take_all(owner) for owner in ("b", "c", "d")] == [1, 1, 0]
    assert [pool.take_nowait(None) is not None for _ in range(3)] == [True, True, False]
    pool.check_invariants()


def test_who_is_at_his_share_gets_a_buffer_when_one_of_his_waits_for_the_disk() -> None:
    async def scenario() -> None:
        pool = BufferPool(BYTES, 34)
        taken = [buffer for _ in range(24) if (buffer := pool.take_nowait("a")) is not None]
        assert len(taken) == 24
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.take, "a", 1)
            await trio.testing.wait_all_tasks_blocked()
            pool.check_invariants()
            pool.charge(taken[0], WRITES)
        pool.check_invariants()

    trio.run(scenario)


@pytest.mark.parametrize("count", [1, 2])
def test_a_tiny_pool_still_serves_every_owner(count: int) -> None:
    pool = BufferPool(BYTES, count)
    for owner in "ab":
        buffer = pool.take_nowait(owner)
        assert buffer is not None
        pool.give_back(buffer)


def test_waiters_are_served_by_priority_then_in_order_and_owners_at_their_share_are_passed() -> None:
    async def scenario() -> None:
        pool = BufferPool(BYTES, 4)
        order: list[str] = []
        got: dict[str, Buffer] = {}

        async def take(name: str, owner: str | None, priority: int) -> None:
            got[name] = await pool.take(owner, priority)
            order.append(name)

        first, *_ = [pool.take_nowait("hung") for _ in range(3)]
        second = pool.take_nowait(None)
        assert first is not None
        assert second is not None
        async with trio.open_nursery() as nursery:
            for name, owner, priority in (
                ("background", "b", 2),
                ("hung", "hung", 1),
                ("demand", "d", 1),
                ("load", None, 0),
            ):
                nursery.start_soon(take, name, owner, priority)
                await trio.testing.wait_all_tasks_blocked()
            pool.give_back(second)
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["load"]
            pool.give_back(got["load"])
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["load", "demand"]
            pool.check_invariants()
            pool.give_back(got["demand"])
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["load", "demand", "background"]
            pool.give_back(first)
        assert order[-1] == "hung"
        pool.check_invariants()

    trio.run(scenario)


def test_a_cancelled_waiter_takes_no_buffer_with_it() -> None:
    async def scenario() -> None:
        pool = BufferPool(BYTES, 1)
        buffer = pool.take_nowait(None)
        assert buffer is not None
        with trio.CancelScope() as before:
            before.cancel()
            await pool.take(None, 1)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:

                async def give_and_cancel() -> None:
                    await trio.testing.wait_all_tasks_blocked()
                    pool.give_back(buffer)
                    scope.cancel()

                nursery.start_soon(give_and_cancel)
                await pool.take(None, 1)
        assert pool.available == 1 or not scope.cancelled_caught
        pool.check_invariants()

    trio.run(scenario)


def test_a_discarded_buffer_is_replaced_by_another() -> None:
    pool = BufferPool(BYTES, 1)
    buffer = pool.take_nowait("a")
    assert buffer is not None
    pool.discard(buffer)
    other = pool.take_nowait("a")
    assert other is not None
    assert other is not buffer
    pool.check_invariants()


def test_a_prepared_buffer_is_the_first_one_taken_and_has_its_memory() -> None:
    async def scenario() -> None:
        pool = BufferPool(64 * mmap.PAGESIZE, 2)
        await pool.prepare(trio.to_thread.run_sync)
        pool.check_invariants()
        prepared = pool.take_nowait(None)
        assert prepared is not None
        assert faults_of_writing(prepared) < 8  # of 64 pages

    trio.run(scenario)


def test_no_buffer_is_prepared_when_all_are_taken() -> None:
    async def scenario() -> None:
        pool = BufferPool(BYTES, 1)
        taken = pool.take_nowait(None)
        assert taken is not None
        await pool.prepare(trio.to_thread.run_sync)
        assert pool.available == 0
        pool.give_back(taken)
        pool.check_invariants()

    trio.run(scenario)


def faults_of_writing(buffer: Buffer) -> int:
    data = b"x" * len(buffer.view)  # not zeros: they would have no memory of their own
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    buffer.view[:] = data
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
