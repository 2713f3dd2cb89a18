"""The tree that the kernel sees: volumes, nodes and their names, over the snapshots.

A directory is frozen and numbered as a whole when it is first looked into; from then on lookup() and children()
answer from memory, without a thread and without the store. Nodes are made when they are asked for and are kept
only as long as somebody holds them: what they say can always be had again from the directory or the index.
"""

import functools
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import overload

import msgspec
import trio

from cachefs.chunk import ObjectId
from cachefs.config import VolumeConfig
from cachefs.errors import CachefsError, IsADirectory, NotADirectory, NotFound, StaleInode, UsageError
from cachefs.flights import Flights
from cachefs.index import Index
from cachefs.inodes import ROOT_INODE, InodeRecord, Inodes, Mark, Wanted
from cachefs.names import is_showable
from cachefs.offload import Offload
from cachefs.snapshot import Entry, Listing, Snapshots, Volume, join
from cachefs.store import Store

__all__ = ["ROOT_INODE", "Node", "Tree", "Volume"]


class Node(msgspec.Struct, weakref=True, eq=False):
    """One inode. `size` in bytes (0 for a directory), `modified_s` seconds since 1970 (0: unknown).

    `view` is the volume's name ("" for the root over several volumes), `path` as shown under the volume's root
    ("" is the root itself). `superseded`: the path has another inode by now, or none; set in place, so a holder
    sees it. The bytes of a superseded node are still those of its `object_id`.
    """

    inode: int
    view: str
    path: str
    is_directory: bool
    object_id: ObjectId | None
    size: int
    modified_s: float
    parent: int
    superseded: bool = False

    @property
    def name(self) -> str:
        """The last part of the path: the name in the parent directory."""
        return self.path.rpartition("/")[2]


class _Directory:
    """A frozen and numbered directory. `numbers[i]` is the inode of `listing.entries[i]`."""

    def __init__(self, volume: Volume, path: str, listing: Listing, numbers: Sequence[int]) -> None:
        assert len(listing.entries) == len(numbers)
        self.volume = volume
        self.path = path
        self.listing = listing
        self.numbers = array("I", numbers)
        self.positions = {entry.name: position for position, entry in enumerate(listing.entries)}


class Children(Sequence[tuple[str, Node]]):
    """The names and nodes of a directory in a fixed order, made as they are indexed. Offsets stay valid for ever:
    a refreshed directory gives another Children."""

    def __init__(self, tree: "Tree", inode: int, directory: _Directory) -> None:
        self._tree = tree
        self._inode = inode
        self._directory = directory
        self._numbers = directory.numbers[:]  # replace() changes the directory's own

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, position: int) -> tuple[str, Node]: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[tuple[str, Node]]: ...
    def __getitem__(self, position: int | slice) -> tuple[str, Node] | Sequence[tuple[str, Node]]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        entry = self._directory.listing.entries[position]
        return entry.name, self._tree._child(self._inode, self._directory, entry, self._numbers[position])


class Tree:
    """All volumes of one server. Run `run` in a nursery before the first lookup()."""

    def __init__(
        self,
        index: Index,
        offload: Offload,
        snapshots: Snapshots,
        *,
        volumes_at_root: bool,
        mark: Mark | None = None,
    ) -> None:
        """`volumes_at_root`: the root lists the volumes by name; else inode 1 is the root of the one volume.

        `mark` is the mount's.
        """
        self._offload = offload
        self._snapshots = snapshots
        self._volumes_at_root = volumes_at_root
        self._inodes = Inodes(index, mark)
        self.on_listed: Callable[[Volume, str, Listing], None] = lambda volume, path, listing: None
        """Told of every directory when it is first looked into."""
        self._volumes: dict[str, Volume] = {}
        self._directories: dict[int, _Directory] = {}
        self._nodes: weakref.WeakValueDictionary[int, Node] = weakref.WeakValueDictionary()
        self._loads: Flights[int, _Directory] = Flights()
        self._refreshes: Flights[int, list[tuple[int, str]]] = Flights()
        self._numbering = trio.Lock()
        """Held over numbering and the change of `_directories` that follows from it."""
        self._root = Node(ROOT_INODE, "", "", True, None, 0, 0.0, ROOT_INODE)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The task that owns what is in flight; ends when cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._loads.run)
            await nursery.start(self._refreshes.run)
            task_status.started()

    # Volumes

    async def add_volume(self, config: VolumeConfig, store: Store) -> Volume:
        """Show a source under its name. No request to the store. Raises UsageError for a name that is taken."""
        if not is_showable(config.name):
            raise UsageError(f"{config.name!r} cannot be a volume's name: use one without a slash, 255 bytes at most")
        volume = Volume(config, store, root_inode=ROOT_INODE)
        self._check_new(config.name)
        if self._volumes_at_root:
            async with self._numbering:
                wanted = [Wanted("", None, 0.0)]
                (volume.root_inode,) = await self._offload.index(self._inodes.assign, config.name, wanted)
            self._check_new(config.name)
        self._volumes[config.name] = volume
        return volume

    def _check_new(self, name: str) -> None:
        if name in self._volumes:
            raise UsageError(f"a volume {name!r} is mounted already: choose another name")
        if self._volumes and not self._volumes_at_root:
            raise UsageError("this mount shows one volume: use another --state-dir for another one")

    def remove_volume(self, name: str) -> None:
        """Its inodes become stale (StaleInode), and are the same again when it comes back. Raises NotFound."""
        volume = self.volume(name)
        del self._volumes[name]
        for inode in [inode for inode, directory in self._directories.items() if directory.volume is volume]:
            del self._directories[inode]
        for node in list(self._nodes.values()):
            if node.view == name:
                node.superseded = True
                self._nodes.pop(node.inode, None)
        self._snapshots.forget(volume)

    def volume(self, name: str) -> Volume:
        """Raises NotFound."""
        try:
            return self._volumes[name]
        except KeyError:
            raise NotFound(f"no volume {name!r}") from None

    def volumes(self) -> list[Volume]:
        """By name."""
        return [self._volumes[name] for name in sorted(self._volumes)]

    # Nodes

    def node(self, inode: int) -> Node:
        """The node of a number that was once told to the kernel, by this server or an earlier one.

        Superseded nodes too: handles that are open on them go on. Raises NotFound for a number that was never
        given out, StaleInode when its volume or its record is gone.
        """
        if inode == ROOT_INODE and self._volumes_at_root:
            return self._root
        node = self._nodes.get(inode)
        if node is not None:
            return node
        if inode == ROOT_INODE:
            if not self._volumes:
                raise StaleInode("the volume is not mounted any more")
            (volume,) = self._volumes.values()
            record: InodeRecord | None = InodeRecord(volume.name, "", None, 0.0)
        else:
            record = self._inodes.record(inode)
        if record is None and ROOT_INODE < inode < self._inodes.next_number():
            raise StaleInode(f"what inode {inode} was is lost: a disk has failed")  # the kernel looks the name up again
        if record is None:
            raise NotFound(f"no inode {inode}")
        return self._node_of_record(inode, record)

    def views_of(self, inodes: Iterable[int]) -> set[str]:
        """The volumes that these inodes belong to; those of volumes that are gone are passed over."""
        views = set()
        for inode in inodes:
            try:
                views.add(self.node(inode).view)
            except CachefsError:
                continue
        return views

    def _node_of_record(self, inode: int, record: InodeRecord) -> Node:
        volume = self._volumes.get(record.view)
        if volume is None:
            raise StaleInode(f"inode {inode}: the volume {record.view!r} is not mounted any more")
        object_id = record.object_id
        superseded = False
        if object_id is not None:
            superseded = self._inodes.number(record.view, record.path, is_directory=False) != inode
        node = Node(
            inode,
            record.view,
            record.path,
            object_id is None,
            object_id,
            0 if object_id is None else object_id.size,
            record.modified_s,
            self._parent_inode(volume, record.path),
            superseded,
        )
        self._nodes[inode] = node
        return node

    def _parent_inode(self, volume: Volume, path: str) -> int:
        if not path:
            return ROOT_INODE
        parent = path.rpartition("/")[0]
        if not parent:
            return volume.root_inode
        number = self._inodes.number(volume.name, parent, is_directory=True)
        if number is None:  # it was numbered before any of its children, but a disk that failed may have lost that
            raise StaleInode(f"the directory {path.rpartition('/')[0]!r} has no number any more")
        return number

    def _child(self, parent: int, directory: _Directory, entry: Entry, inode: int) -> Node:
        node = self._nodes.get(inode)
        if node is not None:
            return node
        if directory is not self._directories.get(parent):  # an old Children: maybe superseded
            return self.node(inode)
        path = join(directory.path, entry.name)
        object_id = None
        if not entry.is_directory:
            object_id = self._snapshots.object_id(directory.volume, directory.path, entry)
            if inode != directory.numbers[directory.positions[entry.name]]:  # replaced since
                return self.node(inode)
        node = Node(
            inode,
            directory.volume.name,
            path,
            entry.is_directory,
            object_id,
            entry.size,
            entry.modified_s,
            parent,
        )
        self._nodes[inode] = node
        return node

    # Names

    async def lookup(self, parent: int, name: str) -> Node:
        """The node of `name`. Without a wait once the directory is frozen. Raises NotFound, NotADirectory,
        StaleInode and what Snapshots.freeze() raises."""
        if parent == ROOT_INODE and self._volumes_at_root:
            return self.node(self.volume(name).root_inode)
        directory = self._directories.get(parent)
        if directory is None:
            directory = await self._load(parent)
        position = directory.positions.get(name)
        if position is None:
            raise NotFound(f"no {name!r} in {join(directory.volume.store.url, directory.path)}")
        return self._child(parent, directory, directory.listing.entries[position], directory.numbers[position])

    async def children(self, inode: int) -> Sequence[tuple[str, Node]]:
        """All names of a directory, sorted; raises as lookup() does. One result never changes: readdir's offsets
        are positions in it, the same in every server of the mount."""
        if inode == ROOT_INODE and self._volumes_at_root:
            return [(volume.name, self.node(volume.root_inode)) for volume in self.volumes()]
        directory = self._directories.get(inode)
        if directory is None:
            directory = await self._load(inode)
        return Children(self, inode, directory)

    async def _load(self, inode: int) -> _Directory:
        node = self._directory_node(inode)
        return await self._loads.join(inode, functools.partial(self._load_flight, node))

    def _directory_node(self, inode: int) -> Node:
        node = self.node(inode)
        if not node.is_directory:
            raise NotADirectory(f"{node.path} is a file")
        return node

    async def _load_flight(self, node: Node) -> _Directory:
        volume = self._volume_of(node)
        listing = await self._snapshots.freeze(volume, node.path)
        directory, _ = await self._number(node, volume, listing)
        self.on_listed(volume, node.path, directory.listing)
        return directory

    def _volume_of(self, node: Node) -> Volume:
        volume = self._volumes.get(node.view)
        if volume is None:
            raise StaleInode(f"the volume {node.view!r} is not mounted any more")
        return volume

    async def _number(self, node: Node, volume: Volume, listing: Listing) -> tuple[_Directory, list[tuple[int, str]]]:
        """Give numbers to the newest listing of a directory, then show it; and which shown names changed."""
        async with self._numbering:
            # Another flight may have frozen a newer listing than the one that the caller waited for.
            listing = await self._snapshots.peek(volume, node.path) or listing
            old = self._directories.get(node.inode)
            gone = [] if old is None else _gone_files(old.listing, listing)
            directory = await self._offload.index(self._assign, volume, node.path, listing, gone)
            if self._volumes.get(volume.name) is not volume:
                raise StaleInode(f"the volume {volume.name!r} is not mounted any more")
            self._directories[node.inode] = directory
            return directory, [] if old is None else self._supersede(node.inode, old, directory)

    def _assign(self, volume: Volume, path: str, listing: Listing, gone: Sequence[str]) -> _Directory:
        """Runs in the index thread."""
        wanted = [
            Wanted(
                join(path, entry.name),
                None if entry.is_directory else self._snapshots.object_id(volume, path, entry),
                entry.modified_s,
            )
            for entry in listing.entries
        ]
        numbers = self._inodes.assign(volume.name, wanted, gone=[join(path, name) for name in gone])
        return _Directory(volume, path, listing, numbers)

    def _supersede(self, inode: int, old: _Directory, new: _Directory) -> list[tuple[int, str]]:
        """Mark nodes whose name went to another number or to none; returns (directory, name) of each."""
        changed: list[tuple[int, str]] = []
        for name, position in old.positions.items():
            number = old.numbers[position]
            new_position = new.positions.get(name)
            if new_position is not None and new.numbers[new_position] == number:
                continue
            changed.append((inode, name))
            held = self._nodes.get(number)
            if held is not None and not held.is_directory:
                held.superseded = True
        return changed

    # Changes

    async def replace(self, inode: int) -> Node:
        """A new number for the same file at the same version; the old node becomes superseded and lives on.

        The node that the path has already, if `inode` is superseded; the old node itself, if its path is gone.
        Raises as node() does, IsADirectory, NoSpace.
        """
        old = self.node(inode)
        if old.is_directory:
            raise IsADirectory(f"{old.path} is a directory")
        async with self._numbering:
            number = await self._offload.index(self._inodes.replace, inode)
            if number == inode:
                return old
            old.superseded = True
            directory = self._directories.get(old.parent)
            position = None if directory is None else directory.positions.get(old.name)
            if directory is not None and position is not None and directory.numbers[position] == inode:
                directory.numbers[position] = number
            return self.node(number)

    async def refresh_directory(self, inode: int) -> list[tuple[int, str]]:
        """List a directory again because something in it changed. Changed objects have new numbers then.

        Returns (directory inode, name) of the names that the kernel must forget: changed, or gone. Raises as
        lookup() does; the old state stays then.
        """
        node = self._directory_node(inode)
        if node is self._root:
            return []
        return await self._refreshes.join_later(inode, functools.partial(self._refresh_flight, node))

    async def _refresh_flight(self, node: Node) -> list[tuple[int, str]]:
        volume = self._volume_of(node)
        if node.inode not in self._directories:
            await self._load(node.inode)  # else nothing would tell which names changed
        listing = await self._snapshots.refreeze(volume, node.path)
        _, changed = await self._number(node, volume, listing)
        return changed

    def check_invariants(self) -> None:
        self._inodes.check_invariants()
        self._loads.check_invariants()
        self._refreshes.check_invariants()
        self._snapshots.check_invariants()
        shown: set[int] = set()
        for inode, directory in self._directories.items():
            # INVARIANT: every name has a number, and no number has two names.
            assert len(directory.numbers) == len(directory.listing.entries), inode
            assert len(shown | set(directory.numbers)) == len(shown) + len(directory.numbers), inode
            shown |= set(directory.numbers)
            for entry, number in zip(directory.listing.entries, directory.numbers, strict=True):
                record = self._inodes.record(number)
                # INVARIANT: a number that was told is committed, and means the version that is shown.
                assert record is not None, number
                assert record.path == join(directory.path, entry.name), number
                if not entry.is_directory:
                    object_id = self._snapshots.object_id(directory.volume, directory.path, entry)
                    assert record.object_id == object_id, number
        for node in list(self._nodes.values()):
            if node.object_id is not None:
                current = self._inodes.number(node.view, node.path, is_directory=False)
                # INVARIANT: superseded says whether the path has another number (or none) by now.
                assert node.superseded == (current != node.inode), node


def _gone_files(old: Listing, new: Listing) -> list[str]:
    """Names of files that the new listing does not have as files."""
    files = {entry.name for entry in new.entries if not entry.is_directory}
    return [entry.name for entry in old.entries if not entry.is_directory and entry.name not in files]
