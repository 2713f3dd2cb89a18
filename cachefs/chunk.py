"""PURE. Objects, chunks and spans: what is cached, in which pieces, under which key."""

import hashlib
from collections.abc import Iterator

import msgspec

MIB = 1024 * 1024

CHUNK_BYTES = 8 * MIB
"""Size of every chunk but the last. 16 MiB parts measured no faster, and wait longer for the first byte."""


class ObjectId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One file at one version. Bytes under an ObjectId never change: a changed object is another ObjectId.

    `source` is the identity of the store (`s3://bucket` with its endpoint, never credentials), `path` the key
    in it, `size` in bytes, `version` what the store calls the version (its etag).
    """

    source: str
    path: str
    size: int
    version: str

    @property
    def key(self) -> bytes:
        """16 bytes, the same for equal ObjectIds in every process: index key and blob name (in hex)."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=16).digest()


class ChunkKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The chunk `index` (0-based) of one object."""

    object: ObjectId
    index: int


class ChunkSpan(msgspec.Struct, frozen=True, array_like=True):
    """Bytes `start` to `stop` (exclusive), counted from the start of chunk `index`."""

    index: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def chunk_count(size: int) -> int:
    """How many chunks an object of `size` bytes has; 0 for an empty one."""
    return -(-size // CHUNK_BYTES)


def chunk_offset(index: int) -> int:
    """Where chunk `index` starts in its object, in bytes."""
    return index * CHUNK_BYTES


def chunk_length(size: int, index: int) -> int:
    """Bytes of chunk `index` in an object of `size` bytes; the last chunk may be short."""
    assert 0 <= index < chunk_count(size), (size, index)
    return min(CHUNK_BYTES, size - chunk_offset(index))


def chunk_spans(size: int, offset: int, length: int) -> Iterator[ChunkSpan]:
    """The spans that cover `length` bytes from `offset`, in order, cut off at the end of the object."""
    assert offset >= 0, offset
    assert length >= 0, length
    stop = min(size, offset + length)
    while offset < stop:
        index = offset // CHUNK_BYTES
        start = offset - chunk_offset(index)
        end = min(stop - chunk_offset(index), CHUNK_BYTES)
        yield ChunkSpan(index, start, end)
        offset = chunk_offset(index) + end
