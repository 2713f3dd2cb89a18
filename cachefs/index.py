"""The index: LMDB as a set of named tables of bytes. What the values mean is the business of their owners.

Writes come as a batch, one transaction each. A batch survives a SIGKILL of the process in any case (its pages
are in the kernel's page cache) and a power cut if it was applied with `durable=True`
(fdatasync of the data; the meta page follows with the next commit: `metasync=False`, 124 us against 250 us).
"""

import contextlib
import enum
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb

from cachefs.errors import NoSpace, StateDamaged, StateTooNew, UsageError

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
    PLANS = b"plans"  # (later) object set -> plan


class Write(NamedTuple):
    """Put `value` under `key`, or delete the key when `value` is None."""

    table: Table
    key: bytes
    value: bytes | None


class Index:
    """One open environment. Reads are cheap (under 1 us) and may run anywhere; writes block on the disk."""

    def __init__(self, directory: Path, *, map_bytes: int = MAP_BYTES) -> None:
        """Open or create `directory/data.mdb`. Raises StateTooNew for a newer format, StateDamaged, UsageError."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _allocate(directory / "lock.mdb", 0, LOCK_BYTES)
            self._env = lmdb.open(
                os.fspath(directory),
                map_size=map_bytes,
                max_dbs=len(Table),
                max_readers=1024,
                metasync=False,
                mode=0o600,
            )
            self._reserve(directory / "data.mdb")
            _close_on_exec(directory / "data.mdb")
            self._env.reader_check()  # slots of processes that were killed
            with self._env.begin(write=True) as txn:  # one sync for all that are new: it takes 1 to 5 ms on many disks
                self._tables = {table: self._env.open_db(table.value, txn=txn) for table in Table}
            self._check_format(directory)
        except (lmdb.DiskError, OSError) as exc:
            raise UsageError(f"the index {directory} cannot be opened ({exc}): make room, or mend the disk") from exc
        except lmdb.Error as exc:
            raise self._damaged(exc) from exc

    def _reserve(self, path: Path) -> None:
        """RESERVE_BYTES beyond what the header says. Raises CorruptedError if the file is cut off.

        Reading behind its end would be SIGBUS. It may end a little early: pages that a transaction took and gave
        back are never written.
        """
        used_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if path.stat().st_size < used_bytes - NEVER_WRITTEN_BYTES:
            raise lmdb.CorruptedError(f"{path} is cut off")
        with contextlib.suppress(OSError):  # full already
            _allocate(path, used_bytes, used_bytes + RESERVE_BYTES)

    def _damaged(self, exc: lmdb.Error) -> StateDamaged:
        return StateDamaged(
            f"the index {self._directory} cannot be read ({exc}): move it away and mount again; "
            "what it knows is fetched anew"
        )

    def _check_format(self, directory: Path) -> None:
        found = self.get(Table.META, b"format")
        if found is None:
            self.apply([Write(Table.META, b"format", str(FORMAT_VERSION).encode())], durable=True)
        elif int(found) > FORMAT_VERSION:
            self._env.close()
            raise StateTooNew(
                f"{directory} has state format {int(found)}, this version reads up to {FORMAT_VERSION}: "
                "use the newer cachefs, or another --state-dir"
            )

    def get(self, table: Table, key: bytes) -> bytes | None:
        try:
            with self._env.begin(self._tables[table]) as txn:
                value: bytes | None = txn.get(key)
                return value
        except _DAMAGE as exc:
            raise self._damaged(exc) from exc

    def scan(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys with `prefix`, in order. Sees one moment; holds a reader slot while it is iterated."""
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

    def apply(self, writes: Sequence[Write], *, durable: bool) -> None:
        """All writes or none. Raises NoSpace when the map or the disk is full, or the disk fails."""
        try:
            with self._env.begin(write=True) as txn:
                for table, key, value in writes:
                    if value is None:
                        txn.delete(key, db=self._tables[table])
                    else:
                        txn.put(key, value, db=self._tables[table])
        except (lmdb.MapFullError, lmdb.DiskError) as exc:
            raise NoSpace(f"the index is full: {exc}") from exc
        except lmdb.Error as exc:
            if type(exc) is not lmdb.Error and not isinstance(exc, _DAMAGE):
                raise  # our own mistake
            raise NoSpace(f"the index cannot be written: {exc}") from exc
        if durable:
            self.sync()

    def sync(self) -> None:
        """Everything applied so far survives a power cut."""
        try:
            self._env.sync(True)
        except lmdb.Error as exc:
            raise NoSpace(f"the index cannot be synced: {exc}") from exc

    def close(self) -> None:
        self._env.close()


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
