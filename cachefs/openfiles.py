"""Which inodes the kernel has open, how often and in which mode; the same in a server that comes after a SIGKILL.

A handle number (`fh`) says all that a restarted server needs: the inode in bits 0 to 31, and for a passthrough
handle bit 63 and its backing id in bits 32 to 62. A cached handle has a serial number there instead, so that
readahead can tell two readers of one file apart.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Protocol

import trio

from cachefs.chunk import ObjectId
from cachefs.ledger import Ledger, Mode
from cachefs.tree import Node

PASSTHROUGH_BIT = 1 << 63
_INODE_MASK = (1 << 32) - 1
_HIGH_MASK = (1 << 31) - 1


def passthrough_handle(inode: int, backing_id: int) -> int:
    assert 0 < backing_id <= _HIGH_MASK, backing_id
    return PASSTHROUGH_BIT | backing_id << 32 | inode


def inode_of(handle: int) -> int:
    """The inode that a handle is open on."""
    return handle & _INODE_MASK


class OpenNotes(Protocol):
    """What open files are told to: the cache never evicts an object that is open. Calls are counted."""

    def note_open(self, object_id: ObjectId) -> None: ...
    def note_close(self, object_id: ObjectId) -> None: ...


class OpenInode:
    """One inode that is open or being opened. `mode` is fixed while `opens` is not 0.

    `node` is None when an earlier server opened it and its volume is gone since.
    """

    __slots__ = ("inode", "lock", "mode", "node", "opens", "users")

    def __init__(self, inode: int, node: Node | None) -> None:
        self.inode = inode
        self.node = node
        self.mode = Mode.CACHED
        self.opens = 0
        self.lock = trio.Lock()
        """Held while the mode is decided, and while a backing id comes or goes."""
        self.users = 0


class OpenFiles:
    """INVARIANT: an inode is in here exactly while it is open (`opens`) or somebody uses its lock (`users`),
    and the cache has been told of its object as open exactly once."""

    def __init__(self, ledger: Ledger, notes: OpenNotes) -> None:
        self._ledger = ledger
        self._notes = notes
        self._inodes: dict[int, OpenInode] = {}
        self._serials = itertools.count(1)
        self.unknown_are_cached = False
        """An earlier server had more files open than the ledger holds: one that is not here may be open cached."""

    def adopt(self, nodes: dict[int, Node | None]) -> None:
        """Take over what the ledger has from an earlier server. `nodes` has a key for each of its inodes."""
        self.unknown_are_cached = self._ledger.overflowed
        for entry in self._ledger.entries():
            state = self._add(entry.inode, nodes[entry.inode])
            state.mode = entry.mode
            state.opens = entry.opens

    def get(self, inode: int) -> OpenInode | None:
        return self._inodes.get(inode)

    def opened(self) -> list[OpenInode]:
        """All inodes that the kernel has open."""
        return [state for state in self._inodes.values() if state.opens]

    def cached(self, object_id: ObjectId) -> list[OpenInode]:
        """The inodes of one object that are open in cached mode."""
        return [
            state
            for state in self._inodes.values()
            if state.opens and state.mode is Mode.CACHED and state.node and state.node.object_id == object_id
        ]

    @contextlib.asynccontextmanager
    async def using(self, inode: int, node: Node | None) -> AsyncIterator[OpenInode]:
        """Hold the lock of an inode; its object counts as open meanwhile."""
        state = self._inodes.get(inode) or self._add(inode, node)
        state.users += 1
        try:
            try:
                state.lock.acquire_nowait()  # no checkpoint in the usual case: 20 us of 60 for an open
            except trio.WouldBlock:
                await state.lock.acquire()
            try:
                yield state
            finally:
                state.lock.release()
        finally:
            state.users -= 1
            self._drop_if_unused(state)

    def add_open(self, state: OpenInode, mode: Mode) -> None:
        """One more open. The caller answers the kernel next, without an await: a kill in between counts one
        too many, and what that costs is a new inode when the file seals."""
        assert state.opens == 0 or state.mode is mode, state.inode
        state.mode = mode
        state.opens += 1
        self._ledger.record(state.inode, mode, state.opens)

    def cached_handle(self, inode: int) -> int:
        """A handle number that no other open handle of this server has."""
        return (next(self._serials) & _HIGH_MASK) << 32 | inode

    def release(self, handle: int) -> OpenInode | None:
        """One open less. The inode's state, if that was the last one; None for an unknown one."""
        state = self._inodes.get(inode_of(handle))
        if state is None or not state.opens:
            return None
        state.opens -= 1
        self._ledger.record(state.inode, state.mode, state.opens)
        last = state.opens == 0
        self._drop_if_unused(state)
        return state if last else None

    def _add(self, inode: int, node: Node | None) -> OpenInode:
        state = self._inodes[inode] = OpenInode(inode, node)
        if node is not None and node.object_id is not None:
            self._notes.note_open(node.object_id)
        return state

    def _drop_if_unused(self, state: OpenInode) -> None:
        if state.opens or state.users or self._inodes.get(state.inode) is not state:
            return
        del self._inodes[state.inode]
        if state.node is not None and state.node.object_id is not None:
            self._notes.note_close(state.node.object_id)

    def check_invariants(self) -> None:
        for inode, state in self._inodes.items():
            assert state.opens or state.users, inode
        recorded = {(entry.inode, entry.mode, entry.opens) for entry in self._ledger.entries()}
        known = {(state.inode, state.mode, state.opens) for state in self.opened()}
        assert recorded == known or self._ledger.overflowed, (recorded, known)
