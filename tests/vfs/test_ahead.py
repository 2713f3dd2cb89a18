"""What is fetched before anybody reads it: small files and whole volumes, over real snapshots, cache and fills."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from cachefs import ahead as ahead_module
from cachefs.ahead import Ahead
from cachefs.chunk import CHUNK_BYTES, ObjectId
from cachefs.config import VolumeConfig
from cachefs.core import Core
from cachefs.errors import AccessDenied
from cachefs.pace import SPARE_START
from cachefs.snapshot import Volume
from tests.support.caches import config_for
from tests.support.memory_store import MemoryStore
from tests.vfs.stage import Mount, Stage
from tests.vfs.test_model_files import is_idle, notes_of, until

MIB = 1024 * 1024
SMALL = {"config.json": b"{}", "tokenizer.json": b"[1]", "merges.txt": b"a b"}
SHARDS = [f"model-{number}-of-10.safetensors" for number in (10, 9, 1, 2)]
MODEL = {**SMALL, **dict.fromkeys(SHARDS, bytes(2 * CHUNK_BYTES))}


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path)
    yield mount
    os.close(mount.ledger_fd)


@contextlib.asynccontextmanager
async def staged(mount: Mount, store: MemoryStore, **options: object) -> AsyncIterator[tuple[Stage, Ahead, Volume]]:
    """A server with one volume and what fetches ahead, which is told nothing of the volume yet."""
    volume_options = options.pop("volume", {})
    async with mount.server(buffers=34, **options) as stage, trio.open_nursery() as nursery:
        config = VolumeConfig(name="v0", source=store.url, **volume_options)
        volume = await stage.tree.add_volume(config, store)
        cache, snapshots = stage.cache, stage.tree._snapshots
        core = Core(
            config_for(mount.state, **options),
            index=cache._index,
            tier=cache._tier,
            offload=snapshots._offload,
            cache=cache,
            snapshots=snapshots,
            metrics=cache._metrics,
        )
        ahead = Ahead(core, stage.vfs.prefetcher)
        stage.tree.on_listed = ahead.listed
        nursery.start_soon(ahead.run)
        yield stage, ahead, volume
        nursery.cancel_scope.cancel()


def is_local(stage: Stage, store: MemoryStore, *names: str) -> bool:
    ids = [store.id_of(name) for name in names]
    return all(stage.cache.local_bytes(object_id) == object_id.size for object_id in ids)


async def settled(stage: Stage) -> None:
    """Until nothing is on its way and nobody is about to start something: listing, looking, fetching."""
    await trio.testing.wait_all_tasks_blocked(0.05)
    await until(is_idle(stage))


def test_small_files_of_a_model_come_at_the_mount_and_nothing_else(mount):
    store = MemoryStore({**MODEL, "notes.md": b"x", "big.json": bytes(CHUNK_BYTES + 1), "empty.json": b""})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            ahead.start(volume, "auto")
            await until(lambda: is_local(stage, store, *SMALL))
            await settled(stage)
            assert {path for path, _, _ in store.get_counts} == set(SMALL)
            assert store.list_count == 1

    trio.run(main)


def test_directory_that_is_no_model_has_nothing_fetched(mount):
    store = MemoryStore({"data.json": b"{}", "sub/config.json": b"{}", "sub/x/readme.txt": b"x"})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            ahead.start(volume, "auto")
            await until(lambda: store.list_count == 1)
            assert sorted(await stage.names(1)) == ["data.json", "sub"]
            await settled(stage)
            assert store.get_count == 0
            # The sub-directory is one, once somebody looks into it.
            await stage.names((await stage.walk("sub")).inode)
            await until(lambda: is_local(stage, store, "sub/config.json"))
            await stage.names((await stage.walk("sub/x")).inode)
            await settled(stage)
            assert store.get_count == 1

    trio.run(main)


def test_root_of_many_keys_is_not_listed_for_it(mount):
    store = MemoryStore({"config.json": b"{}"})
    store.put_many([f"key-{number:05}" for number in range(5000)])

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            ahead.start(volume, "auto")
            await until(lambda: store.list_count == 1)
            await settled(stage)
            assert store.list_count == 1
            assert store.get_count == 0
            assert len(await stage.names(1)) == 5001  # whoever looks has all of it, and starts it
            assert store.list_count == 7
            await until(lambda: is_local(stage, store, "config.json"))

    trio.run(main)


def test_look_that_comes_while_a_page_is_listed_for_it_lists_all(mount):
    store = MemoryStore()
    store.put_many([f"key-{number:05}" for number in range(3000)])

    async def main():
        async with staged(mount, store) as (stage, ahead, volume), trio.open_nursery() as nursery:
            with store.lists.held():
                ahead.start(volume, "auto")
                await until(lambda: store.lists.waiting == 1)
                names: list[str] = []

                async def look() -> None:
                    names.extend(await stage.names(1))

                nursery.start_soon(look)
                await trio.testing.wait_all_tasks_blocked(0.05)
            await until(lambda: len(names) == 3000)

    trio.run(main)


@pytest.mark.parametrize("prefetch", ["none", "auto", "all"])
def test_nothing_is_fetched_without_leave(mount, prefetch):
    """By option, offline, or because a pattern hides it."""
    store = MemoryStore(MODEL)
    offline = prefetch == "all"
    volume_options = {"prefetch": prefetch} if prefetch != "auto" else {"exclude": tuple(MODEL)}

    async def main():
        async with staged(mount, store, volume=volume_options, offline=offline) as (stage, ahead, volume):
            ahead.start(volume, prefetch)
            await stage.names(1)
            await settled(stage)
            assert store.get_count == 0

    trio.run(main)


def test_small_files_that_fail_are_not_asked_for_again(mount):
    store = MemoryStore({"config.json": b"{}", "x.safetensors": b"x"})
    store.get_errors.append(AccessDenied("no"))

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            ahead.start(volume, "auto")
            await until(lambda: store.get_count == 1)
            await settled(stage)
            await stage.names(1)
            await settled(stage)
            assert store.get_count <= 2  # at the mount, and at the first look

    trio.run(main)


def test_all_comes_in_load_order_and_is_sealed(mount):
    store = MemoryStore({**MODEL, "onnx/config.json": b"{}", "onnx/m.onnx": b"abc", "empty": b""})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            started = notes_of(stage)
            ahead.start(volume, "all")
            for path in store.objects:
                if path != "empty":
                    await stage.sealed(path)
            small = [(name, 0) for name in sorted(SMALL)]
            shards = [(f"model-{number}-of-10.safetensors", index) for number in (1, 2, 9, 10) for index in (0, 1)]
            assert started == [*small, *shards, ("config.json", 0), ("m.onnx", 0)]
            assert set(store.get_counts.values()) == {1}

    trio.run(main)


def test_all_has_many_gets_in_flight_and_a_reader_still_gets_its_own(mount):
    store = MemoryStore({"a.bin": bytes(40 * CHUNK_BYTES), "b.bin": b"read me"})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            with store.gets.held():
                ahead.start(volume, "all")
                await until(lambda: store.gets.waiting >= SPARE_START)
                started = notes_of(stage)
                _, handle = await stage.open("a.bin")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stage.vfs.read, handle, 30 * CHUNK_BYTES, 4096)
                    await until(lambda: ("a.bin", 30) in started)
                    store.gets.open()
            await stage.sealed("a.bin")
            assert set(store.get_counts.values()) == {1}

    trio.run(main)


def test_all_goes_on_after_an_outage(mount, monkeypatch):
    monkeypatch.setattr(ahead_module, "PAUSE_S", (0.01, 0.05))
    store = MemoryStore(MODEL)

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            await stage.names(1)
            store.unavailable = True
            ahead.start(volume, "all")
            await until(lambda: store.get_count >= 2)
            store.unavailable = False
            for path in store.objects:
                await stage.sealed(path)

    trio.run(main)


def test_all_ends_when_the_credentials_are_refused_and_skips_what_changed(mount, monkeypatch):
    monkeypatch.setattr(ahead_module, "PAUSE_S", (0.01, 0.05))
    store = MemoryStore(MODEL)

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            await stage.names(1)
            store.put("tokenizer.json", b"[2, 3]")  # another version than the one that is shown
            ahead.start(volume, "all")
            for path in store.objects:
                if path != "tokenizer.json":
                    await stage.sealed(path)
            await until(lambda: not ahead._sweeping)
            store.get_errors.extend([AccessDenied("no")] * 1000)
            await stage.cache.evict(None)
            before = store.get_count
            ahead.start(volume, "all")
            await until(lambda: store.get_count > before)
            await until(lambda: not ahead._sweeping)
            assert store.get_count - before <= ahead_module.FAILURES_MAX + 2

    trio.run(main)


def test_all_stops_where_the_cache_is_full(mount):
    store = MemoryStore({f"{number}.bin": bytes(4 * CHUNK_BYTES) for number in range(5)})

    async def main():
        async with staged(mount, store, cache_bytes_max=10 * CHUNK_BYTES) as (stage, ahead, volume):
            ahead.start(volume, "all")
            await until(lambda: is_local(stage, store, "0.bin", "1.bin"))
            await until(lambda: not ahead._sweeping)
            assert {path for path, _, _ in store.get_counts} == {"0.bin", "1.bin"}
            assert set(store.get_counts.values()) == {1}

    trio.run(main)


def test_all_ends_with_its_volume(mount):
    store = MemoryStore({"a.bin": bytes(40 * CHUNK_BYTES)})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            with store.gets.held():
                ahead.start(volume, "all")
                await until(lambda: store.gets.waiting >= SPARE_START)
                ahead.stop(volume)
                await until(lambda: not ahead._sweeping)
            await until(is_idle(stage))
            await settled(stage)
            assert store.get_count < 40

    trio.run(main)


def test_sweep_that_ends_leaves_the_mark_of_the_next_one(mount):
    store = MemoryStore({"a.bin": bytes(40 * CHUNK_BYTES)})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            with store.gets.held():
                ahead.start(volume, "all")
                await until(lambda: volume in ahead._sweeping)
                first = ahead._sweeping[volume]
                ahead.stop(volume)
                ahead.start(volume, "all")
                await until(lambda: ahead._sweeping.get(volume) not in (None, first))
                await until(lambda: len(ahead._scopes[volume]) == 1)  # the first one has ended
                assert volume in ahead._sweeping
                ahead.stop(volume)
            await until(is_idle(stage))

    trio.run(main)


def test_small_files_come_when_a_later_pod_of_the_volume_wants_them(mount):
    store = MemoryStore({"a/config.json": b"{}", "b/config.json": b"{}", "c/config.json": b"{}"})

    async def main():
        async with staged(mount, store, volume={"prefetch": "none"}) as (stage, ahead, volume):
            ahead.start(volume, "none")
            await stage.names((await stage.walk("a")).inode)
            await settled(stage)
            assert store.get_count == 0
            ahead.start(volume, "auto")
            await stage.names((await stage.walk("b")).inode)
            await until(lambda: is_local(stage, store, "b/config.json"))
            ahead.stop(volume)
            ahead.start(volume, "none")
            await stage.names((await stage.walk("c")).inode)
            await settled(stage)
            assert store.get_count == 1

    trio.run(main)


def test_volume_whose_small_files_hang_holds_no_worker_again(mount, monkeypatch):
    monkeypatch.setattr(ahead_module, "SMALL_WAIT_S", 0.01)
    store = MemoryStore({"a/config.json": b"{}", "b/config.json": b"{}"})

    async def main():
        async with staged(mount, store) as (stage, ahead, volume):
            asked: list[str] = []

            class Hanging:
                async def fetch(self, store: object, object_id: ObjectId, index: int) -> None:
                    asked.append(object_id.path)
                    await trio.sleep_forever()

            ahead._prefetcher = Hanging()
            ahead.start(volume, "auto", look=False)
            await stage.names((await stage.walk("a")).inode)
            await until(lambda: volume in ahead._late_s)
            monkeypatch.setattr(ahead_module, "SMALL_WAIT_S", 600.0)
            await stage.names((await stage.walk("b")).inode)
            await settled(stage)
            assert len(asked) == 1
            ahead.stop(volume)
            assert not ahead._late_s

    trio.run(main)


def test_all_throws_out_what_others_left_and_not_its_own(mount):
    mine = MemoryStore({f"{number}.bin": bytes(4 * CHUNK_BYTES) for number in range(2)})
    other = MemoryStore({"other.bin": bytes(4 * CHUNK_BYTES)}, bucket="other")

    async def main():
        async with staged(mount, mine, cache_bytes_max=9 * CHUNK_BYTES) as (stage, ahead, volume):
            for index in range(4):  # the volume's own first, so that it is the least recently used
                await stage.cache.ensure(mine, mine.id_of("0.bin"), index)
            for index in range(4):
                await stage.cache.ensure(other, other.id_of("other.bin"), index)
            ahead.start(volume, "all")
            await until(lambda: is_local(stage, mine, "0.bin", "1.bin"))
            await until(lambda: not ahead._sweeping)
            assert set(mine.get_counts.values()) == {1}
            assert not stage.cache.local_bytes(other.id_of("other.bin"))

    trio.run(main)
