"""PURE. Where the tensors of a model file are, from its header alone: safetensors, GGUF; and which files a model has.

What is parsed was written by strangers. Nothing here raises: a header that is of no use gives None, one that is not
here as a whole says how many bytes it takes (`Need`). Time and memory are bounded by HEADER_BYTES_MAX, TENSORS_MAX
and GGUF_STEPS_MAX. The layout is a hint for readahead and for nothing else: a wrong one costs time, never a byte.
"""

import bisect
import re
import struct
from array import array
from collections.abc import Iterable

import msgspec

from cachefs.chunk import MIB

HEADER_BYTES_MAX = 16 * MIB
"""The longest header that is looked at. A model of 100,000 tensors takes 12 MiB, a vocabulary of 256,000 words 8."""

TENSORS_MAX = 100_000
"""16 bytes each in memory."""

GGUF_STEPS_MAX = 2_000_000
"""Strings and values that are skipped one by one: 0.3 s. A vocabulary with its merges has 800,000."""

INDEX_ENTRIES_MAX = 300_000
SHARDS_MAX = 2_000

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_GGUF_HEAD = struct.Struct("<4sIQQ")
_GGUF_STRING = 8
_GGUF_ARRAY = 9
_GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of fixed width, by the type's number (ggml's docs/gguf.md)."""

_GGUF_DIMENSIONS_MAX = 8
_GGUF_ALIGNMENT_DEFAULT = 32
_GGUF_FIRST_BYTES = 64 * 1024


class Need(msgspec.Struct, frozen=True):
    """The header is longer than what was given: try again with its first `header_bytes` bytes."""

    header_bytes: int


class Layout:
    """The tensors of one file as spans of bytes in file order. They do not overlap, and none is empty."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._starts = array("Q")
        self._stops = array("Q")
        for start, stop in spans:
            self._starts.append(start)
            self._stops.append(stop)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def memory_bytes(self) -> int:
        return 16 * len(self._starts) + 200

    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))

    def at(self, offset: int) -> tuple[int, int] | None:
        """(start, stop) of the tensor that has this byte, or of the next one; None after the last one."""
        position = bisect.bisect_right(self._stops, offset)
        return (self._starts[position], self._stops[position]) if position < len(self._stops) else None


class _Tensor(msgspec.Struct, gc=False):
    """Of `__metadata__` and of a tensor what counts; the rest is skipped."""

    data_offsets: tuple[int, int] | None = None


_HEADER = msgspec.json.Decoder(dict[str, _Tensor])


class _Index(msgspec.Struct, gc=False):
    weight_map: dict[str, str]


_INDEX = msgspec.json.Decoder(_Index)

_UNUSABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
"""What msgspec raises for bytes that are no such JSON: too deep, no UTF-8, numbers without end."""


def layout_of(name: str, head: bytes | memoryview, size: int) -> Layout | Need | None:
    """By the file's name. None for another kind of file."""
    if name.endswith(".safetensors"):
        return safetensors_spans(head, size)
    if name.endswith(".gguf"):
        return gguf_spans(head, size)
    return None


def header_bytes_first(name: str, size: int) -> int:
    """How much of a file's start says the first thing about it; 0: its layout is nothing we know."""
    if name.endswith(".safetensors"):
        return 8 if size > 8 else 0
    if name.endswith(".gguf"):
        return min(size, _GGUF_FIRST_BYTES)
    return 0


# -- safetensors


def safetensors_spans(head: bytes | memoryview, size: int) -> Layout | Need | None:
    """`head` is the start of a file of `size` bytes: 8 bytes with the length of the JSON, the JSON, the tensors."""
    if len(head) < 8 or size < 8:
        return None
    (length,) = _U64.unpack_from(head)
    data_start = 8 + length
    if length < 2 or data_start > min(size, HEADER_BYTES_MAX):
        return None
    if len(head) < data_start:
        return Need(data_start)
    text = bytes(head[8:data_start])
    if text.count(b"{") > TENSORS_MAX:  # each takes some 200 bytes while it is decoded
        return None
    try:
        tensors = _HEADER.decode(text)
    except _UNUSABLE:
        return None
    offsets = sorted(tensor.data_offsets for tensor in tensors.values() if tensor.data_offsets is not None)
    spans: list[tuple[int, int]] = []
    end = 0
    for start, stop in offsets:
        if not end <= start <= stop <= size - data_start:
            return None
        if start < stop:
            spans.append((data_start + start, data_start + stop))
        end = stop
    return Layout(spans) if spans else None


# -- GGUF


class _TooShortError(Exception):
    """The header goes on behind what was given."""


class _Nonsense(Exception):
    """No GGUF that anybody could load."""


class _Cursor:
    """Goes through the header; every step is counted and stays within `head`."""

    def __init__(self, head: bytes | memoryview, at: int) -> None:
        self._head = head
        self.at = at
        self._steps = 0

    def skip(self, count: int) -> int:
        """Where what is skipped begins."""
        self._steps += 1
        at = self.at
        if count > HEADER_BYTES_MAX or self._steps > GGUF_STEPS_MAX:
            raise _Nonsense
        if at + count > len(self._head):
            raise _TooShortError
        self.at = at + count
        return at

    def u32(self) -> int:
        return int(_U32.unpack_from(self._head, self.skip(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self._head, self.skip(8))[0])

    def string(self) -> bytes:
        length = self.u64()
        at = self.skip(length)
        return bytes(self._head[at : at + min(length, 64)])

    def skip_strings(self, count: int) -> None:
        """The loop that takes the time: a vocabulary, without a call per word."""
        head, at, end, unpack = self._head, self.at, len(self._head), _U64.unpack_from
        if self._steps + count > GGUF_STEPS_MAX:
            raise _Nonsense
        self._steps += count
        for _ in range(count):
            if at + 8 > end:
                raise _TooShortError
            length = unpack(head, at)[0]
            if length > HEADER_BYTES_MAX:
                raise _Nonsense
            at += 8 + length
        if at > end:
            raise _TooShortError
        self.at = at

    def value(self, kind: int) -> None:
        if kind == _GGUF_STRING:
            self.skip_strings(1)
        elif kind == _GGUF_ARRAY:
            of, count = self.u32(), self.u64()
            if of == _GGUF_STRING:
                self.skip_strings(count)
            else:  # arrays of arrays exist on paper only
                self.skip(_width(of) * count)
        else:
            self.skip(_width(kind))


def _width(kind: int) -> int:
    width = _GGUF_WIDTHS.get(kind)
    if width is None:
        raise _Nonsense
    return width


def gguf_spans(head: bytes | memoryview, size: int) -> Layout | Need | None:
    """`head` is the start of a GGUF (version 2 or 3, little endian) of `size` bytes.

    A tensor ends where the next one starts, the last one with the file: so no table of block sizes is needed.
    """
    if len(head) < _GGUF_HEAD.size:
        return Need(_GGUF_HEAD.size) if size > _GGUF_HEAD.size else None
    magic, version, tensors, values = _GGUF_HEAD.unpack_from(head)
    if magic != b"GGUF" or version not in (2, 3) or not 0 < tensors <= TENSORS_MAX or values > GGUF_STEPS_MAX:
        return None
    try:
        return _gguf_layout(_Cursor(head, _GGUF_HEAD.size), tensors, values, size)
    except _TooShortError:
        if len(head) >= min(size, HEADER_BYTES_MAX):
            return None
        return Need(min(size, HEADER_BYTES_MAX, max(2 * len(head), _GGUF_FIRST_BYTES)))
    except _Nonsense:
        return None


def _gguf_layout(cursor: _Cursor, tensors: int, values: int, size: int) -> Layout | None:
    alignment = _GGUF_ALIGNMENT_DEFAULT
    for _ in range(values):
        key = cursor.string()
        kind = cursor.u32()
        if key == b"general.alignment" and kind == 4:
            alignment = cursor.u32()
        else:
            cursor.value(kind)
    offsets = set()
    for _ in range(tensors):
        cursor.string()
        dimensions = cursor.u32()
        if dimensions > _GGUF_DIMENSIONS_MAX:
            return None
        cursor.skip(8 * dimensions + 4)  # and the type
        offsets.add(cursor.u64())
    if not 0 < alignment <= MIB or any(offset % alignment for offset in offsets):
        return None
    data_start = -(-cursor.at // alignment) * alignment
    starts = sorted(data_start + offset for offset in offsets)
    if starts[-1] >= size:
        return None
    return Layout(zip(starts, [*starts[1:], size], strict=True))


# -- several files


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key: numbers in names count as numbers (`x-2` before `x-10`)."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts) if part]


def shard_names(index_json: bytes | memoryview) -> tuple[str, ...]:
    """The files of a `*.safetensors.index.json`, in the order in which they are loaded; () if it is of no use.

    Loaders go through them by name, whatever the order in the index is.
    """
    text = bytes(index_json)
    if len(text) > HEADER_BYTES_MAX or text.count(b":") > INDEX_ENTRIES_MAX:
        return ()
    try:
        names = set(_INDEX.decode(text).weight_map.values())
    except _UNUSABLE:
        return ()
    if len(names) > SHARDS_MAX or any(not name or "/" in name or len(name) > 255 for name in names):
        return ()
    return tuple(sorted(names, key=natural))


_NUMBERED = re.compile(r"(.*-)([0-9]{1,9})(-of-)([0-9]{1,9})(\.[A-Za-z0-9]+)", re.DOTALL | re.ASCII)


def next_numbered(name: str) -> str | None:
    """`x-00002-of-00003.safetensors` after `x-00001-of-00003.safetensors`; None for the last one and other names."""
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match[2]) >= int(match[4]):
        return None
    return f"{match[1]}{int(match[2]) + 1:0{len(match[2])}}{match[3]}{match[4]}{match[5]}"
