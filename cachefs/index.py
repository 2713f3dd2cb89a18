"""The index: LMDB as a set of named tables of bytes. What the values mean is the business of their owners.

Writes come as a batch, one transaction each. A batch survives a SIGKILL of the process in any case (its pages
are in the kernel's page cache) and a power cut if it was applied with `durable=True`
(fdatasync of the data; the meta page follows with the next commit: `metasync=False`, 124 us against 250 us).
"""

import contextlib
import enum
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from cachefs.errors import (
    IndexFull,
    IndexUnwritable,
    NoSpace,
    StateDamaged,
    StateTooNew,
    StateUnwritable,
    UsageError,
    is_disk_failure,
    is_disk_full,
)

FORMAT_VERSION = 1
MAP_BYTES = 64 * 1024**3
"""Sparse: the file grows only with what is in it."""
NEVER_WRITTEN_BYTES = 256 * 1024
LOCK_BYTES = 128 * 1024
"""More than its table of 1024 readers takes. It is mapped: room that is missing later would be SIGBUS."""
RESERVE_BYTES = 8 * 1024**2
"""Allocated beyond what is in it at each start, so that names can be looked up, and a server be started, on a disk
that others have filled: 8 MiB are some 20,000 names."""

_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError, lmdb.IncompatibleError)


class Table(enum.Enum):
    """Every table, its key and value. Values are msgpack of the owner's struct unless said otherwise."""

    META = b"meta"  # name -> bytes (format version, boot id, next inode)
    OBJECTS = b"objects"  # ObjectId.key -> cached.Header
    CHUNKS = b"chunks"  # ObjectId.key + chunk index, 4 bytes big endian -> digest, 16 bytes
    PINS = b"pins"  # pin id -> cached.Pin
    INODES = b"inodes"  # inode, 4 bytes big endian -> tree's record
    NAMES = b"names"  # digest of (view, path) -> inode, 4 bytes big endian
    LISTINGS = b"listings"  # digest of (source, directory) -> snapshot.Listing
    VOLUMES = b"volumes"  # volume name -> volume record
    REMARKS = b"remarks"  # ObjectId.key -> one of cached.Remark: what must be known where no header can be written
    PLANS = b"plans"  # (later) object set -> plan


NEXT_INODE = b"next_inode"
"""In META: the lowest inode number that was never given out."""


class Write(NamedTuple):
    """Put `value` under `key`, or delete the key when `value` is None."""

    table: Table
    key: bytes
    value: bytes | None


class Index:
    """One open environment. Reads are cheap (under 1 us) and may run anywhere; writes block on the disk."""

    def __init__(
        self, directory: Path, *, map_bytes: int = MAP_BYTES, reserve_bytes: int = RESERVE_BYTES, read_only: str = ""
    ) -> None:
        """Open or create `directory/data.mdb`; `read_only` is why nothing is to be written there.

        Raises StateTooNew for a newer format, StateDamaged, StateUnwritable, UsageError.
        """
        self._directory = directory
        self.read_only = read_only
        try:
            with contextlib.ExitStack() as undo:
                if not read_only:
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _allocate(directory / "lock.mdb", 0, LOCK_BYTES)
                self._env = self._open(map_bytes)
                undo.callback(self._env.close)
                self._reserve(directory / "data.mdb", reserve_bytes)
                _close_on_exec(directory / "data.mdb")
                self._tables = self._open_tables()
                self._check_format(directory)
                undo.pop_all()
        except (lmdb.Error, OSError) as exc:
            failure = is_disk_failure(_number(exc))
            if not failure and isinstance(exc, lmdb.Error):
                raise self._damaged(exc) from exc
            kind = StateUnwritable if failure else UsageError
            raise kind(f"the index {directory} cannot be opened ({exc}): make room, or mend the disk") from exc

    def _open(self, map_bytes: int) -> lmdb.Environment:
        path = os.fspath(self._directory)
        if self.read_only:
            # No table of readers, which would have to be written: nobody writes while the caller holds the state.
            return lmdb.open(path, map_size=map_bytes, max_dbs=len(Table), readonly=True, lock=False)
        return lmdb.open(path, map_size=map_bytes, max_dbs=len(Table), max_readers=1024, metasync=False, mode=0o600)

    def _open_tables(self) -> dict[Table, Any]:
        found: dict[Table, Any] = {}
        if self.read_only:
            for table in Table:
                with contextlib.suppress(lmdb.NotFoundError):  # an older version has not made it: it is empty
                    found[table] = self._env.open_db(table.value, create=False)
            return found
        self._env.reader_check()  # slots of processes that were killed
        with self._env.begin(write=True) as txn:  # one sync for all that are new: it takes 1 to 5 ms on many disks
            return {table: self._env.open_db(table.value, txn=txn) for table in Table}

    def _reserve(self, path: Path, reserve_bytes: int) -> None:
        """So many bytes beyond what the header says. Raises CorruptedError if the file is cut off.

        Reading behind its end would be SIGBUS. It may end a little early: pages that a transaction took and gave
        back are never written.
        """
        used_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if path.stat().st_size < used_bytes - NEVER_WRITTEN_BYTES:
            raise lmdb.CorruptedError(f"{path} is cut off")
        if not self.read_only:
            with contextlib.suppress(OSError):  # full already
                _allocate(path, used_bytes, used_bytes + reserve_bytes)

    def _damaged(self, exc: lmdb.Error) -> StateDamaged:
        return StateDamaged(
            f"the index {self._directory} cannot be read ({exc}): move it away and mount again; "
            "what it knows is fetched anew"
        )

    def _check_format(self, directory: Path) -> None:
        found = self.get(Table.META, b"format")
        if found is None and not self.read_only:
            self.apply([Write(Table.META, b"format", str(FORMAT_VERSION).encode())], durable=True)
        elif found is not None and int(found) > FORMAT_VERSION:
            raise StateTooNew(
                f"{directory} has state format {int(found)}, this version reads up to {FORMAT_VERSION}: "
                "use the newer cachefs, or another --state-dir"
            )

    def get(self, table: Table, key: bytes) -> bytes | None:
        if table not in self._tables:
            return None
        try:
            with self._env.begin(self._tables[table]) as txn:
                value: bytes | None = txn.get(key)
                return value
        except _DAMAGE as exc:
            raise self._damaged(exc) from exc

    def scan(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys with `prefix`, in order. Sees one moment; holds a reader slot while it is iterated."""
        if table not in self._tables:
            return
        try:
            with self._env.begin(self._tables[table]) as txn, txn.cursor() as cursor:
                found = cursor.set_range(prefix) if prefix else cursor.first()
                while found:
                    key, value = cursor.item()
                    if not key.startswith(prefix):
                        return
                    yield key, value
                    found = cursor.next()
        except _DAMAGE as exc:
            raise self._damaged(exc) from exc

    def apply(self, writes: Iterable[Write], *, durable: bool) -> None:
        """All writes or none. Raises IndexUnwritable when the map or the disk is full, or the disk fails; NoSpace."""
        if self.read_only:
            raise IndexUnwritable(self.read_only)
        try:
            with self._env.begin(write=True) as txn:
                for table, key, value in writes:
                    if value is None:
                        txn.delete(key, db=self._tables[table])
                    else:
                        txn.put(key, value, db=self._tables[table])
        except lmdb.MapFullError as exc:
            raise IndexFull(f"the index is full: {exc}") from exc
        except lmdb.Error as exc:
            kind = _refusal(exc)
            if kind is NoSpace and type(exc) is not lmdb.Error and not isinstance(exc, _DAMAGE):
                raise  # our own mistake
            raise kind(f"the index cannot be written: {exc}") from exc
        if durable:
            self.sync()

    def sync(self) -> None:
        """Everything applied so far survives a power cut. Raises as apply() does."""
        try:
            self._env.sync(True)
        except lmdb.Error as exc:
            raise _refusal(exc)(f"the index cannot be synced: {exc}") from exc

    @property
    def trouble(self) -> str:
        """Why it is not written as it should be, or ""."""
        return self.read_only

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


def _number(exc: lmdb.Error | OSError) -> int | None:
    """LMDB hands errors of system calls on, as Error itself or as a class for that number, with it as `code`."""
    return exc.errno if isinstance(exc, OSError) else getattr(exc, "code", None)


def _refusal(exc: lmdb.Error) -> type[NoSpace]:
    """What a write that failed means: no room now, a disk that takes none, or neither is known."""
    if is_disk_full(_number(exc)):
        return IndexFull
    return IndexUnwritable if is_disk_failure(_number(exc)) else NoSpace


def _close_on_exec(path: Path) -> None:
    """LMDB leaves its data file open for every process that is started later: a keeper lives longer than we do."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}") == os.path.realpath(path):
                os.set_inheritable(int(entry), False)
        except OSError:
            continue  # another thread's, closed meanwhile


def _allocate(path: Path, length: int, allocated: int) -> None:
    """At least so long, and so many bytes that need no room later."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < length:
            os.ftruncate(descriptor, length)
        os.posix_fallocate(descriptor, 0, allocated)
    finally:
        os.close(descriptor)
