"""Names, attributes, listings and reads, over a real tree and cache."""

import os
import random
from collections.abc import Iterator

import pytest
import trio

from cachefs.chunk import CHUNK_BYTES
from cachefs.errors import IsADirectory, NotADirectory, NotFound, ObjectChanged, ReadOnly
from tests.support.caches import BusyDisk
from tests.support.memory_store import MemoryStore
from tests.vfs.stage import Mount

DATA = os.urandom(CHUNK_BYTES + 54321)


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path)
    yield mount
    os.close(mount.ledger_fd)


def test_attributes_say_what_the_listing_said(mount):
    store = MemoryStore({"a.bin": DATA, "sub/b c ü.txt": b"hello"})

    async def main():
        async with mount.server(store) as stage:
            root = stage.vfs.getattr(1)
            assert (root.inode, root.is_directory, root.uid, root.gid) == (1, True, 11, 12)
            file = await stage.walk("a.bin")
            assert (file.is_directory, file.size, file.uid, file.gid) == (False, len(DATA), 11, 12)
            assert file.modified_ns == int(store.modified_s["a.bin"]) * 10**9
            assert (await stage.walk("sub")).is_directory
            assert (await stage.walk("sub/b c ü.txt")).size == 5
            assert stage.vfs.getattr(file.inode) == file
            with pytest.raises(NotFound):
                await stage.walk("sub/nothing")
            with pytest.raises(NotADirectory):
                await stage.walk("a.bin/x")
            with pytest.raises(NotFound):
                stage.vfs.getattr(4_000_000_000)

    trio.run(main)


def test_dot_and_dotdot_are_looked_up(mount):
    async def main():
        async with mount.server(MemoryStore({"sub/deep/a": b"x"})) as stage:
            deep = await stage.walk("sub/deep")
            sub = await stage.walk("sub")
            assert (await stage.vfs.lookup(deep.inode, b".")).inode == deep.inode
            assert (await stage.vfs.lookup(deep.inode, b"..")).inode == sub.inode
            assert (await stage.vfs.lookup(sub.inode, b"..")).inode == 1
            assert (await stage.vfs.lookup(1, b"..")).inode == 1

    trio.run(main)


def test_volumes_show_at_the_root(tmp_path):
    mount = Mount(tmp_path, at_root=True)

    async def main():
        async with mount.server(
            MemoryStore({"a": b"x"}, bucket="one"), MemoryStore({"b": b"yy"}, bucket="two")
        ) as stage:
            assert await stage.names(1) == ["v0", "v1"]
            assert (await stage.walk("v1/b")).size == 2
            assert (await stage.vfs.lookup((await stage.walk("v1")).inode, b"..")).inode == 1

    trio.run(main)
    os.close(mount.ledger_fd)


def test_listing_goes_on_at_any_offset_also_in_the_next_server(mount):
    names = sorted(f"file-{number:04}" for number in range(1000))
    store = MemoryStore(dict.fromkeys(names, b"x"))

    async def main():
        async with mount.server(store) as stage:
            handle = stage.vfs.opendir(1)
            first = await stage.names(1, handle, most=300)
            rest = await stage.names(1, handle, start=300)
            assert first + rest == names
        async with mount.server(store) as stage:
            assert await stage.names(1, handle, start=300) == names[300:]
            stage.vfs.releasedir(handle)
            assert await stage.names(1, stage.vfs.opendir(1), start=999) == names[999:]
            assert await stage.names(1, stage.vfs.opendir(1), start=1000) == []

    trio.run(main)


def test_open_listing_is_not_shifted_by_a_refresh(mount):
    store = MemoryStore({"b": b"x", "c": b"x", "d": b"x"})

    async def main():
        async with mount.server(store) as stage:
            handle = stage.vfs.opendir(1)
            assert await stage.names(1, handle, most=1) == ["b"]
            store.put("a", b"new")
            await stage.tree.refresh_directory(1)
            assert await stage.names(1, handle, start=1) == ["c", "d"]
            assert await stage.names(1, handle) == ["a", "b", "c", "d"]  # after rewinddir()

    trio.run(main)


def test_only_reading_is_opened(mount):
    async def main():
        async with mount.server(MemoryStore({"a": b"x", "sub/b": b"y"})) as stage:
            inode = (await stage.walk("a")).inode
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
                with pytest.raises(ReadOnly):
                    await stage.vfs.open(inode, flags)
            with pytest.raises(IsADirectory):
                await stage.vfs.open((await stage.walk("sub")).inode, os.O_RDONLY)
            with pytest.raises(NotADirectory):
                stage.vfs.opendir(inode)

    trio.run(main)


def test_reads_at_random_offsets_give_the_bytes_and_end_with_the_file(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA, "empty": b""})) as stage:
            _, handle = await stage.open("a")
            generator = random.Random(7)
            for _ in range(200):
                offset = generator.randrange(len(DATA) + 1000)
                length = generator.choice((1, 4096, 131072, 1 << 20))
                assert bytes(await stage.vfs.read(handle, offset, length)) == DATA[offset : offset + length]
            _, empty = await stage.open("empty")
            assert bytes(await stage.vfs.read(empty, 0, 4096)) == b""
            await stage.vfs.release(handle)
            await stage.vfs.release(empty)

    trio.run(main)


def test_read_with_the_handle_of_a_dead_server(mount):
    store = MemoryStore({"a": DATA})

    async def main():
        async with mount.server(store, drain=False) as stage:
            _, handle = await stage.open("a")
            await stage.vfs.read(handle, 0, 10)
        async with mount.server(store) as stage:
            assert await stage.read_all(handle, len(DATA)) == DATA
            await stage.vfs.release(handle)

    trio.run(main)


def test_open_object_is_not_evicted_also_not_by_the_next_server(mount):
    store = MemoryStore({"a": b"x" * 1000})

    async def main():
        async with mount.server(store) as stage:
            inode, handle = await stage.open("a")
            await stage.read_all(handle, 1000)
            await stage.sealed("a")
            object_id = stage.tree.node(inode).object_id
            assert (await stage.cache.evict([object_id])).evicted_objects == 0
        async with mount.server(store) as stage:
            assert (await stage.cache.evict([object_id])).evicted_objects == 0
            await stage.vfs.release(handle)
            stage.notifier.known_to_kernel = set()
            with trio.fail_after(30):  # the last thing that the killed server counted is certain only then
                while not (await stage.cache.evict([object_id])).evicted_objects:
                    await trio.sleep(0.05)

    trio.run(main)


def test_changed_object_fails_its_handle_and_shows_anew_after_one_list(mount):
    big = os.urandom(3 * CHUNK_BYTES)
    store = MemoryStore({"a": big, "b": b"same"})

    async def main():
        async with mount.server(store) as stage:
            inode, handle = await stage.open("a")
            # In the middle: a reader that starts there gets no readahead, so that the rest stays away.
            first = bytes(await stage.vfs.read(handle, CHUNK_BYTES, 4096))
            store.put("a", big[::-1])
            before = store.list_count
            failed = []

            async def read_tail() -> None:
                try:
                    await stage.vfs.read(handle, 2 * CHUNK_BYTES + 100, 4096)
                except ObjectChanged as exc:
                    failed.append(exc)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(read_tail)
            assert len(failed) == 20
            assert store.list_count == before + 1
            assert stage.notifier.forgotten == [(1, b"a")]
            fresh, fresh_handle = await stage.open("a")
            assert fresh != inode
            assert await stage.read_all(fresh_handle, len(big)) == big[::-1]
            assert bytes(await stage.vfs.read(handle, CHUNK_BYTES, 4096)) == first  # its own version, from the cache
            await stage.vfs.release(fresh_handle)
            await stage.vfs.release(handle)

    trio.run(main)


def test_object_that_is_gone_fails_its_handle_as_stale_and_leaves_the_listing(mount):
    store = MemoryStore({"a": DATA, "b": b"same"})

    async def main():
        async with mount.server(store) as stage:
            _, handle = await stage.open("a")
            store.delete("a")
            with pytest.raises(ObjectChanged):
                await stage.vfs.read(handle, CHUNK_BYTES, 4096)
            assert stage.notifier.forgotten == [(1, b"a")]
            assert await stage.names(1) == ["b"]
            await stage.vfs.release(handle)

    trio.run(main)


def test_hung_source_holds_up_no_other_volume_and_no_bytes_that_are_here(tmp_path):
    mount = Mount(tmp_path, at_root=True)
    hung = MemoryStore({"big": DATA, "local": b"here", "buffered": b"not written yet"}, bucket="hung")
    other = MemoryStore({"file": b"other bytes"}, bucket="other")
    disk = BusyDisk(tmp_path / "blobs")

    async def main():
        async with mount.server(hung, other, tier=disk) as stage:
            _, local = await stage.open("v0/local")
            await stage.vfs.read(local, 0, 10)
            await stage.sealed("v0/local")
            disk.writes.clear()
            _, buffered = await stage.open("v0/buffered")
            await stage.vfs.read(buffered, 0, 3)
            _, handle = await stage.open("v0/big")
            got = []

            async def read(number: int) -> None:
                got.append(bytes(await stage.vfs.read(handle, number * 4096, 4096)) == DATA[number * 4096 :][:4096])

            with hung.gets.held():
                async with trio.open_nursery() as nursery:
                    for number in range(1000):
                        nursery.start_soon(read, number)
                    with trio.fail_after(30):
                        while not hung.gets.waiting:
                            await trio.sleep(0.005)
                        assert bytes(await stage.vfs.read(local, 0, 10)) == b"here"
                        assert bytes(await stage.vfs.read(buffered, 4, 7)) == b"written"
                        _, quick = await stage.open("v1/file")
                        assert bytes(await stage.vfs.read(quick, 0, 100)) == b"other bytes"
                        assert (await stage.walk("v0/big")).size == len(DATA)
                    assert got == []
                    hung.gets.open()
                    disk.writes.set()
            assert got == [True] * 1000

    trio.run(main)
    os.close(mount.ledger_fd)


def test_statfs_shows_the_local_tier(mount):
    async def main():
        async with mount.server(MemoryStore({"a": DATA})) as stage:
            before = stage.vfs.statfs()
            assert before.blocks * 4096 == 1024 * 1024 * 1024
            _, handle = await stage.open("a")
            await stage.read_all(handle, len(DATA))
            await stage.sealed("a")
            assert before.free_blocks - stage.vfs.statfs().free_blocks >= len(DATA) // 4096

    trio.run(main)
