"""Where names go when the index's disk takes none: a second, small index in the runtime directory.

That is memory as a rule, outlives every server of a mount, and is removed with the mount. So a mount whose disk has
become read-only can be looked into further, and its servers are replaced (`Index(read_only=...)`).

What must never happen is that a number is given out twice: the kernel knows the numbers of a mount for as long as it
lives, and one that names another file is wrong bytes. Hence:

- Only whole batches of names are spilled, by who writes them (`_is_names`). Records of chunks never are.
- INVARIANT: while there is a spill it takes all names, and the index none, whether or not its disk works again. So of
  what both have the spill's is the newer, `next_inode` above all, and nothing changes below it.
- Only at the start of a server that can write the index is the spill carried over, in one durable transaction, which
  also notes the spill's id; then it is deleted. After a kill in between, whoever finds the id only deletes.
- A spill is of one mount (`session`). The next mount deletes another one's: no kernel knows its numbers any more.
- Where the index's `next_inode` is above what it was when the spill began, somebody else (the same state directory with
  another runtime directory) has given out the same numbers: then no server starts. It may be below: a disk that fails
  can lose the last commit, and the ledger's mark is above that.
"""

import contextlib
import heapq
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from cachefs.errors import CachefsError, IndexFull, IndexUnwritable, StateDamaged, StateUnwritable
from cachefs.index import MAP_BYTES, NEXT_INODE, Index, Table, Write
from cachefs.kernel.locks import NEW, remove_flat

SPILL_BYTES_MAX = 256 * 1024**2
"""In memory: some 600,000 names. One that has no place in it cannot be looked up, as without a spill."""

SPILLED = (Table.META, Table.INODES, Table.NAMES, Table.LISTINGS, Table.VOLUMES, Table.REMARKS)
"""Of META only NEXT_INODE."""

_OWNER = b"owner"  # in the spill's META -> _Owner
_CARRIED = b"spill"  # in the index's META -> id of the last spill that was carried over
_KEPT, _GONE = b"+", b"-"  # what a value in the spill begins with, and what a deleted row has

log = logging.getLogger(__name__)


class _Owner(msgspec.Struct, frozen=True, array_like=True):
    """Whose spill it is. `base` is the index's next_inode when it began, "" for none."""

    spill_id: bytes
    session: str
    base: bytes


def _is_name(table: Table, key: bytes) -> bool:
    return key == NEXT_INODE if table is Table.META else table in SPILLED


def _is_names(writes: Sequence[Write]) -> bool:
    return all(_is_name(table, key) for table, key, _ in writes)


class SpillingIndex(Index):
    """An index that goes on taking names when its disk fails. For the server of one mount."""

    def __init__(
        self, directory: Path, spill: Path, *, session: str, read_only: str = "", map_bytes: int = MAP_BYTES
    ) -> None:
        """Open `directory`, and the spill of an earlier server of the session; carry that over if the disk takes it.

        Raises as Index() does, and IndexUnwritable when the disk fails in the middle of that.
        """
        self._spill: Index | None = None
        self._place = spill
        self._session = session
        self._why = read_only
        self._refused = False
        super().__init__(directory, map_bytes=map_bytes, read_only=read_only)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._spill = self._find()
            if self._spill is not None and not read_only:
                self._carry_over(self._spill)
            undo.pop_all()

    # What there is

    def get(self, table: Table, key: bytes) -> bytes | None:
        """As Index.get(): what the spill says, or else the index."""
        if self._spill is not None and _is_name(table, key):
            found = self._spill.get(table, key)
            if found is not None:
                return _value(found)
        return super().get(table, key)

    def scan(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """As Index.scan()."""
        if self._spill is None or table not in SPILLED:
            yield from super().scan(table, prefix)
            return
        ours = ((key, value) for key, value in self._spill.scan(table, prefix) if _is_name(table, key))
        theirs = ((key, _KEPT + value) for key, value in super().scan(table, prefix))
        last = None
        for key, value in heapq.merge(ours, theirs, key=_key):  # of two with one key ours comes first
            if key != last and value != _GONE:
                yield key, value[1:]
            last = key

    @property
    def trouble(self) -> str:
        """Why names are kept elsewhere, or nothing is written, or ""."""
        if self._spill is None:
            return super().trouble
        return f"{self._why}; names are kept in {self._place} until a server can write the index"

    # What is written

    def apply(self, writes: Iterable[Write], *, durable: bool) -> None:
        """As Index.apply(). Names that the disk refuses go to the spill; if that cannot be, the disk's error is raised.

        One call at a time, as everybody makes them through Offload.index().
        """
        batch = list(writes)
        if not batch or not _is_names(batch):
            super().apply(batch, durable=durable)
        elif self._spill is not None:
            self._spill.apply([_spilled(write) for write in batch], durable=False)
        else:
            try:
                super().apply(batch, durable=durable)
            except IndexFull:  # somebody will make room, and the spill would take all names until the next server
                raise
            except IndexUnwritable as exc:
                self._begin(batch, exc)

    def _begin(self, batch: Sequence[Write], exc: IndexUnwritable) -> None:
        """With the first batch, and whose it is. Raises `exc`."""
        owner = _Owner(os.urandom(16), self._session, super().get(Table.META, NEXT_INODE) or b"")
        head = Write(Table.META, _OWNER, msgspec.msgpack.encode(owner))
        try:
            spill = self._make([head, *map(_spilled, batch)])
        except (CachefsError, OSError) as error:
            if not self._refused:
                log.warning("%s, and %s takes no names either: %s", exc, self._place, error)
            self._refused = True  # told once, tried each time
            raise exc from error
        self._why = self._why or str(exc)
        self._spill = spill
        log.warning("%s", self.trouble)

    def _make(self, rows: Sequence[Write]) -> Index:
        """Under another name until it is whole: a kill leaves no half of it."""
        new = self._place.with_name(self._place.name + NEW)
        remove_flat(new)
        remove_flat(self._place)
        with contextlib.ExitStack() as undo:
            spill = Index(new, map_bytes=SPILL_BYTES_MAX, reserve_bytes=0)
            undo.callback(spill.close)
            spill.apply(rows, durable=False)
            new.rename(self._place)
            undo.pop_all()
        return spill

    def close(self) -> None:
        """The spill stays for the next server."""
        if self._spill is not None:
            self._spill.close()
        super().close()

    # From server to server

    def _find(self) -> Index | None:
        """The spill of this session, opened. One that nobody needs is deleted. Raises StateDamaged."""
        if not (self._place / "data.mdb").exists():
            return None
        try:
            spill = Index(self._place, map_bytes=SPILL_BYTES_MAX, reserve_bytes=0)
        except StateUnwritable as exc:  # this disk too, by now
            spill = Index(self._place, map_bytes=SPILL_BYTES_MAX, read_only=str(exc))
        found = spill.get(Table.META, _OWNER)
        owner = None if found is None else msgspec.msgpack.decode(found, type=_Owner)
        if owner is None or owner.session != self._session or owner.spill_id == super().get(Table.META, _CARRIED):
            spill.close()
            self._remove()
            return None
        if int(super().get(Table.META, NEXT_INODE) or b"0") > int(owner.base or b"0"):
            spill.close()
            raise StateDamaged(
                f"another mount has used the index {self._directory} meanwhile: what {self._place} has of this mount "
                "does not fit any more; unmount it"
            )
        self._why = self._why or "the index could not be written"
        return spill

    def _carry_over(self, spill: Index) -> None:
        found = spill.get(Table.META, _OWNER)
        assert found is not None
        owner = msgspec.msgpack.decode(found, type=_Owner)
        rows = (Write(table, key, _value(value)) for table in SPILLED for key, value in spill.scan(table))
        names = (write for write in rows if _is_name(write.table, write.key))
        try:
            super().apply(itertools.chain(names, [Write(Table.META, _CARRIED, owner.spill_id)]), durable=True)
        except IndexUnwritable as exc:
            if super().get(Table.META, _CARRIED) == owner.spill_id:
                raise  # it is over, but not durable
            self._why = str(exc)  # a full disk: go on with both
            log.warning("%s", self.trouble)
            return
        self._spill = None
        self._why = ""
        spill.close()
        self._remove()
        log.warning("the index can be written again: it has taken the names from %s", self._place)

    def _remove(self) -> None:
        try:
            remove_flat(self._place)
        except OSError as exc:  # the next server tries it again, for nothing of it counts any more
            log.warning("%s cannot be deleted: %s", self._place, exc)


def _key(row: tuple[bytes, bytes]) -> bytes:
    return row[0]


def _value(found: bytes) -> bytes | None:
    return None if found == _GONE else found[1:]


def _spilled(write: Write) -> Write:
    return write._replace(value=_GONE if write.value is None else _KEPT + write.value)
