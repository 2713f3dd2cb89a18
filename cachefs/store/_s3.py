"""What the S3 stores share: URLs, answers to LIST, checks on answers to GET, and which answer is which error."""

import datetime
import email.utils
import random
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import unquote_plus

import msgspec

from cachefs.chunk import CHUNK_BYTES, ObjectId
from cachefs.errors import (
    AccessDenied,
    CachefsError,
    IntegrityError,
    NotFound,
    ObjectChanged,
    StoreUnavailable,
    UsageError,
    printable,
)
from cachefs.store import ListPage, ObjectInfo
from cachefs.store._base import RangeStore

BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
"""More than AWS allows today: its oldest buckets and other makers' have capitals, underscores and 255 characters."""
REGION = re.compile(r"[a-z0-9-]{1,63}")
"""It is a label of a host's name, of which DNS takes 63 characters."""
SIZE_MAX = (1 << 63) - 1 - CHUNK_BYTES
"""The kernel's sizes and offsets are signed and have 64 bits; the end of a size's last chunk is such an offset too."""
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
PAGE_KEYS = 1000
LIST_ATTEMPTS = 5
LIST_BACKOFF_S = 0.1
PROBE_VALID_S = 2.0
"""For so long the answer to probe() is also the listing of the root: who opens a file right after mounting waits for
one round trip less."""
PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
DENIED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"})


class Location(msgspec.Struct, frozen=True):
    """`s3://bucket/prefix` taken apart: `prefix` without the slash at its end, `endpoint` None for AWS."""

    bucket: str
    prefix: str
    endpoint: str | None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    @property
    def identity(self) -> str:
        return f"s3://{self.bucket}" + (f"@{self.endpoint}" if self.endpoint else "")

    def directory_key(self, directory: str) -> str:
        """The prefix that all keys of a directory start with: ends in a slash, "" for a bucket's root."""
        parts = [part for part in (self.prefix, directory) if part]
        return "/".join(parts) + "/" if parts else ""


class RawObject(NamedTuple):
    """One `Contents` of a LIST, as the store wrote it (the etag without quotes)."""

    key: str
    size: int
    etag: str
    modified_s: float


class RawPage(NamedTuple):
    """The answer to one LIST; `next_token` None on the last page."""

    objects: tuple[RawObject, ...]
    prefixes: tuple[str, ...]
    next_token: str | None


def parse_location(source: str, endpoint: str | None) -> Location:
    """UsageError unless `source` is s3://bucket[/prefix]. Nothing is decoded: `%`, `#` and `?` are parts of a key.

    One slash at the end is dropped; further ones belong to the prefix.
    """
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    if not bucket:
        raise UsageError(f"{source}: no bucket; write s3://BUCKET/PREFIX")
    if not BUCKET_NAME.fullmatch(bucket):
        raise UsageError(f"{source}: {bucket!r} cannot be a bucket's name; write s3://BUCKET/PREFIX")
    if "\x00" in prefix:
        raise UsageError(f"{source!r}: a prefix has no NUL byte in it")
    return Location(bucket, prefix.removesuffix("/"), endpoint)


def aws_endpoint(region: str) -> str:
    """Where AWS serves S3 in a region."""
    return f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")


def bare_etag(etag: str | None) -> str:
    """Without quotes: some stores quote it in a GET and not in a LIST."""
    return (etag or "").strip().strip('"')


# --- LIST


def _text(element: ET.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""


def _timestamp(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def parse_list(body: bytes, where: str) -> RawPage:
    """A ListObjectsV2 answer. StoreUnavailable when it is cut or no XML, IntegrityError when it contradicts itself."""
    try:
        root = ET.fromstring(body)
    except (ET.ParseError, LookupError, ValueError) as error:  # the last two: an encoding that nobody has
        raise StoreUnavailable(f"{where}: the listing is not whole or no XML; is this an S3 endpoint?") from error
    if root.tag.rpartition("}")[2] != "ListBucketResult":
        raise StoreUnavailable(f"{where}: the answer is no listing; is this an S3 endpoint?")
    encoded = _text(root, "EncodingType") == "url"

    def name(text: str) -> str:
        # In this encoding a space is "+" at AWS and "%20" elsewhere, and a plus always "%2B".
        return unquote_plus(text, errors="strict") if encoded else text

    try:
        objects = tuple(
            RawObject(
                name(_text(item, "Key")),
                int(_text(item, "Size")),
                bare_etag(_text(item, "ETag")),
                _timestamp(_text(item, "LastModified")),
            )
            for item in root.findall("{*}Contents")
        )
        prefixes = tuple(name(_text(item, "Prefix")) for item in root.findall("{*}CommonPrefixes"))
    except (ValueError, OverflowError) as error:
        reason = printable(str(error)[:200])
        raise IntegrityError(f"{where}: the listing has an entry that cannot be read: {reason}") from error
    more = _text(root, "IsTruncated") == "true"
    token = _text(root, "NextContinuationToken")
    if more and not token:
        raise IntegrityError(f"{where}: the listing says that it goes on, and not where")
    return RawPage(objects, prefixes, token if more else None)


def check_page(page: RawPage, prefix: str, token: str | None, where: str) -> None:
    """IntegrityError for a page that is not what was asked for."""
    if page.next_token is not None and page.next_token == token:
        raise IntegrityError(f"{where}: the listing goes round in a circle")
    for item in page.objects:
        if not item.key.startswith(prefix) or item.size < 0:
            raise IntegrityError(f"{where}: the listing has {item.key!r}, which was not asked for")
        if item.size > SIZE_MAX:
            raise IntegrityError(f"{where}: the listing gives {item.key!r} {item.size:.2g} bytes; no file has so many")
        if not item.etag and item.key != prefix:
            raise IntegrityError(f"{where}: the listing has no ETag for {item.key!r}; versions cannot be told apart")
    for name in page.prefixes:
        if not name.startswith(prefix) or not name.endswith("/") or name == prefix:
            raise IntegrityError(f"{where}: the listing has {name!r}, which was not asked for")


def is_directory_marker(item: RawObject, prefix: str) -> bool:
    """The key of the directory itself, which consoles create to show an empty directory."""
    return item.key == prefix


# --- GET


def check_range(
    object_id: ObjectId, start: int, stop: int, *, status: int, content_range: str, length: int | None, etag: str
) -> None:
    """What a conditional ranged GET was answered with, before a byte of it is believed.

    IntegrityError for another status than 206, another range or another length (None: not said); ObjectChanged for
    another etag or another total size.
    """
    where = f"{object_id.source}: {object_id.path}"
    if status != 206:
        raise IntegrityError(f"{where}: the store answered {status} to a request for a part (206 was due)")
    match = CONTENT_RANGE.fullmatch(content_range.strip())
    if match is None:
        raise IntegrityError(f"{where}: the store does not say which part it sent ({content_range!r})")
    first, last, total = map(int, match.groups())
    check_part(object_id, (start, stop), (first, last + 1), size=total, etag=etag)
    if length is not None and length != stop - start:
        raise IntegrityError(f"{where}: the store sends {length} bytes as a part of {stop - start}")


def check_part(object_id: ObjectId, asked: tuple[int, int], got: tuple[int, int], *, size: int, etag: str) -> None:
    """The same for what a library has taken apart already."""
    where = f"{object_id.source}: {object_id.path}"
    if bare_etag(etag) != object_id.version or size != object_id.size:
        raise ObjectChanged(
            f"{where} changed: it was {object_id.version}, {object_id.size} bytes, and is {printable(etag)}, {size}"
        )
    if got != asked:
        raise IntegrityError(f"{where}: the store sent bytes {got[0]}-{got[1]} instead of {asked[0]}-{asked[1]}")


# --- errors


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """For how many seconds a Retry-After header (seconds, or a date; RFC 9110 10.2.3) asks to wait, None if for none.

    `now_s`: seconds since 1970.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, OverflowError):
        return None


def status_error(
    status: int,
    code: str,
    *,
    bucket: str,
    what: str,
    region: str,
    actual_region: str | None,
    retry_after_s: float | None = None,
) -> CachefsError:
    """The error that an S3 answer means; `code` is the body's `Code` or "", `what` names the object or prefix."""
    detail = f"{status} {code}".strip()
    if actual_region is not None and REGION.fullmatch(actual_region) is None:
        actual_region = None
    if code == "NoSuchBucket":
        return NotFound(f"there is no bucket {bucket!r} here ({what}): check its name, --endpoint-url and --region")
    if actual_region and actual_region != region and status in (301, 307, 400, 403):
        return UsageError(f"bucket {bucket!r} is in region {actual_region}, not {region}: use --region {actual_region}")
    if status == 404:
        return NotFound(f"{what}: not found ({detail})")
    if status == 412:
        return ObjectChanged(f"{what} changed ({detail})")
    if status == 416:
        return ObjectChanged(f"{what} changed: it is shorter now ({detail})")
    if status in (401, 403) or code in DENIED_CODES:
        hint = "check the credentials (AWS_ACCESS_KEY_ID, --profile) and their rights, or use --anonymous"
        if code == "RequestTimeTooSkewed":
            hint = "set this machine's clock"
        return AccessDenied(f"{what}: access denied ({detail}): {hint}")
    if status in (408, 429) or code in PASSING_CODES or (status >= 500 and status not in (501, 505)):
        return StoreUnavailable(f"{what}: the store cannot answer now ({detail})", retry_after_s=retry_after_s)
    if status in (301, 307) or code == "AuthorizationHeaderMalformed":
        return UsageError(f"bucket {bucket!r} is in another region than {region} ({detail}): give --region")
    return UsageError(f"{what}: the store refuses the request ({detail}): check --endpoint-url and --region")


class S3Store(RangeStore):
    """The half of an S3 store that does not depend on the library: directories, identities, the probe."""

    def __init__(self, location: Location, list_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.location = location
        self.identity = location.identity
        self.url = location.url
        self._list_timeout_s = list_timeout_s
        self._clock = clock
        self._probed: tuple[RawPage, float] | None = None

    def _list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        """One LIST request. Raises what `status_error` and `parse_list` make of the answer."""
        raise NotImplementedError

    def probe(self) -> None:
        """One LIST: NotFound, AccessDenied, StoreUnavailable, UsageError."""
        prefix = self.location.directory_key("")
        asked_s = self._clock()
        page = self._page(prefix, delimiter="/", token=None, limit=PAGE_KEYS)
        if page.objects or page.prefixes or not prefix:
            self._probed = (page, asked_s) if page.next_token is None else None
            return
        # Nothing under "prefix/": perhaps the source names one object.
        beside = self._page(self.location.prefix, delimiter="", token=None, limit=1)
        if any(item.key == self.location.prefix for item in beside.objects):
            parent = self.url.rpartition("/")[0]
            raise UsageError(f"{self.url} is an object, not a directory: use {parent}")
        raise NotFound(f"there is nothing under {self.url}/: check the prefix")

    def list_directory(self, directory: str) -> Iterator[ListPage]:
        """See Store."""
        prefix = self.location.directory_key(directory)
        base = len(self.location.directory_key(""))
        token: str | None = None
        seen: set[str] = set()
        probed, self._probed = self._probed, None
        while True:
            if probed is not None and not directory and self._clock() - probed[1] < PROBE_VALID_S:
                page, probed = probed[0], None
            else:
                page = self._page(prefix, delimiter="/", token=token, limit=PAGE_KEYS)
            objects = tuple(
                ObjectInfo(item.key[base:], item.size, item.etag, item.modified_s)
                for item in page.objects
                if not is_directory_marker(item, prefix)
            )
            yield ListPage(objects, tuple(name[len(prefix) : -1] for name in page.prefixes))
            token = page.next_token
            if token is None:
                return
            if token in seen:
                raise IntegrityError(f"{self.url}: the listing goes round in a circle")
            seen.add(token)

    def _page(self, prefix: str, *, delimiter: str, token: str | None, limit: int) -> RawPage:
        """One page, asked for again with backoff while the failure may pass and `list_timeout_s` is not over."""
        end = self._clock() + self._list_timeout_s
        where = f"s3://{self.location.bucket}/{prefix}"
        attempt = 1
        while True:
            try:
                left = max(0.1, end - self._clock())
                page = self._list(prefix, delimiter=delimiter, token=token, limit=limit, timeout_s=left)
                check_page(page, prefix, token, where)
                return page
            except StoreUnavailable as error:
                # Half of it by chance: many that were refused together do not come back together.
                pause = LIST_BACKOFF_S * 2**attempt * (0.5 + random.random() / 2) + (error.retry_after_s or 0.0)
                if attempt == LIST_ATTEMPTS or self._clock() + pause >= end:
                    raise
            time.sleep(pause)
            attempt += 1

    def object_id(self, info: ObjectInfo) -> ObjectId:
        """See Store: the whole key is the path, so that two prefixes of a bucket share bytes."""
        return ObjectId(self.identity, self.location.directory_key("") + info.path, info.size, info.version)
