"""A state machine over Tree, Snapshots and the index against a model of plain dicts.

What must hold whatever happens: a number that was told means the same for ever, no number is told for two
things, directories keep their numbers, a frozen directory does not change until it is refreshed, and a server
that takes over shows what the one before it showed.
"""

import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachefs.chunk import ObjectId
from cachefs.config import VolumeConfig
from cachefs.errors import NotFound
from cachefs.index import Index
from cachefs.offload import Offload
from cachefs.snapshot import Snapshots
from cachefs.tree import Node, Tree
from tests.support.memory_store import MemoryStore

T = TypeVar("T")
Meaning = tuple[str, ObjectId | None]
KEYS = ("a", "b", "a/q", "d/x", "d/y", "d/e", "d/e/z", "d/e/w")
DIRECTORIES = ("", "a", "d", "d/e")
CALL_S = 30.0


class Server:
    """A Tree in a trio loop of its own thread; calls come from the test's thread."""

    def __init__(self, index: Index, store: MemoryStore, session: str) -> None:
        self._index = index
        self._store = store
        self._session = session
        self._ready = threading.Event()
        self._stop = trio.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        assert self._ready.wait(CALL_S)

    async def _main(self) -> None:
        offload = Offload()
        async with trio.open_nursery() as nursery:
            snapshots = Snapshots(self._index, offload, session=self._session)
            self.tree = Tree(self._index, offload, snapshots, volumes_at_root=True)
            await nursery.start(snapshots.run)
            await nursery.start(self.tree.run)
            self.volume = await self.tree.add_volume(VolumeConfig(name="v", source=self._store.url), self._store)
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        async def bounded() -> T:
            with trio.fail_after(CALL_S):
                return await function(*args)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def call_sync(self, function: Callable[..., T], *args: object) -> T:
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def stop(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(CALL_S)
        assert not self._thread.is_alive()


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.index = Index(self.directory)
        self.store = MemoryStore(dict.fromkeys(KEYS, b""))
        self.sessions = 0
        self.server = Server(self.index, self.store, "0")
        self.frozen: dict[str, dict[str, ObjectId | None]] = {}
        """directory -> name -> ObjectId (None: a directory); of this session"""
        self.told: dict[int, Meaning] = {}
        """every number ever told -> (path, ObjectId), by any server"""
        self.current: dict[str, int] = {}
        """path of a directory -> its number"""
        self.files: dict[str, int] = {}
        """path of a file -> its newest number"""
        self.held: list[Node] = []

    def teardown(self) -> None:
        self.server.stop()
        self.index.close()
        shutil.rmtree(self.directory)

    # The model

    def _shown_now(self, directory: str) -> dict[str, ObjectId | None]:
        base = f"{directory}/" if directory else ""
        under = [key[len(base) :] for key in self.store.objects if key.startswith(base)]
        shown: dict[str, ObjectId | None] = {key.split("/")[0]: None for key in under if "/" in key}
        for key in under:
            if "/" not in key:
                shown[f"{key}~file" if key in shown else key] = self.store.id_of(base + key)
        return shown

    def _freeze(self, directory: str) -> dict[str, ObjectId | None]:
        if directory not in self.frozen:
            self.frozen[directory] = self._shown_now(directory)
        return self.frozen[directory]

    def _tell(self, node: Node) -> None:
        meaning = (node.path, node.object_id)
        assert self.told.setdefault(node.inode, meaning) == meaning, "a number means two things"
        if node.is_directory:
            assert self.current.setdefault(node.path, node.inode) == node.inode, "a directory changed its number"
        else:
            before = self.files.get(node.path)
            if before is not None and before != node.inode:
                assert node.inode > before
            self.files[node.path] = node.inode

    def _find(self, path: str) -> Node | None:
        """Look up part by part, as the kernel does, and hold each step against the model."""
        node = self.server.call_sync(self.server.tree.node, self.server.volume.root_inode)
        self._tell(node)
        for part in path.split("/") if path else []:
            if not node.is_directory:
                return None
            shown = self._freeze(node.path)
            try:
                child = self.server.call(self.server.tree.lookup, node.inode, part)
            except NotFound:
                assert part not in shown
                return None
            assert (child.object_id, child.parent, child.name) == (shown[part], node.inode, part)
            assert not child.superseded
            self._tell(child)
            node = child
        return node

    # What may happen

    @rule(key=st.sampled_from(KEYS), size=st.integers(0, 3))
    def put(self, key: str, size: int) -> None:
        self.store.put(key, b"x" * size)

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        if key in self.store.objects:
            self.store.delete(key)

    @rule(path=st.sampled_from((*KEYS, "a~file", "d/e~file", "nothing")))
    def lookup(self, path: str) -> None:
        node = self._find(path)
        if node is not None:
            self.held.append(node)

    @rule(path=st.sampled_from(DIRECTORIES))
    def list(self, path: str) -> None:
        node = self._find(path)
        if node is None or not node.is_directory:
            return
        shown = self._freeze(path)
        children = [*self.server.call(self.server.tree.children, node.inode)]
        assert [name for name, _ in children] == sorted(shown)
        for name, child in children:
            assert (child.object_id, child.name, child.superseded) == (shown[name], name, False)
            self._tell(child)

    @rule(path=st.sampled_from(("a", "b", "d/x", "a~file", "d/e~file")))
    def replace(self, path: str) -> None:
        node = self._find(path)
        if node is None or node.is_directory:
            return
        new = self.server.call(self.server.tree.replace, node.inode)
        assert new.inode not in self.told, "a number was used twice"
        assert (new.path, new.object_id, new.parent) == (node.path, node.object_id, node.parent)
        assert node.superseded
        assert not new.superseded
        self._tell(new)
        again = self.server.call(self.server.tree.replace, node.inode)
        assert again.inode == new.inode, "replacing the old one again gives the current one"

    @rule(path=st.sampled_from(DIRECTORIES))
    def refresh(self, path: str) -> None:
        node = self._find(path)
        if node is None or not node.is_directory:
            return
        before = dict(self._freeze(path))
        changed = self.server.call(self.server.tree.refresh_directory, node.inode)
        after = self.frozen[path] = self._shown_now(path)
        expected = {name for name, meaning in before.items() if name not in after or after[name] != meaning}
        assert {name for _, name in changed} == expected
        assert all(inode == node.inode for inode, _ in changed)
        base = f"{path}/" if path else ""
        for name, meaning in before.items():
            if meaning is not None and after.get(name) is None:
                self.files.pop(base + name, None)
        self.list(path)

    @rule(key=st.sampled_from(KEYS), delete=st.booleans())
    def change_under_a_reader(self, key: str, delete: bool) -> None:
        """What the server does when a read finds that the object has changed."""
        self.lookup(key)
        if delete:
            self.delete(key)
        else:
            self.put(key, 2)
        self.refresh(key.rpartition("/")[0])
        self.lookup(key)

    @rule(key=st.sampled_from(KEYS))
    def change_between_sessions(self, key: str) -> None:
        self.lookup(key)
        self.put(key, 1)
        self.restart(True)
        self.lookup(key)

    @rule(new_session=st.booleans())
    def restart(self, new_session: bool) -> None:
        self.server.stop()
        self.held.clear()
        if new_session:
            self.sessions += 1
            self.frozen.clear()
        self.server = Server(self.index, self.store, str(self.sessions))

    @invariant()
    def every_number_means_what_was_told(self) -> None:
        for inode, (path, object_id) in self.told.items():
            node = self.server.call_sync(self.server.tree.node, inode)
            assert (node.path, node.object_id) == (path, object_id)

    @invariant()
    def held_nodes_know_whether_they_are_superseded(self) -> None:
        for node in self.held:
            if not node.is_directory:
                assert node.superseded == (self.files.get(node.path) != node.inode), node

    @invariant()
    def invariants_of_the_tree(self) -> None:
        self.server.call_sync(self.server.tree.check_invariants)


TreeMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTree = pytest.mark.timeout(300)(TreeMachine.TestCase)
