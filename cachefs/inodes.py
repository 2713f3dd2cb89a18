"""Inode numbers that outlive the server: which number names which file version or directory, kept in the index.

Rules (the kernel caches by number, so they are what "never a byte of another version" stands on):
- a number is used once, for ever: below 2**32, growing, never given to anything else;
- a directory's number belongs to (view, path) for ever;
- a file's number belongs to (view, path, ObjectId); another version, or replace(), takes a new number;
- a number is committed before anybody is told of it. A SIGKILL loses no commit; after a power cut there is no
  mount left that could know a number, so nothing here waits for the disk more than LMDB itself does;
- what the disk, or the spill beside it, loses all the same is not given out again: the mount's ledger has the mark
  below which all numbers are that its kernel may know.

All methods that write run in the index thread, one at a time (the tree holds a lock).
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from cachefs.chunk import ObjectId
from cachefs.errors import NoSpace
from cachefs.index import NEXT_INODE, Index, Table, Write

ROOT_INODE = 1
INODE_MAX = 2**32 - 1
"""`fh` has 32 bits for the inode."""

_NUMBER = struct.Struct(">I")


class InodeRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a number means: all that is needed to serve it after a restart. `object_id` is None for a directory."""

    view: str
    path: str
    object_id: ObjectId | None
    modified_s: float


class Wanted(NamedTuple):
    """A name that needs a number: `object_id` is None for a directory."""

    path: str
    object_id: ObjectId | None
    modified_s: float


def _name_key(view: str, path: str, *, is_directory: bool) -> bytes:
    # Separate names for the file and the directory of one path: a directory's number is for ever.
    text = f"{'d' if is_directory else 'f'}{view}\0{path}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Mark(Protocol):
    """What outlives the servers of a mount, and ends with it: Ledger."""

    next_inode: int
    """Above all numbers that this mount's kernel was told; 0 at first."""


class NoMark:
    """For who has no mount."""

    next_inode = 0


class Inodes:
    """The tables INODES and NAMES and the counter."""

    def __init__(self, index: Index, mark: Mark | None = None) -> None:
        self._index = index
        self._mark = mark or NoMark()
        self._decoder = msgspec.msgpack.Decoder(InodeRecord)
        self._encoder = msgspec.msgpack.Encoder()

    def record(self, inode: int) -> InodeRecord | None:
        """What `inode` was given to; None if to nothing yet."""
        if not 0 < inode <= INODE_MAX:
            return None
        value = self._index.get(Table.INODES, _NUMBER.pack(inode))
        return None if value is None else self._decoder.decode(value)

    def number(self, view: str, path: str, *, is_directory: bool) -> int | None:
        """The current number of a path; None if it has none (yet, or any more)."""
        value = self._index.get(Table.NAMES, _name_key(view, path, is_directory=is_directory))
        if value is None:
            return None
        (number,) = _NUMBER.unpack(value)
        return int(number)

    def next_number(self) -> int:
        """The number that would be given out next."""
        value = self._index.get(Table.META, NEXT_INODE)
        return max(ROOT_INODE + 1 if value is None else int(value), self._mark.next_inode)

    def assign(self, view: str, wanted: Sequence[Wanted], *, gone: Sequence[str] = ()) -> list[int]:
        """The numbers of `wanted`, in order: those they have, new ones where the version is another. Blocks.

        `gone` are paths of files that lost their name: their numbers become superseded. One transaction, none
        if nothing is new. Raises NoSpace when the index is full or numbers have run out.
        """
        writes: list[Write] = []
        numbers: list[int] = []
        first = following = self.next_number()
        for path, object_id, modified_s in wanted:
            key = _name_key(view, path, is_directory=object_id is None)
            found = self._index.get(Table.NAMES, key)
            if found is not None and self._still(found, object_id):
                numbers.append(_NUMBER.unpack(found)[0])
                continue
            numbers.append(following)
            writes += self._new(following, key, InodeRecord(view, path, object_id, modified_s))
            following += 1
        for path in gone:
            writes.append(Write(Table.NAMES, _name_key(view, path, is_directory=False), None))
        self._commit(writes, first, following)
        return numbers

    def replace(self, inode: int) -> int:
        """A new number for the file that `inode` names; blocks. The current one if `inode` is superseded already.

        `inode` itself if its path has no number any more (nothing to publish). Raises NoSpace.
        """
        record = self.record(inode)
        assert record is not None, inode
        assert record.object_id is not None, inode
        current = self.number(record.view, record.path, is_directory=False)
        if current != inode:
            return inode if current is None else current
        first = self.next_number()
        key = _name_key(record.view, record.path, is_directory=False)
        self._commit(self._new(first, key, record), first, first + 1)
        return first

    def _still(self, number: bytes, object_id: ObjectId | None) -> bool:
        if object_id is None:
            return True
        value = self._index.get(Table.INODES, number)
        return value is not None and self._decoder.decode(value).object_id == object_id

    def _new(self, inode: int, name_key: bytes, record: InodeRecord) -> list[Write]:
        if inode > INODE_MAX:
            raise NoSpace("the 2**32 inode numbers of this state directory are used up: use another --state-dir")
        number = _NUMBER.pack(inode)
        return [
            Write(Table.INODES, number, self._encoder.encode(record)),
            Write(Table.NAMES, name_key, number),
        ]

    def _commit(self, writes: list[Write], first: int, following: int) -> None:
        if following > first:
            writes.append(Write(Table.META, NEXT_INODE, str(following).encode()))
        if writes:
            self._index.apply(writes, durable=False)
        self._mark.next_inode = max(self._mark.next_inode, following)  # committed, and nobody is told yet

    def check_invariants(self) -> None:
        following = self.next_number()
        names = {value for _, value in self._index.scan(Table.NAMES)}
        for key, _ in self._index.scan(Table.INODES):
            # INVARIANT: every number given out is below the next one.
            assert _NUMBER.unpack(key)[0] < following, key
            names.discard(key)
        # INVARIANT: every name leads to a record.
        assert not names, names
