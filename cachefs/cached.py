"""Records of what the local tier holds, as they are kept in the index, and the reports of work on them."""

import enum

import msgspec

from cachefs.chunk import ChunkKey, ObjectId
from cachefs.tier import BlobStat


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """The blob as it was when its last chunk became durable, or when all of it was last verified.

    `epoch` counts unclean boots: a seal of an earlier epoch must be verified before it is believed.
    """

    stat: BlobStat
    epoch: int


class Header(msgspec.Struct, frozen=True, array_like=True):
    """Table.OBJECTS: ObjectId.key -> Header. Chunk digests are rows of their own (Table.CHUNKS)."""

    object: ObjectId
    used_s: float
    seal: Seal | None
    had_backing: bool


class Remark(enum.Enum):
    """Table.REMARKS: what the next server must know of an object whose header could not be written."""

    BACKED = b"backed"
    """The blob has had a backing id."""
    BAD = b"bad"
    """Something in the blob is wrong: its seal is not to be believed."""


class Pin(msgspec.Struct, frozen=True, array_like=True):
    """Exempts objects from eviction: those of `source` (ObjectId.source) whose path is `path` or lies under it.

    `path` "" is the whole source. `pin_id` is the key of Table.PINS, at most 500 bytes.
    """

    pin_id: str
    source: str
    path: str
    created_s: float

    def covers(self, object_id: ObjectId) -> bool:
        if object_id.source != self.source:
            return False
        prefix = self.path.rstrip("/")
        return not prefix or object_id.path == prefix or object_id.path.startswith(prefix + "/")


class ObjectRecord(msgspec.Struct, frozen=True):
    """One object as `status` and `ls` see it. `used_s` is seconds since 1970."""

    object: ObjectId
    local_bytes: int
    disk_bytes: int
    sealed: bool
    open: bool
    pinned: bool
    used_s: float


class Usage(msgspec.Struct, frozen=True):
    """What the local tier holds. `used_bytes` is what the blobs take on disk."""

    used_bytes: int
    capacity_bytes: int
    free_bytes: int
    objects_total: int
    objects_sealed: int
    trouble: str
    """Why nothing can be kept on the disk, or ""."""


class Skip(enum.Enum):
    """Why an object was not evicted."""

    OPEN = "open"
    PINNED = "pinned"
    BUSY = "busy"
    IN_USE = "in use"
    STUCK = "cannot be deleted"
    ABSENT = "not local"


class EvictReport(msgspec.Struct, frozen=True):
    evicted_objects: int
    evicted_bytes: int
    skipped: tuple[tuple[ObjectId, str], ...]
    """Objects that stay, with the reason (values of Skip)."""


class VerifyReport(msgspec.Struct, frozen=True):
    objects: int
    chunks: int
    bytes: int
    bad: tuple[ChunkKey, ...]
    """Chunks whose bytes did not match their digest, or could not be read."""
    dropped_chunks: int
    """Chunks that were given up by `repair`; they are fetched again when they are next read."""
    dropped_records: int
    """Objects whose blob was missing or had another size (`rebuild`)."""
    deleted_blobs: int
    """Blobs that no record knew (`rebuild`)."""


class GcReport(msgspec.Struct, frozen=True):
    """With `dry_run`: what would be deleted."""

    dry_run: bool
    blobs: int
    """Blobs without a record."""
    objects: int
    """Records without a blob, and objects that nothing refers to."""
    freed_bytes: int
