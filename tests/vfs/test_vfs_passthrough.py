"""Cached or passthrough: chosen at the first open of an inode, kept to its last RELEASE, over restarts too."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from cachefs import passthrough
from cachefs.errors import StaleInode
from cachefs.kernel import wire
from cachefs.ledger import Ledger, Mode, OpenEntry
from cachefs.openfiles import PASSTHROUGH_BIT, inode_of
from cachefs.passthrough import CHECK_WAITERS_MAX, SELF_CHECK_INODE, SELF_CHECK_PREFIX, CheckWait
from tests.support.memory_store import MemoryStore
from tests.vfs.stage import LEDGER_BYTES, Mount, Stage

DATA = os.urandom(100_000)


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path)
    yield mount
    os.close(mount.ledger_fd)


async def warm(stage: Stage, path: str = "a") -> None:
    """Read it once, so that it is sealed and not open."""
    _, handle = await stage.open(path)
    await stage.read_all(handle, len(DATA))
    await stage.vfs.release(handle)
    await stage.sealed(path)


def is_passthrough(handle: int) -> bool:
    return bool(handle & PASSTHROUGH_BIT)


async def until(condition) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.005)


def test_cold_file_opens_cached_and_a_sealed_one_passthrough(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            inode = (await stage.walk("a")).inode
            cold = await stage.vfs.open(inode, os.O_RDONLY)
            assert not is_passthrough(cold.handle)
            assert cold.keep_cache
            assert await stage.read_all(cold.handle, len(DATA)) == DATA
            await stage.vfs.release(cold.handle)
            await stage.sealed("a")
            first = await stage.vfs.open(inode, os.O_RDONLY)
            second = await stage.vfs.open(inode, os.O_RDONLY)
            assert is_passthrough(first.handle)
            assert not first.keep_cache  # with a backing id it is EIO
            assert first.handle == second.handle  # one id per inode
            assert inode_of(first.handle) == inode
            assert await stage.read_all(first.handle, len(DATA)) == DATA  # served too if the kernel asks
            await stage.vfs.release(first.handle)
            assert stage.keeper.closed == []
            await stage.vfs.release(second.handle)
            await until(lambda: stage.keeper.closed == [1])
            assert stage.keeper.ids == {}

    trio.run(main)


def test_file_that_seals_while_it_is_open_gets_a_new_inode(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            inode, old = await stage.open("a")
            assert await stage.read_all(old, len(DATA)) == DATA
            await until(lambda: stage.notifier.forgotten == [(1, b"a")])
            fresh, new = await stage.open("a")
            assert fresh != inode
            assert is_passthrough(new)
            assert await stage.read_all(old, len(DATA)) == DATA
            # By its old number (a bind of it, /proc/self/fd) it is served in its old mode.
            again = await stage.vfs.open(inode, os.O_RDONLY)
            assert not is_passthrough(again.handle)
            for handle in (old, new, again.handle):
                await stage.vfs.release(handle)
            # Nobody has the old number open any more: it may be read by the kernel itself.
            last = await stage.vfs.open(inode, os.O_RDONLY)
            assert is_passthrough(last.handle)
            await stage.vfs.release(last.handle)
            await until(lambda: stage.keeper.ids == {})

    trio.run(main)


def test_changed_file_is_not_opened_by_its_old_number(mount):
    store = MemoryStore({"a": DATA, "gone": DATA})

    async def main():
        async with mount.server(store) as stage:
            inode = (await stage.walk("a")).inode
            gone = (await stage.walk("gone")).inode
            store.put("a", DATA[::-1])
            store.delete("gone")
            await stage.tree.refresh_directory(1)
            for stale in (inode, gone):
                with pytest.raises(StaleInode):
                    await stage.vfs.open(stale, os.O_RDONLY)
            _, handle = await stage.open("a")
            assert await stage.read_all(handle, len(DATA)) == DATA[::-1]

    trio.run(main)


def test_next_server_keeps_the_mode_of_what_is_open(mount):
    store = MemoryStore({"cached": DATA, "direct": DATA[::-1]})

    async def main():
        async with mount.server(store, kernel_disable=("passthrough",)) as stage:
            await warm(stage, "cached")
            await warm(stage, "direct")
            cached, _ = await stage.open("cached")
        async with mount.server(store) as stage:
            direct, handle = await stage.open("direct")
            assert is_passthrough(handle)
        async with mount.server(store) as stage:
            # The kernel has it open cached: a backing id now would be EIO. The path gets a new number instead.
            opened = await stage.vfs.open(cached, os.O_RDONLY)
            assert not is_passthrough(opened.handle)
            await until(lambda: stage.notifier.forgotten == [(1, b"cached")])
            # The same id as the kernel has already.
            assert (await stage.vfs.open(direct, os.O_RDONLY)).handle == handle
            await stage.vfs.release(handle)
            await stage.vfs.release(handle)
            # An inherited id is kept until the kernel has forgotten the inode.
            await stage.vfs._passthrough.give_back_idle(lambda inode: False)
            assert stage.keeper.closed == []
            assert stage.notifier.forgotten[-1] == (1, b"direct")
            stage.notifier.known_to_kernel = {cached}
            await until(lambda: stage.keeper.closed == [1])
            assert {(entry.inode, entry.mode) for entry in Ledger(mount.ledger_fd).entries()} == {(cached, Mode.CACHED)}

    trio.run(main)


@pytest.mark.parametrize("counted_twice", ["open", "release"])
def test_what_a_killed_server_counted_and_did_not_answer_comes_again(mount, counted_twice):
    """By RESEND: the last OPEN is counted twice then, or the last RELEASE."""
    store = MemoryStore({"a": DATA})

    async def main():
        async with mount.server(store) as stage:
            await warm(stage)
            inode, handle = await stage.open("a")
            await stage.vfs.open(inode, os.O_RDONLY)
            opens = 2
            if counted_twice == "release":
                await stage.vfs.release(handle)
                opens = 1
        async with mount.server(store) as stage:
            if counted_twice == "open":
                await stage.vfs.open(inode, os.O_RDONLY)
            else:
                await stage.vfs.release(handle)  # the kernel has one handle open yet, the count is 0
                assert (await stage.vfs.open(inode, os.O_RDONLY)).handle == handle  # no other id, no other mode
                await stage.vfs.release(handle)
            object_id = stage.tree.node(inode).object_id
            assert (await stage.cache.evict([object_id])).evicted_objects == 0
            for _ in range(opens):
                await stage.vfs.release(handle)
            assert stage.keeper.closed == []
            stage.notifier.known_to_kernel = set()
            await until(lambda: stage.keeper.closed == [1])
            assert Ledger(mount.ledger_fd).entries() == []
            assert (await stage.cache.evict([object_id])).evicted_objects == 1

    trio.run(main)


def test_next_server_serves_what_is_local_without_the_store(mount):
    store = MemoryStore({"a": DATA})

    async def main():
        async with mount.server(store) as stage:
            await warm(stage)
        async with mount.server(store) as stage:
            inode = (await stage.walk("a")).inode
            handle = (await stage.vfs.open(inode, os.O_RDONLY)).handle
            assert await stage.read_all(handle, len(DATA)) == DATA
            assert store.get_count == 1
            await stage.vfs.release(handle)

    trio.run(main)


def test_full_ledger_means_cached_for_what_it_does_not_know(mount):
    store = MemoryStore({"a": DATA})

    async def main():
        async with mount.server(store) as stage:
            await warm(stage)
            ledger = Ledger(mount.ledger_fd)
            for inode in range(100_000, 100_000 + LEDGER_BYTES // 8):
                ledger.record(OpenEntry(inode, Mode.CACHED, 1))
            for inode in range(100_000, 100_000 + LEDGER_BYTES // 8):
                ledger.record(OpenEntry(inode, Mode.CACHED, 0))
            assert ledger.overflowed
        async with mount.server(store) as stage:
            _, handle = await stage.open("a")
            assert not is_passthrough(handle)
            await stage.vfs.release(handle)

    trio.run(main)


def test_blob_that_is_not_what_it_was_gives_an_open_inode_another_number(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            await warm(stage)
            inode, handle = await stage.open("a")
            assert is_passthrough(handle)
            (blob,) = [path for path in (mount.state / "blobs").rglob("*") if path.is_file()]
            with blob.open("r+b") as file:  # somebody writes into the cache: ctime differs from the seal
                file.write(DATA[:10])
            with pytest.raises(StaleInode):  # a cached open of this inode would be EIO
                await stage.vfs.open(inode, os.O_RDONLY)
            assert stage.notifier.forgotten == [(1, b"a")]
            fresh, cached = await stage.open("a")
            assert fresh != inode
            assert await stage.read_all(cached, len(DATA)) == DATA
            await stage.vfs.release(handle)
            await stage.vfs.release(cached)

    trio.run(main)


def test_refused_backing_file_is_an_ordinary_open(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            await warm(stage)
            stage.keeper.refuse = "Operation not permitted"
            _, handle = await stage.open("a")
            assert not is_passthrough(handle)
            assert await stage.read_all(handle, len(DATA)) == DATA
            await stage.vfs.release(handle)

    trio.run(main)


@pytest.mark.parametrize(
    ("flags", "disabled", "word"),
    [
        (wire.INIT_FLAGS["init_ext"], (), "kernel"),
        (None, ("passthrough",), "masked"),
    ],
)
def test_reason_is_shown_when_files_are_not_read_by_the_kernel(tmp_path, flags, disabled, word):
    mount = Mount(tmp_path, flags=flags)

    async def main():
        async with mount.server(MemoryStore({"a": DATA}), kernel_disable=disabled) as stage:
            await warm(stage)
            _, handle = await stage.open("a")
            assert not is_passthrough(handle)
            enabled, reasons = stage.vfs.passthrough_state()
            assert not enabled
            assert word in reasons[0]
            assert stage.notifier.forgotten == []
            await stage.vfs.release(handle)

    trio.run(main)
    os.close(mount.ledger_fd)


def test_self_check_that_cannot_read_its_file_is_a_reason_and_no_error(tmp_path):
    """There is no kernel mount here, so the reader finds nothing at the mount point."""

    mount = Mount(tmp_path, checked=False)

    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            (mount.state / "mnt").mkdir()
            await stage.vfs.check_passthrough()
            enabled, reasons = stage.vfs.passthrough_state()
            assert not enabled
            assert "No such file" in reasons[0]
            assert stage.keeper.ids == {}
            assert not list((mount.state / "blobs").glob(".cachefs*"))

    trio.run(main)
    os.close(mount.ledger_fd)


def test_refused_self_check_says_what_the_keeper_said(tmp_path):
    mount = Mount(tmp_path, checked=False)

    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            stage.keeper.refuse = "Too many levels of symbolic links"
            await stage.vfs.check_passthrough()
            assert stage.vfs.passthrough_state() == (False, ["Too many levels of symbolic links"])

    trio.run(main)
    os.close(mount.ledger_fd)


def test_a_server_that_ends_before_its_check_has_begun_ends_in_order(tmp_path):
    mount = Mount(tmp_path, checked=False)

    async def main():
        for _ in range(20):  # what a nursery starts and cancels at once has run or not: that is left to chance
            async with mount.server(MemoryStore({"a": DATA})) as stage:
                stage.vfs.check_passthrough_later()

    trio.run(main)
    os.close(mount.ledger_fd)


async def never(*arguments: object) -> str:
    """Passthrough._read_back() of a check that hangs."""
    await trio.sleep_forever()


async def works(*arguments: object) -> str:
    """Passthrough._read_back() where the kernel reads files by itself."""
    return ""


@pytest.fixture
def unchecked(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path, checked=False)
    yield mount
    os.close(mount.ledger_fd)


def test_opens_wait_for_the_check_of_a_server_whose_predecessor_did_not_finish_its_own(unchecked, monkeypatch):
    store = MemoryStore({"a": DATA})

    async def main():
        async with unchecked.server(store) as stage:
            await warm(stage)
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", never)
            stage.vfs.check_passthrough_later()
            await until(lambda: stage.vfs._passthrough.check_file is not None)
        (left,) = unchecked.keeper.ids.values()  # the keeper would refuse another file for the same inode
        assert left.node == SELF_CHECK_INODE
        file = unchecked.state / "blobs" / f"{SELF_CHECK_PREFIX}left"
        file.touch()
        async with unchecked.server(store) as stage, trio.open_nursery() as nursery:
            inode = (await stage.walk("a")).inode
            go, opened = trio.Event(), []

            async def read_back(*arguments: object) -> str:
                await go.wait()
                return ""

            async def open_it() -> None:
                opened.append(await stage.vfs.open(inode, os.O_RDONLY))

            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", read_back)
            stage.vfs.check_passthrough_later()
            nursery.start_soon(open_it)
            await until(lambda: stage.vfs._passthrough.check_file is not None)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert opened == []
            assert stage.keeper.closed == [left.backing_id]
            assert not file.exists()
            go.set()
            await until(lambda: opened)
            assert is_passthrough(opened[0].handle)
            assert stage.vfs.passthrough_state() == (True, [])
            await stage.vfs.release(opened[0].handle)
        async with unchecked.server(store) as stage:
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", never)
            stage.vfs.check_passthrough_later()
            with trio.fail_after(30):
                _, handle = await stage.open("a")
            assert is_passthrough(handle)  # what an earlier server saw is believed
            await stage.vfs.release(handle)

    trio.run(main)


async def opens_cached_at_once(stage: Stage, path: str) -> None:
    with trio.fail_after(30):
        _, handle = await stage.open(path)
    assert not is_passthrough(handle)
    await stage.vfs.release(handle)


def test_opens_do_not_wait_where_an_earlier_check_failed(unchecked, monkeypatch):
    store = MemoryStore({"a": DATA})

    async def main():
        async with unchecked.server(store) as stage:
            await warm(stage)
            stage.keeper.refuse = "Too many levels of symbolic links"
            await stage.vfs.check_passthrough()
            stage.keeper.refuse = ""
        monkeypatch.setattr(passthrough, "CHECK_WAIT_S", 3600.0)
        async with unchecked.server(store) as stage:
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", never)
            stage.vfs.check_passthrough_later()
            await opens_cached_at_once(stage, "a")

    trio.run(main)


def test_opens_wait_for_the_first_check_where_earlier_servers_could_not_make_one(unchecked, monkeypatch):
    """Their version had no extension module, say."""
    store = MemoryStore({"a": DATA})

    async def main():
        async with unchecked.server(store, kernel_disable=("passthrough",)) as stage:
            await warm(stage)
            stage.vfs.check_passthrough_later()
            await opens_cached_at_once(stage, "a")
        assert not Ledger(unchecked.ledger_fd).passthrough_check_ended
        async with unchecked.server(store) as stage:
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", works)
            stage.vfs.check_passthrough_later()
            _, handle = await stage.open("a")
            assert is_passthrough(handle)
            await stage.vfs.release(handle)

    trio.run(main)


def test_check_that_hangs_or_has_many_waiters_holds_up_no_more_opens(unchecked, monkeypatch):
    store = MemoryStore({"a": DATA, "b": DATA})

    async def main():
        async with unchecked.server(store) as stage:
            await warm(stage, "a")
            await warm(stage, "b")
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", never)
            monkeypatch.setattr(passthrough, "CHECK_WAIT_S", 3600.0)
            stage.vfs.check_passthrough_later()
            inode = (await stage.walk("a")).inode
            async with trio.open_nursery() as nursery:
                for _ in range(CHECK_WAITERS_MAX):
                    nursery.start_soon(stage.vfs.open, inode, os.O_RDONLY)
                await trio.testing.wait_all_tasks_blocked(0.05)
                for path in ("a", "b"):
                    await opens_cached_at_once(stage, path)
                nursery.cancel_scope.cancel()
        monkeypatch.setattr(passthrough, "CHECK_WAIT_S", 0.05)
        async with unchecked.server(store) as stage:
            monkeypatch.setattr(stage.vfs._passthrough, "_read_back", never)
            stage.vfs.check_passthrough_later()
            await opens_cached_at_once(stage, "a")

    trio.run(main)


def test_wait_for_a_check_is_counted_from_its_beginning():
    async def main():
        wait = CheckWait()
        await wait.wait()
        assert trio.current_time() == 0.0
        wait.begin()
        for _ in range(3):
            await wait.wait()
            assert trio.current_time() == passthrough.CHECK_WAIT_S
        wait.end()
        await wait.wait()
        assert not wait.running

    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)


def test_many_openers_at_once_share_one_backing_id(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            await warm(stage)
            inode = (await stage.walk("a")).inode
            handles = []

            async def open_it() -> None:
                handles.append((await stage.vfs.open(inode, os.O_RDONLY)).handle)

            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(open_it)
                assert len(set(handles)) == 1
                async with trio.open_nursery() as nursery:
                    for handle in handles:
                        nursery.start_soon(stage.vfs.release, handle)
                handles.clear()
            await until(lambda: stage.keeper.ids == {})

    trio.run(main)
