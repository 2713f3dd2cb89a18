"""PURE. The readahead window policy: which chunks one handle will want next, from the READs that it made so far.

A handle has up to `STREAMS_MAX` streams, because a loader jumps between the tensors of one file and several
threads read through one descriptor: a far seek starts a stream of its own and keeps the earlier ones.
"""

from collections.abc import Sequence

from cachefs.chunk import CHUNK_BYTES, MIB, chunk_count

WINDOWS = (0, 2, 4, 8, 24)
"""Chunks ahead of the reader, step by step. At 30 ms and 90 MB/s per connection 16 GETs bring 1.1 GB/s and 24 bring
1.4; what the link has no use for is held back (pace.py)."""

STEP_BYTES = MIB // 2
"""Bytes read in sequence that widen the window by one step: 2 MiB to the full window, while the few hundred KiB
of a header (what a loader reads first and maybe alone) fetch two chunks and not all."""

NEAR_BYTES = CHUNK_BYTES
"""A READ so close to where a stream stands belongs to it: the kernel's READs overtake each other."""

STREAMS_MAX = 4


class Stream:
    """One sequential run through the object. `position` is the highest byte offset read so far (exclusive)."""

    def __init__(self, position: int, step: int) -> None:
        self.position = position
        self.step = step
        self.run_bytes = 0
        self.wanted = range(0)

    def near(self, offset: int) -> bool:
        return abs(offset - self.position) <= NEAR_BYTES

    def advance(self, stop: int, size: int) -> None:
        """The reader got to `stop`: move on, widen, and work out which chunks it will want after this one."""
        if stop > self.position:
            self.run_bytes += stop - self.position
            self.position = stop
        steps, self.run_bytes = divmod(self.run_bytes, STEP_BYTES)
        self.step = min(self.step + steps, len(WINDOWS) - 1)
        first = chunk_count(self.position)  # the chunk of the last byte read is the reader's own demand
        self.wanted = range(first, min(first + WINDOWS[self.step], chunk_count(size)))


class Readahead:
    """The streams of one handle, the one used last at the front."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def advance(self, offset: int, length: int, size: int) -> bool:
        """Note a READ. True when the wanted chunks are not the same as before (most READs change nothing)."""
        stop = min(offset + length, size)
        if stop <= offset:
            return False
        stream = next((each for each in self._streams if each.near(offset)), None)
        if stream is None:
            # Who starts at the start most likely reads on; a jump into the middle has to prove itself.
            stream = Stream(offset, step=1 if offset == 0 else 0)
        else:
            self._streams.remove(stream)
        before = stream.wanted
        stream.advance(stop, size)
        self._streams.insert(0, stream)
        del self._streams[STREAMS_MAX:]
        return stream.wanted != before

    def wanted(self) -> Sequence[int]:
        """Chunk indices in the order in which to fetch them: the stream in use first, then the earlier ones."""
        seen: dict[int, None] = {}
        for stream in self._streams:
            seen.update(dict.fromkeys(stream.wanted))
        return list(seen)
