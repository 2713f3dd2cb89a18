"""The store protocol: what a source must be able to do. Every method blocks and runs in a thread (offload.py).

A store raises only errors of `cachefs.errors`:
NotFound, AccessDenied, ObjectChanged (412, or an answer for another etag or size), IntegrityError (an answer
that lies: short or long body, another range, 200 instead of 206), StoreUnavailable (may pass: connection,
5xx, 429, cut body, timeout of one request).
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from cachefs.chunk import ObjectId


class ObjectInfo(msgspec.Struct, frozen=True, array_like=True):
    """One object of a listing. `path` is relative to the source's prefix; `modified_s` is seconds since 1970."""

    path: str
    size: int
    version: str
    modified_s: float


class ListPage(msgspec.Struct, frozen=True):
    """The answer to one LIST: objects directly in the directory, and names of its sub-prefixes (no slash)."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...]


class Store(Protocol):
    """One source: a bucket and prefix, or a directory."""

    identity: str
    """Names the content's home (scheme, endpoint, bucket), never the prefix or credentials: `ObjectId.source`."""

    url: str
    """The source as the user wrote it, normalised: `s3://bucket/prefix`."""

    def probe(self) -> None:
        """One small request that proves bucket, prefix and credentials. Raises NotFound, AccessDenied, ..."""

    def list_directory(self, directory: str) -> Iterator[ListPage]:
        """The pages of one directory (`""` is the root, no leading or trailing slash), one LIST request each.

        Pages come in the store's order, which means nothing. A page that fails is retried inside and then
        raises: the iteration never just ends early. A "directory marker" (key ending in a slash, size 0) of
        a sub-directory shows as a prefix.
        """

    def object_id(self, info: ObjectInfo) -> ObjectId:
        """The ObjectId (full key as path) of a listed object."""

    def fetch_into(
        self,
        buffer: memoryview,
        object_id: ObjectId,
        start: int,
        stop: int,
        progress: Callable[[int], None],
    ) -> None:
        """One ranged GET of bytes `start` to `stop` (exclusive), conditional on the version, into `buffer`.

        Calls `progress(n)` with the count of bytes that are in place so far, growing, the last time with
        `stop - start`. `progress` may raise to give the request up. Status, Content-Range, length and etag are
        checked before the first byte is written to the buffer.
        """

    def close(self) -> None:
        """Let go of connections."""
