"""Tiers: the places where blobs live. A tier knows names, bytes and the file system; nothing of objects or digests."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

NO_SIZE = -1
"""The size of what is no blob: no object has it."""


class BlobStat(msgspec.Struct, frozen=True, array_like=True):
    """What identifies a blob's content to the file system. `disk_bytes` is st_blocks * 512."""

    device: int
    inode: int
    size: int
    disk_bytes: int
    ctime_ns: int


class Tier(Protocol):
    """A directory of blobs, each a sparse file of exactly its object's size. All methods block; OSError is theirs."""

    name: str
    capacity_bytes: int
    free_fraction_min: float

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        """Write `data` at `offset` of blob `name` of `size` bytes. Not durable before sync().

        Raises FileNotFoundError when there is no such blob of that size and it may not be made (`create`): other
        chunks are known to be in it, and a new one would serve zeros for them. OSError: the disk is full or failing.
        """

    def sync(self, names: Sequence[str], new_names: Sequence[str]) -> dict[str, BlobStat]:
        """Make the data of blobs durable, and the names of new ones; what each looks like afterwards.

        Blobs that are gone are not in the answer. Raises OSError.
        """

    def open(self, name: str) -> int:
        """A read-only descriptor. Raises FileNotFoundError, also for what is no plain file; OSError."""

    def stat(self, name: str) -> BlobStat | None:
        """None when there is no such blob, or no plain file of that name. Raises OSError."""

    def unlink(self, name: str) -> None:
        """Delete a blob; one that does not exist is no error. Raises OSError: it is still there."""

    def is_unused(self, name: str) -> bool:
        """Whether nobody has the blob open or mapped, the caller included. Raises OSError if it cannot be opened."""

    def scan(self) -> Iterator[tuple[str, BlobStat]]:
        """Every blob that is there. Names that vanish meanwhile are passed over, and directories that cannot be read.

        What is under a blob's name and is no plain file, or cannot be looked at, has NO_SIZE. Raises OSError when
        nothing at all can be listed.
        """

    def free_bytes(self) -> tuple[int, int]:
        """What the file system has free for us, and its size. Raises OSError when the tier is gone or failing."""
