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
from cachefs.ledger import Ledger, Mode, OpenEntry
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
    """One inode that is open or being opened. `mode` is fixed while `is_open`.

    `node` is None when an earlier server opened it and its volume is gone since.
    """

    __slots__ = ("inode", "lock", "mode", "node", "opened_total", "opens", "uncertain", "users")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.node: Node | None = None
        self.mode = Mode.CACHED
        self.opens = 0
        self.opened_total = 0
        """Opens that this server answered; tells whether there was one since a moment."""
        self.uncertain = False
        """`opens` may be one too many or too few: the server before was killed at it."""
        self.lock = trio.Lock()
        """Held while the mode is decided, and while a backing id comes or goes."""
        self.users = 0

    @property
    def is_open(self) -> bool:
        """The kernel has it open in `mode`, or may have."""
        return self.opens > 0 or self.uncertain


class OpenFiles:
    """INVARIANT: an inode is in here exactly while it is open (`is_open`) or somebody uses its lock (`users`),
    and the cache has been told of its object as open exactly once."""

    def __init__(self, ledger: Ledger, notes: OpenNotes) -> None:
        self._ledger = ledger
        self._notes = notes
        self._inodes: dict[int, OpenInode] = {}
        self._serials = itertools.count(1)
        self.unknown_are_cached = False
        """An earlier server had more files open than the ledger holds: one that is not here may be open cached."""

    def adopt(self, nodes: dict[int, Node | None]) -> None:
        """Take over what the ledger has from an earlier server. `nodes` has a key for each inode of inherited().

        Between counting and answering an OPEN or RELEASE nothing else runs, so a kill leaves at most one that was
        counted and not answered. It comes again by RESEND and is counted again: the last one is uncertain.
        """
        self.unknown_are_cached = self._ledger.overflowed
        for entry in self.inherited():
            state = self._add(entry.inode, nodes[entry.inode])
            state.mode = entry.mode
            state.opens = entry.opens
            state.uncertain = entry.uncertain
            self._record(state)

    def inherited(self) -> list[OpenEntry]:
        """What an earlier server left, the last counted inode marked. Of one that it closed last the mode is lost:
        as it is not in the table any more, a second RELEASE of it does no harm."""
        last = self._ledger.last_inode
        return [entry._replace(uncertain=True) if entry.inode == last else entry for entry in self._ledger.entries()]

    def get(self, inode: int) -> OpenInode | None:
        return self._inodes.get(inode)

    def opened(self) -> list[OpenInode]:
        """All inodes that the kernel has open, or may have."""
        return [state for state in self._inodes.values() if state.is_open]

    def cached(self, object_id: ObjectId) -> list[OpenInode]:
        """The inodes of one object that are open in cached mode."""
        return [
            state
            for state in self._inodes.values()
            if state.is_open and state.mode is Mode.CACHED and state.node and state.node.object_id == object_id
        ]

    @contextlib.asynccontextmanager
    async def using(self, inode: int, node: Node | None) -> AsyncIterator[OpenInode]:
        """Hold the lock of an inode; its object counts as open meanwhile."""
        state = self._inodes.get(inode) or self._add(inode, node)
        if state.node is None and node is not None:
            self._know(state, node)
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
        """One more open. The caller answers the kernel next, without an await."""
        assert not state.is_open or state.mode is mode, state.inode
        state.mode = mode
        state.opens += 1
        state.opened_total += 1
        self._record(state)

    def cached_handle(self, inode: int) -> int:
        """A handle number that no other open handle of this server has."""
        return (next(self._serials) & _HIGH_MASK) << 32 | inode

    def release(self, handle: int) -> OpenInode | None:
        """One open less. The inode's state, if that was the last one; None for an unknown one.

        The caller answers the kernel next, without an await.
        """
        state = self._inodes.get(inode_of(handle))
        if state is None or not state.opens:
            return None
        state.opens -= 1
        self._record(state)
        self._drop_if_unused(state)
        return None if state.is_open else state

    def uncertain(self) -> list[OpenInode]:
        return [state for state in self._inodes.values() if state.uncertain]

    def settle(self, state: OpenInode, opened_total: int) -> None:
        """The kernel does not know an uncertain inode: it is not open, unless it was opened since (`opened_total`)."""
        if state.users or state.opened_total != opened_total or self._inodes.get(state.inode) is not state:
            return
        state.opens = 0
        state.uncertain = False
        self._record(state)
        self._drop_if_unused(state)

    def _record(self, state: OpenInode) -> None:
        self._ledger.record(OpenEntry(state.inode, state.mode, state.opens, state.uncertain))

    def _add(self, inode: int, node: Node | None) -> OpenInode:
        state = self._inodes[inode] = OpenInode(inode)
        if node is not None:
            self._know(state, node)
        return state

    def _know(self, state: OpenInode, node: Node) -> None:
        state.node = node
        if node.object_id is not None:
            self._notes.note_open(node.object_id)

    def _drop_if_unused(self, state: OpenInode) -> None:
        if state.is_open or state.users or self._inodes.get(state.inode) is not state:
            return
        del self._inodes[state.inode]
        if state.node is not None and state.node.object_id is not None:
            self._notes.note_close(state.node.object_id)

    def check_invariants(self) -> None:
        for inode, state in self._inodes.items():
            assert state.is_open or state.users, inode
        known = {OpenEntry(state.inode, state.mode, state.opens, state.uncertain) for state in self.opened()}
        assert set(self._ledger.entries()) == known or self._ledger.overflowed, known
