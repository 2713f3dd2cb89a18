"""Tiers: the places where blobs live. A tier knows names, bytes and the file system; nothing of objects or digests."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec


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
        """A read-only descriptor. Raises FileNotFoundError."""

    def stat(self, name: str) -> BlobStat | None:
        """None when there is no such blob."""

    def unlink(self, name: str) -> None:
        """Delete a blob; one that does not exist is no error."""

    def is_unused(self, name: str) -> bool:
        """Whether nobody has the blob open or mapped, the caller included."""

    def scan(self) -> Iterator[tuple[str, BlobStat]]:
        """Every blob that is there. Names that vanish meanwhile are passed over."""

    def free_bytes(self) -> tuple[int, int]:
        """What the file system has free for us, and its size."""
