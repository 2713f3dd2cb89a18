"""The tree by example: numbers over restarts and SIGKILL, single flight, change, speed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.config import VolumeConfig
from cachefs.errors import IsADirectory, NotADirectory, NotFound, StaleInode, StoreUnavailable, UsageError
from cachefs.index import Index
from cachefs.offload import Offload
from cachefs.snapshot import Snapshots
from cachefs.tree import ROOT_INODE, Node, Tree, Volume
from tests.support.memory_store import MemoryStore

DEADLINE_S = 50.0
REPOSITORY = Path(__file__).parents[2]


class Threads(Offload):
    """Counts the ways into a thread."""

    calls = 0

    async def store(self, function, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        self.calls += 1
        return await super().store(function, *args, **kwargs)

    async def index(self, function, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        self.calls += 1
        return await super().index(function, *args, **kwargs)


class Bench:
    def __init__(self, index: Index) -> None:
        self.index = index
        self.offload = Threads()

    def run(
        self,
        store: MemoryStore,
        body: Callable[[Tree, Volume], Awaitable[None]],
        *,
        session: str = "one",
        volumes_at_root: bool = True,
        **options: object,
    ) -> None:
        """One server's life with one volume `v`."""

        async def main() -> None:
            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    snapshots = Snapshots(
                        self.index, self.offload, session=session, backoff_s=(0.001, 0.01), list_deadline_s=1.0
                    )
                    tree = Tree(self.index, self.offload, snapshots, volumes_at_root=volumes_at_root)
                    await nursery.start(snapshots.run)
                    await nursery.start(tree.run)
                    config = VolumeConfig(name="v", source=store.url, **options)  # type: ignore[arg-type]
                    await body(tree, await tree.add_volume(config, store))
                    tree.check_invariants()
                    nursery.cancel_scope.cancel()

        trio.run(main)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    index = Index(tmp_path / "index")
    yield Bench(index)
    index.close()


async def find(tree: Tree, volume: Volume, path: str) -> Node:
    node = tree.node(volume.root_inode)
    for name in path.split("/"):
        node = await tree.lookup(node.inode, name)
    return node


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await trio.sleep(0.01)


def test_root_lists_volumes_by_name(bench: Bench) -> None:
    async def body(tree: Tree, volume: Volume) -> None:
        other = await tree.add_volume(VolumeConfig(name="a", source="memory://"), MemoryStore({"x": b""}))
        assert [name for name, _ in await tree.children(ROOT_INODE)] == ["a", "v"]
        node = await tree.lookup(ROOT_INODE, "v")
        assert (node.inode, node.view, node.path, node.parent) == (volume.root_inode, "v", "", ROOT_INODE)
        assert ROOT_INODE not in (volume.root_inode, other.root_inode)
        with pytest.raises(NotFound):
            await tree.lookup(ROOT_INODE, "b")
        with pytest.raises(UsageError):
            await tree.add_volume(VolumeConfig(name="v", source="memory://"), MemoryStore())
        with pytest.raises(UsageError):
            await tree.add_volume(VolumeConfig(name="v/w", source="memory://"), MemoryStore())
        assert await tree.refresh_directory(ROOT_INODE) == []

    bench.run(MemoryStore({"x": b""}), body)


def test_one_volume_can_be_the_root_itself(bench: Bench) -> None:
    async def body(tree: Tree, volume: Volume) -> None:
        assert volume.root_inode == ROOT_INODE
        node = await tree.lookup(ROOT_INODE, "d")
        assert (await tree.lookup(node.inode, "x")).parent == node.inode
        assert tree.node(ROOT_INODE).is_directory
        with pytest.raises(UsageError):
            await tree.add_volume(VolumeConfig(name="w", source="memory://"), MemoryStore())
        tree.remove_volume("v")
        with pytest.raises(StaleInode):
            tree.node(ROOT_INODE)

    bench.run(MemoryStore({"d/x": b"1"}), body, volumes_at_root=False)


def test_lookup_says_what_is_wrong(bench: Bench) -> None:
    async def body(tree: Tree, volume: Volume) -> None:
        file = await find(tree, volume, "d/x")
        with pytest.raises(NotADirectory):
            await tree.lookup(file.inode, "y")
        with pytest.raises(NotADirectory):
            await tree.children(file.inode)
        with pytest.raises(NotFound):
            await tree.lookup(file.parent, "nothing")
        with pytest.raises(IsADirectory):
            await tree.replace(file.parent)
        for never in (0, 999_999, 2**32, 2**40, -1):
            with pytest.raises(NotFound):
                tree.node(never)

    bench.run(MemoryStore({"d/x": b"1"}), body)


def test_numbers_are_the_same_after_a_restart_and_in_the_next_session(bench: Bench) -> None:
    store = MemoryStore({"a": b"1", "d/x": b"22", "d/e/y": b"333"})
    numbers: list[list[int]] = []

    async def body(tree: Tree, volume: Volume) -> None:
        nodes = [await find(tree, volume, path) for path in ("a", "d", "d/x", "d/e", "d/e/y")]
        numbers.append([volume.root_inode, *(node.inode for node in nodes)])

    bench.run(store, body)
    bench.run(store, body)
    bench.run(store, body, session="two")
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers[0])) == 6


def test_restarted_server_serves_a_number_without_a_list(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"22"})
    told: list[Node] = []

    async def body(tree: Tree, volume: Volume) -> None:
        told.append(await find(tree, volume, "d/x"))

    bench.run(store, body)
    store.unavailable = True
    calls = bench.offload.calls

    async def again(tree: Tree, volume: Volume) -> None:
        added = bench.offload.calls
        node = tree.node(told[0].inode)
        assert (node.path, node.object_id, node.size, node.parent) == (
            "d/x",
            store.id_of("d/x"),
            2,
            told[0].parent,
        )
        assert not node.superseded
        assert bench.offload.calls == added

    bench.run(store, again)
    assert bench.offload.calls > calls


def test_frozen_directory_is_answered_without_store_and_thread(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1", "d/y": b"2"})

    async def body(tree: Tree, volume: Volume) -> None:
        directory = await find(tree, volume, "d")
        await tree.children(directory.inode)
        lists, calls = store.list_count, bench.offload.calls
        with store.lists.held(), trio.CancelScope() as scope:
            scope.cancel()  # anything that waits is cancelled at once
            assert (await tree.lookup(directory.inode, "x")).size == 1
            assert len(await tree.children(directory.inode)) == 2
            with pytest.raises(NotFound):
                await tree.lookup(directory.inode, "z")
        assert not scope.cancelled_caught
        assert (store.list_count, bench.offload.calls) == (lists, calls)

    bench.run(store, body)


def test_many_lookups_in_a_new_directory_share_one_listing(bench: Bench) -> None:
    store = MemoryStore({f"d/{n}": b"1" for n in range(50)})

    async def body(tree: Tree, volume: Volume) -> None:
        directory = await find(tree, volume, "d")
        found: list[Node] = []
        cancelled = trio.CancelScope()

        async def look(name: str) -> None:
            found.append(await tree.lookup(directory.inode, name))

        async def first() -> None:
            with cancelled:
                await look("0")

        with store.lists.held():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await until(lambda: store.lists.waiting == 1)
                for n in range(50):
                    nursery.start_soon(look, str(n))
                cancelled.cancel()
                await until(lambda: cancelled.cancelled_caught)
                store.lists.open()
        assert len({node.inode for node in found}) == 50
        assert store.list_counts["d"] == 1

    bench.run(store, body)


def test_failed_listing_is_not_remembered(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1"})

    async def body(tree: Tree, volume: Volume) -> None:
        directory = await find(tree, volume, "d")
        store.unavailable = True
        with pytest.raises(StoreUnavailable):
            await tree.lookup(directory.inode, "x")
        store.unavailable = False
        assert (await tree.lookup(directory.inode, "x")).size == 1

    bench.run(store, body)


def test_changed_object_gets_a_new_number_on_refresh(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1", "d/gone": b"1", "d/same": b"1"})

    async def body(tree: Tree, volume: Volume) -> None:
        old = await find(tree, volume, "d/x")
        gone = await find(tree, volume, "d/gone")
        same = await find(tree, volume, "d/same")
        listing = await tree.children(old.parent)
        old_id = store.id_of("d/x")
        store.put("d/x", b"22")
        store.delete("d/gone")
        store.put("d/new", b"1")
        changed = await tree.refresh_directory(old.parent)
        assert sorted(changed) == [(old.parent, "gone"), (old.parent, "x")]
        assert old.superseded
        assert gone.superseded
        assert not same.superseded
        assert old.object_id == old_id
        new = await find(tree, volume, "d/x")
        assert new.inode > old.inode
        assert (new.size, new.object_id, new.superseded) == (2, store.id_of("d/x"), False)
        assert (await find(tree, volume, "d/same")) is same
        assert (await find(tree, volume, "d/new")).size == 1
        # A listing that a readdir is in the middle of does not move, and knows what is superseded.
        assert [(name, node.superseded) for name, node in listing] == [("gone", True), ("same", False), ("x", True)]
        assert await tree.refresh_directory(old.parent) == []

    bench.run(store, body)

    async def restarted(tree: Tree, volume: Volume) -> None:
        assert [name for name, _ in await tree.children((await find(tree, volume, "d")).inode)] == ["new", "same", "x"]

    bench.run(store, restarted)


def test_superseded_numbers_are_known_as_such_after_a_restart(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1"})
    told: list[Node] = []

    async def body(tree: Tree, volume: Volume) -> None:
        told.append(await find(tree, volume, "d/x"))
        store.put("d/x", b"22")
        await tree.refresh_directory(told[0].parent)

    bench.run(store, body)

    async def again(tree: Tree, volume: Volume) -> None:
        node = tree.node(told[0].inode)
        assert node.superseded
        assert node.object_id == told[0].object_id
        assert not (await find(tree, volume, "d/x")).superseded

    bench.run(store, again)


def test_replace_publishes_the_same_version_under_a_new_number(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1"})
    numbers: list[int] = []

    async def body(tree: Tree, volume: Volume) -> None:
        old = await find(tree, volume, "d/x")
        new = await tree.replace(old.inode)
        assert (new.inode > old.inode, new.object_id) == (True, old.object_id)
        assert old.superseded
        assert await find(tree, volume, "d/x") is new
        assert (await tree.children(old.parent))[0] == ("x", new)
        assert await tree.replace(old.inode) is new
        numbers.append(new.inode)

    bench.run(store, body)

    async def again(tree: Tree, volume: Volume) -> None:
        numbers.append((await find(tree, volume, "d/x")).inode)

    bench.run(store, again)
    bench.run(store, again, session="two")
    assert len(set(numbers)) == 1


def test_refreshes_at_once_list_at_most_twice_and_tell_each_change_once_at_least(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1"})

    async def body(tree: Tree, volume: Volume) -> None:
        node = await find(tree, volume, "d/x")
        store.put("d/x", b"2")
        results: list[list[tuple[int, str]]] = []

        async def refresh() -> None:
            results.append(await tree.refresh_directory(node.parent))

        with store.lists.held():
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(refresh)
                await trio.testing.wait_all_tasks_blocked()
                store.lists.open()
        # The first one's listing may be older than the change that the others saw: they share a second one.
        assert sorted(results) == [[], [], [], [], [(node.parent, "x")]]
        assert store.list_counts["d"] == 3

    bench.run(store, body)


def test_removed_volume_is_stale_and_the_same_when_it_comes_back(bench: Bench) -> None:
    store = MemoryStore({"d/x": b"1"})

    async def body(tree: Tree, volume: Volume) -> None:
        node = await find(tree, volume, "d/x")
        tree.remove_volume("v")
        assert node.superseded  # a holder sees it
        for call in (tree.node, tree.volume):
            with pytest.raises((StaleInode, NotFound)):
                call(node.inode if call == tree.node else "v")  # type: ignore[operator]
        with pytest.raises(StaleInode):
            await tree.lookup(node.parent, "x")
        volume = await tree.add_volume(VolumeConfig(name="v", source=store.url), store)
        assert (await find(tree, volume, "d/x")).inode == node.inode

    bench.run(store, body)


def test_another_source_under_the_same_name_gets_other_file_numbers(bench: Bench) -> None:
    numbers: list[int] = []

    async def body(tree: Tree, volume: Volume) -> None:
        numbers.append((await find(tree, volume, "x")).inode)

    bench.run(MemoryStore({"x": b"1"}, bucket="one"), body)
    bench.run(MemoryStore({"x": b"1"}, bucket="two"), body, session="two")
    assert numbers[0] != numbers[1]


def test_collision_is_shown_as_file_and_directory(bench: Bench) -> None:
    store = MemoryStore({"a": b"file", "a/b": b"under"})

    async def body(tree: Tree, volume: Volume) -> None:
        assert (await find(tree, volume, "a")).is_directory
        assert (await find(tree, volume, "a/b")).object_id == store.id_of("a/b")
        assert (await find(tree, volume, "a~file")).object_id == store.id_of("a")

    bench.run(store, body)


def test_include_applies_to_the_tree(bench: Bench) -> None:
    store = MemoryStore({"m.bin": b"1", "m.safetensors": b"2", "d/m.safetensors": b"3", "d/x": b"4"})

    async def body(tree: Tree, volume: Volume) -> None:
        assert [name for name, _ in await tree.children(volume.root_inode)] == ["d", "m.safetensors"]
        with pytest.raises(NotFound):
            await find(tree, volume, "d/x")

    bench.run(store, body, include=("*.safetensors",))


def test_100_000_files_in_a_directory_are_ready_in_time(bench: Bench) -> None:
    store = MemoryStore()
    store.put_many([f"d/file-{n:06d}.bin" for n in range(100_000)])
    took: list[float] = []

    async def body(tree: Tree, volume: Volume) -> None:
        directory = await find(tree, volume, "d")
        started = time.monotonic()
        children = await tree.children(directory.inode)
        took.append(time.monotonic() - started)
        assert len(children) == 100_000
        assert children[99_999][0] == "file-099999.bin"

    bench.run(store, body)
    bench.run(store, body)
    # 3 s is what it should take; this machine may be doing much else.
    assert min(took) < 10, took


KILLED = """
import sys, trio
from pathlib import Path
from cachefs.config import VolumeConfig
from cachefs.index import Index
from cachefs.offload import Offload
from cachefs.snapshot import Snapshots
from cachefs.tree import Tree
from tests.support.memory_store import MemoryStore

async def main():
    store = MemoryStore()
    for d in range(1000):
        store.put_many([f"{d}/{n}" for n in range(20)])
    index, offload = Index(Path(sys.argv[1])), Offload()
    async with trio.open_nursery() as nursery:
        snapshots = Snapshots(index, offload, session="s")
        tree = Tree(index, offload, snapshots, volumes_at_root=True)
        await nursery.start(snapshots.run)
        await nursery.start(tree.run)
        volume = await tree.add_volume(VolumeConfig(name="v", source="memory://"), store)
        for number in range(1000):
            directory = await tree.lookup(volume.root_inode, str(number))
            for name, node in await tree.children(directory.inode):
                if number % 7 == 0 and name == "3":
                    node = await tree.replace(node.inode)
                print(node.inode, node.path, flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("lines", [1, 200, 1999])
def test_numbers_told_before_a_sigkill_are_never_given_to_anything_else(tmp_path: Path, lines: int) -> None:
    told: dict[int, str] = {}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, os.fspath(tmp_path / "index")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)},
        )
        assert process.stdout is not None
        try:
            for count, line in enumerate(process.stdout, 1):
                inode, path = line.split()
                assert told.setdefault(int(inode), path) == path
                if count == lines:
                    process.send_signal(signal.SIGKILL)
                    break
            # What it had told before it died counts as well.
            for line in process.stdout:
                if line.endswith("\n"):
                    inode, path = line.split()
                    assert told.setdefault(int(inode), path) == path
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()
        assert process.returncode == -signal.SIGKILL
    index = Index(tmp_path / "index")
    try:
        bench = Bench(index)

        async def body(tree: Tree, volume: Volume) -> None:
            assert {inode: tree.node(inode).path for inode in told} == told

        bench.run(MemoryStore({"x": b""}), body, session="s")
    finally:
        index.close()
