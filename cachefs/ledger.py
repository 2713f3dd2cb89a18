"""What a server must not lose when it is killed: which inodes the kernel has open, in which mode, and the counters.

It lives in shared memory that the keeper made and hands to every server (`Session.ledger_fd`). Layout, in 8-byte
words of the machine's order: a header page, two copies of the counters (written by turns, so that a kill in the
middle of one leaves the other), then the open inodes, one word each. A word is stored whole, so a SIGKILL at any
moment leaves a table that reads back right.
"""

import enum
import mmap
import os
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from prometheus_client import Counter

MAGIC = int.from_bytes(b"cachefs1", "little")
HEADER_BYTES = 4096
COUNTERS_BYTES = 16384
"""One copy of the counters: some 40 labelled counters need 3 KiB."""

LEDGER_BYTES_MIN = HEADER_BYTES + 2 * COUNTERS_BYTES + 8

SLOTS_MAX = 65536
"""Inodes open at one time. More memory than for these is left unused: every start reads the whole table."""

_WORD_MAGIC, _WORD_FLAGS, _WORD_COUNTERS = 0, 1, 2
_FLAG_PASSTHROUGH_CHECKED = 1
_FLAG_OVERFLOWED = 2
_COUNT_MAX = (1 << 30) - 1


class Mode(enum.IntEnum):
    """How the kernel has an inode open. It fixes the mode at the first open and keeps it to the last RELEASE."""

    CACHED = 1
    PASSTHROUGH = 2


class OpenEntry(NamedTuple):
    """One inode that the kernel has open `opens` times."""

    inode: int
    mode: Mode
    opens: int


class _Saved(msgspec.Struct, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class Ledger:
    """Maps the shared memory behind `fd` (kept by the caller). Empty memory starts a new ledger."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        assert size >= LEDGER_BYTES_MIN, size
        self._map = mmap.mmap(fd, size)
        self._bytes = memoryview(self._map)
        first = (HEADER_BYTES + 2 * COUNTERS_BYTES) // 8
        slots = min(size // 8 - first, SLOTS_MAX)
        self._words = self._bytes[: (first + slots) * 8].cast("Q")
        if self._words[_WORD_MAGIC] != MAGIC:
            self._bytes[: (first + slots) * 8] = bytes((first + slots) * 8)
            self._words[_WORD_MAGIC] = MAGIC
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        for slot, word in enumerate(self._words[first:].tolist(), start=first):
            if word:
                self._slot_of[word >> 32] = slot
            else:
                self._free.append(slot)

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()

    # Open inodes

    @property
    def overflowed(self) -> bool:
        """More inodes were open at one time than fit: an inode that is not in the table may be open cached."""
        return bool(self._words[_WORD_FLAGS] & _FLAG_OVERFLOWED)

    def entries(self) -> list[OpenEntry]:
        return [self._entry(slot) for slot in self._slot_of.values()]

    def record(self, inode: int, mode: Mode, count: int) -> None:
        """The kernel has `inode` open `count` times; 0 forgets it. One word, stored whole."""
        assert 0 < inode < 1 << 32, inode
        assert 0 <= count <= _COUNT_MAX, count
        slot = self._slot_of.get(inode)
        if count == 0:
            if slot is not None:
                self._words[slot] = 0
                del self._slot_of[inode]
                self._free.append(slot)
            return
        if slot is None:
            if not self._free:
                self._words[_WORD_FLAGS] |= _FLAG_OVERFLOWED
                return
            slot = self._slot_of[inode] = self._free.pop()
        self._words[slot] = inode << 32 | mode << 30 | count

    def _entry(self, slot: int) -> OpenEntry:
        word = self._words[slot]
        return OpenEntry(word >> 32, Mode(word >> 30 & 3), word & _COUNT_MAX)

    # The self-check of passthrough, done once per mount

    @property
    def passthrough_checked(self) -> bool:
        """An earlier server of this mount saw passthrough work."""
        return bool(self._words[_WORD_FLAGS] & _FLAG_PASSTHROUGH_CHECKED)

    def note_passthrough_checked(self) -> None:
        self._words[_WORD_FLAGS] |= _FLAG_PASSTHROUGH_CHECKED

    # Counters

    def save(self, counters: Iterable[Counter]) -> None:
        """Write the values of all counters, in the copy that is not the current one, then make it current."""
        data = msgspec.msgpack.encode(list(_values(counters)))
        if len(data) + 4 > COUNTERS_BYTES:
            return  # too many label values: better the last good copy than a torn one
        turn = self._words[_WORD_COUNTERS] + 1
        start = HEADER_BYTES + (turn % 2) * COUNTERS_BYTES
        self._bytes[start + 4 : start + 4 + len(data)] = data
        self._bytes[start : start + 4] = len(data).to_bytes(4, "little")
        self._words[_WORD_COUNTERS] = turn

    def restore(self, counters: Iterable[Counter]) -> None:
        """Add what the last server saved to the counters of this one. A counter that is no more is dropped."""
        turn = self._words[_WORD_COUNTERS]
        if turn == 0:
            return
        start = HEADER_BYTES + (turn % 2) * COUNTERS_BYTES
        length = int.from_bytes(self._bytes[start : start + 4], "little")
        saved = msgspec.msgpack.decode(self._bytes[start + 4 : start + 4 + length], type=list[_Saved])
        by_name = {metric.name: counter for counter in counters for metric in counter.describe()}
        for each in saved:
            counter = by_name.get(each.name)
            if counter is not None:
                (counter.labels(**each.labels) if each.labels else counter).inc(each.value)


def _values(counters: Iterable[Counter]) -> Iterable[_Saved]:
    for counter in counters:
        for metric in counter.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.value:
                    yield _Saved(metric.name, dict(sample.labels), sample.value)
