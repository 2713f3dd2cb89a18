"""PURE. The readahead window policy: which chunks one handle will want next, from the READs that it made so far.

A handle has up to `STREAMS_MAX` streams, because a loader jumps between the tensors of one file and several
threads read through one descriptor: a far seek starts a stream of its own and keeps the earlier ones.

Where the file's layout is known (formats.py), who jumps to a tensor wants all of it, and nothing behind it; who jumps
to a second one loads the file, and the rest of it is worth fetching while nothing else is (`spare`).
"""

from collections.abc import Sequence

from cachefs.chunk import CHUNK_BYTES, MIB, chunk_count
from cachefs.formats import Layout

WINDOWS = (0, 2, 4, 8, 27)
"""Chunks ahead of the reader, step by step. At 30 ms and 90 MB/s per connection 16 GETs bring 1.1 GB/s and 24 bring
1.4 (pace.LIMIT_MAX), and some chunks have come and wait for the reader; what the link has no use for is held back
(pace.py). With 30 the buffers of chunks that wait are taken from them, and they are read again from the disk."""

STEP_BYTES = MIB // 2
"""Bytes read in sequence that widen the window by one step: 2 MiB to the full window, while the few hundred KiB
of a header (what a loader reads first and maybe alone) fetch two chunks and not all."""

NEAR_BYTES = CHUNK_BYTES
"""A READ so close to where a stream stands belongs to it: the kernel's READs overtake each other."""

STREAMS_MAX = 4

PAGE_BYTES = 4096

CROSSED_BYTES = 2 * MIB
"""So far behind a tensor's end it is the reader, and not the kernel's own readahead (two windows of 1 MiB)."""


class Stream:
    """One sequential run through the object. `position` is the highest byte offset read so far (exclusive).

    `limit`: the end of the tensor that the reader jumped into, until it reads on behind that; the window stays within.
    """

    def __init__(self, position: int, step: int) -> None:
        self.position = position
        self.step = step
        self.run_bytes = 0
        self.wanted = range(0)
        self.beyond = 0
        self.limit: int | None = None
        self.aimed = position == 0
        """Whether the tensor that it began in is known; who starts at the start did not come for one."""
        self._whole = False

    def near(self, offset: int) -> bool:
        return abs(offset - self.position) <= NEAR_BYTES

    def advance(self, stop: int, size: int, tensor: tuple[int, int] | None, focus: int) -> None:
        """The reader got to `stop`: move on, widen, and work out which chunks it will want after this one.

        `focus` is the byte that it came for, `tensor` the one that this lies in.
        """
        if stop > self.position:
            self.run_bytes += stop - self.position
            self.position = stop
        steps, self.run_bytes = divmod(self.run_bytes, STEP_BYTES)
        self.step = min(self.step + steps, len(WINDOWS) - 1)
        if tensor is not None:
            self._aim(focus, *tensor)
        first = chunk_count(self.position)  # the chunk of the last byte read is the reader's own demand
        width = WINDOWS[self.step]
        if tensor is not None and self._whole:
            width = min(max(width, chunk_count(tensor[1]) - first), WINDOWS[-1])
        end = chunk_count(size)
        self.wanted = range(first, min(first + width, end if self.limit is None else chunk_count(self.limit)))
        at_end = self.limit is None and self.step == len(WINDOWS) - 1
        self.beyond = max(0, first + width - max(first, end)) if at_end else 0

    def _aim(self, focus: int, start: int, stop: int) -> None:
        if not self.aimed:
            self.aimed = True
            self._whole = abs(focus - start) <= NEAR_BYTES
            self.limit = stop
        elif self.limit is not None and self.position > self.limit + CROSSED_BYTES:
            # It reads the tensors in the order of the file: no limit any more, and the next one is wanted as a whole.
            self.limit = None
            self._whole = True


class Readahead:
    """The streams of one handle, the one used last at the front."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._read_bytes = 0
        self._tensor: tuple[int, int] | None = None
        self._spare_next = 0
        self._spare_left: int | None = None
        """Chunks that the sweep over the file has still to look at; None: nobody loads it."""
        self._spare_started = 0

    def advance(self, offset: int, length: int, size: int, layout: Layout | None = None) -> bool:
        """Note a READ. True when the wanted chunks are not the same as before (most READs change nothing)."""
        stop = min(offset + length, size)
        if stop <= offset:
            return False
        self._read_bytes += stop - offset
        # A page fault in a mapping makes the kernel read from before it on: what was wanted lies in the middle.
        focus = min(offset + (stop - offset) // 2 + PAGE_BYTES - 1, stop - 1)
        tensor = layout.at(focus) if layout is not None else None
        stream = next((each for each in self._streams if each.near(offset)), None)
        if stream is None:
            # Who starts at the start most likely reads on; a jump into the middle has to prove itself.
            stream = Stream(offset, step=1 if offset == 0 else 0)
        else:
            self._streams.remove(stream)
        changed = self._move(stream, stop, size, tensor, focus)
        self._streams.insert(0, stream)
        del self._streams[STREAMS_MAX:]
        return changed

    def learned(self, size: int, layout: Layout) -> bool:
        """The layout became known after the READs that it is for. True when other chunks are wanted now."""
        if not self._streams:
            return False
        stream = self._streams[0]
        focus = stream.position - 1
        return self._move(stream, stream.position, size, layout.at(focus), focus)

    def _move(self, stream: Stream, stop: int, size: int, tensor: tuple[int, int] | None, focus: int) -> bool:
        if tensor is not None and not stream.aimed and tensor != self._tensor:
            if self._tensor is not None and self._spare_left is None:
                self._spare_next = chunk_count(tensor[1])
                self._spare_left = chunk_count(size)
            self._tensor = tensor
        before = stream.wanted, stream.beyond
        stream.advance(stop, size, tensor, focus)
        return (stream.wanted, stream.beyond) != before

    def wanted(self) -> Sequence[int]:
        """Chunk indices in the order in which to fetch them: the stream in use first, then the earlier ones."""
        seen: dict[int, None] = {}
        for stream in self._streams:
            seen.update(dict.fromkeys(stream.wanted))
        return list(seen)

    def beyond(self) -> int:
        """How many chunks of the window lie behind the end of the file, for the file that is read next."""
        return self._streams[0].beyond if self._streams else 0

    def spare(self, size: int) -> int | None:
        """The next chunk of a file that is being loaded, in file order; None: there is none now.

        So that a reader that jumps about has a busy link. What it takes is never more than what was read so far and
        a window: a program that reads only a part of the tensors (an expert, a slice) has that much too many.
        After the file's last chunk follow those of a window behind its end (indices from `chunk_count(size)` on).
        """
        if self._spare_left is None or self._spare_started >= WINDOWS[-1] + self._read_bytes // CHUNK_BYTES:
            return None
        count = chunk_count(size)
        if self._spare_left > 0:
            return self._spare_next % count
        return count - self._spare_left if -self._spare_left < WINDOWS[-1] else None

    def spare_done(self, *, started: bool) -> None:
        """The chunk that spare() gave is started, or was local."""
        assert self._spare_left is not None
        self._spare_next += 1
        self._spare_left -= 1
        self._spare_started += started
