"""The index of a server on a disk that fails when a test says so, and that dies at a step of spilling."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb

from cachefs.index import Index, Write
from cachefs.spill import SpillingIndex


class Killed(BaseException):
    """The process ends here."""


class Disk:
    """Takes `writes_left` more transactions; None: any number."""

    def __init__(self) -> None:
        self.writes_left: int | None = None
        self.errno = errno.EROFS

    def write(self) -> None:
        if self.writes_left is None:
            return
        if self.writes_left == 0:
            error = lmdb.Error(f"mdb_txn_commit: {os.strerror(self.errno)}")
            error.code = self.errno  # as LMDB's binding has it of a file system that failed (tests/mount has one)
            raise error
        self.writes_left -= 1


class OnDisk:
    """An LMDB environment on it."""

    def __init__(self, env: Any, disk: Disk) -> None:
        self._env = env
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, *args: Any, write: bool = False, **kwargs: Any) -> Any:
        if write:
            self._disk.write()
        return self._env.begin(*args, write=write, **kwargs)


class Mortal(SpillingIndex):
    """On a disk that may fail; dies at a step."""

    def __init__(self, state: Path, spill: Path, session: str, disk: Disk, dies_at: str, read_only: str = "") -> None:
        self.disk = disk
        self.dies_at = dies_at
        super().__init__(state, spill, session=session, read_only=read_only)

    def _open(self, map_bytes: int) -> Any:
        return OnDisk(super()._open(map_bytes), self.disk)

    def _make(self, rows: Sequence[Write]) -> Index:
        if self.dies_at == "begun":
            new = self._place.with_name("spill.new")
            new.mkdir(exist_ok=True)
            (new / "data.mdb").write_bytes(bytes(4096))  # half of LMDB's head
            raise Killed
        return super()._make(rows)

    def _remove(self) -> None:
        if self.dies_at == "carried":
            raise Killed
        if self.dies_at == "removing":
            (self._place / "lock.mdb").unlink(missing_ok=True)
            raise Killed
        super()._remove()
