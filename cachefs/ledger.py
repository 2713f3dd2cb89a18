"""What a server must not lose when it is killed: which inodes the kernel has open, in which mode, and the counters.

It lives in shared memory that the keeper made and hands to every server (`Session.ledger_fd`). Layout, in 8-byte
words of the machine's order: a header page, the doubles of the metrics, then the open inodes, one word each. A word
is stored whole, so a SIGKILL at any moment leaves a table that reads back right.
"""

import enum
import mmap
import os
from collections.abc import MutableSequence
from typing import NamedTuple, cast

MAGIC = int.from_bytes(b"cachefs1", "little")
HEADER_BYTES = 4096
COUNTERS = 1024
"""Doubles for the metrics; what they mean is theirs to know."""

_FIRST_SLOT = HEADER_BYTES // 8 + COUNTERS
LEDGER_BYTES_MIN = (_FIRST_SLOT + 1) * 8

SLOTS_MAX = 65536
"""Inodes open at one time. More memory than for these is left unused: every start reads the whole table."""

_WORD_MAGIC, _WORD_FLAGS, _WORD_LAST, _WORD_NEXT_INODE = 0, 1, 2, 3
_FLAG_PASSTHROUGH_CHECKED = 1
_FLAG_OVERFLOWED = 2
_FLAG_PASSTHROUGH_CHECK_ENDED = 4  # older servers neither set nor clear it
_UNCERTAIN = 1 << 29
_OPENS_MAX = _UNCERTAIN - 1


class Mode(enum.IntEnum):
    """How the kernel has an inode open. It fixes the mode at the first open and keeps it to the last RELEASE."""

    CACHED = 1
    PASSTHROUGH = 2


class OpenEntry(NamedTuple):
    """One inode that the kernel has open `opens` times; about so many when `uncertain`, maybe not at all."""

    inode: int
    mode: Mode
    opens: int
    uncertain: bool = False


class Ledger:
    """Maps the shared memory behind `fd` (kept by the caller). Empty memory starts a new ledger."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        assert size >= LEDGER_BYTES_MIN, size
        self._map = mmap.mmap(fd, size)
        self._bytes = memoryview(self._map)
        slots = min(size // 8 - _FIRST_SLOT, SLOTS_MAX)
        used = (_FIRST_SLOT + slots) * 8
        self._words = self._bytes[:used].cast("Q")
        if self._words[_WORD_MAGIC] != MAGIC:
            self._bytes[:used] = bytes(used)
            self._words[_WORD_MAGIC] = MAGIC
        self._doubles = self._bytes[HEADER_BYTES : HEADER_BYTES + COUNTERS * 8].cast("d")
        self.counters = cast(MutableSequence[float], self._doubles)
        """COUNTERS doubles, 0.0 at first, that the metrics of every server of this mount count on in."""
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        for slot, word in enumerate(self._words[_FIRST_SLOT:].tolist(), start=_FIRST_SLOT):
            if word:
                self._slot_of[word >> 32] = slot
            else:
                self._free.append(slot)

    def close(self) -> None:
        self._doubles.release()
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

    @property
    def last_inode(self) -> int:
        """The inode of the last record(), 0 before the first one: see OpenFiles.adopt()."""
        return self._words[_WORD_LAST]

    def record(self, entry: OpenEntry) -> None:
        """The kernel has this inode open so often; no opens, and certainly so, forgets it. One word, stored whole."""
        inode = entry.inode
        assert 0 < inode < 1 << 32, inode
        assert 0 <= entry.opens <= _OPENS_MAX, entry
        self._words[_WORD_LAST] = inode
        slot = self._slot_of.get(inode)
        if entry.opens == 0 and not entry.uncertain:
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
        self._words[slot] = inode << 32 | entry.mode << 30 | (_UNCERTAIN if entry.uncertain else 0) | entry.opens

    def _entry(self, slot: int) -> OpenEntry:
        word = self._words[slot]
        return OpenEntry(word >> 32, Mode(word >> 30 & 3), word & _OPENS_MAX, bool(word & _UNCERTAIN))

    # Inode numbers

    @property
    def next_inode(self) -> int:
        """Above all inode numbers that the kernel may know of this mount; 0 while only older servers have run."""
        return self._words[_WORD_NEXT_INODE]

    @next_inode.setter
    def next_inode(self, number: int) -> None:
        assert self._words[_WORD_NEXT_INODE] <= number <= 1 << 32, number
        self._words[_WORD_NEXT_INODE] = number

    # The self-check of passthrough, until it worked once in this mount

    @property
    def passthrough_checked(self) -> bool:
        """An earlier server of this mount saw passthrough work."""
        return bool(self._words[_WORD_FLAGS] & _FLAG_PASSTHROUGH_CHECKED)

    def note_passthrough_checked(self) -> None:
        self._words[_WORD_FLAGS] |= _FLAG_PASSTHROUGH_CHECKED

    @property
    def passthrough_check_ended(self) -> bool:
        """A server of this mount came to the end of a check, whatever it saw. Older versions note only a success."""
        return bool(self._words[_WORD_FLAGS] & (_FLAG_PASSTHROUGH_CHECKED | _FLAG_PASSTHROUGH_CHECK_ENDED))

    def note_passthrough_check_ended(self) -> None:
        self._words[_WORD_FLAGS] |= _FLAG_PASSTHROUGH_CHECK_ENDED
