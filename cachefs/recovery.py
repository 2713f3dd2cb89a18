"""What a start finds: records and blobs are brought together, what has no counterpart is dropped.

A crash can leave blobs without a record (a fill that was not committed, an eviction that was not finished) and,
after a power cut, records without a blob. Neither is an error.
"""

import logging
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

import msgspec

from cachefs.blobs import COMMITTED, DIGEST_BYTES, Blobs, CachedObject
from cachefs.cached import Header, Pin, Remark
from cachefs.chunk import ObjectId
from cachefs.config import ServerConfig
from cachefs.errors import IndexUnwritable, StateUnwritable
from cachefs.index import Index, Table, Write
from cachefs.kernel.locks import SPILL_NAME
from cachefs.offload import Offload
from cachefs.space import Space
from cachefs.spill import SpillingIndex
from cachefs.tier import BlobStat, Tier

log = logging.getLogger(__name__)

KEY_BYTES = 16
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Found(NamedTuple):
    """The answer of look(). Nothing has been changed yet."""

    objects: list[CachedObject]
    """Least recently used first; all chunks COMMITTED."""
    orphans: list[tuple[str, int]]
    """Blobs without a usable record, and the bytes that they take."""
    writes: list[Write]
    """What makes the index forget records that have no usable blob."""
    lost: list[str]
    """Names of records whose blob was not found. One that lies in a directory that cannot be read is there still."""
    dropped_records: int
    pins: dict[str, Pin]


def open_index(config: ServerConfig, *, session: str, resumes: bool, trouble: str) -> SpillingIndex:
    """The index of a mount's server, with this boot noted in it. `trouble`: why the state cannot be written, or "".

    A server that `resumes` a mount opens it for reading when it cannot be written. Raises as SpillingIndex() does.
    """
    directory, spill = config.state_dir / "index", config.runtime_dir / SPILL_NAME
    if not trouble:
        try:
            index = SpillingIndex(directory, spill, session=session)
            try:
                begin_session(index)
            except BaseException:
                index.close()
                raise
            return index
        except (StateUnwritable, IndexUnwritable) as exc:
            if not resumes:
                raise
            trouble = str(exc)
    log.warning("nothing is kept until the next start, what is local is served: %s", trouble)
    return SpillingIndex(directory, spill, session=session, read_only=trouble)


async def recover(space: Space, blobs: Blobs, index: Index, offload: Offload) -> None:
    """What the state directory holds becomes known, leftovers of a crash are deleted.

    Blobs that cannot be listed may be well at the next start: their records stay, and nothing is kept meanwhile.
    """
    try:
        found = await offload.disk(look, index, blobs.tier)
    except OSError as exc:
        log.error("the blobs cannot be listed, so nothing is kept until the next start: %s", exc)
        space.keep_nothing(str(exc))
        space.pins.update(_pins(index))
        return
    if index.read_only:
        space.keep_nothing(index.read_only)
    else:
        try:
            await offload.index(index.apply, found.writes, durable=True)
        except IndexUnwritable as exc:  # a record that stays must not meet chunks that are new
            log.error("the index keeps what a crash left, so nothing is kept until the next start: %s", exc)
            space.keep_nothing(str(exc))
        await space.unlink({**dict.fromkeys(found.lost, 0), **dict(found.orphans)})
    for cached in found.objects:
        blobs.add(cached)
    space.pins.update(found.pins)


def look(index: Index, tier: Tier) -> Found:
    """Compare all records with all blobs. Blocks: for a thread. Raises OSError when the blobs cannot be listed."""
    blobs: dict[str, BlobStat] = dict(tier.scan())
    by_key: dict[bytes, CachedObject] = {}
    writes: list[Write] = []
    lost: list[str] = []
    dropped = 0
    for key, value in index.scan(Table.OBJECTS):
        cached = _object(value)
        stat = blobs.get(key.hex())
        if cached is None or cached.key != key or stat is None or stat.size != cached.object_id.size:
            writes.append(Write(Table.OBJECTS, key, None))
            dropped += 1
            if stat is None:
                lost.append(key.hex())
            continue
        cached.disk_bytes = stat.disk_bytes
        by_key[key] = cached
    for row, digest in index.scan(Table.CHUNKS):
        cached = by_key.get(row[:KEY_BYTES])
        number = int.from_bytes(row[KEY_BYTES:], "big")
        if cached is None or number >= cached.chunks or len(digest) != DIGEST_BYTES:
            writes.append(Write(Table.CHUNKS, row, None))
        else:
            cached.set_present(number, COMMITTED, digest)
    for cached in by_key.values():
        if cached.seal is not None and not cached.complete:
            cached.seal = None
    writes += _remarks(index, by_key)
    orphans = [(name, stat.disk_bytes) for name, stat in blobs.items() if bytes.fromhex(name) not in by_key]
    objects = sorted(by_key.values(), key=lambda cached: cached.used_s)
    return Found(objects, orphans, writes, lost, dropped, _pins(index))


def _remarks(index: Index, by_key: dict[bytes, CachedObject]) -> list[Write]:
    """Heed what could not be written into headers; the writes that do so now."""
    writes: list[Write] = []
    for key, value in index.scan(Table.REMARKS):
        cached = by_key.get(key)
        if cached is not None:
            cached.had_backing = True
            if value == Remark.BAD.value:
                cached.seal = None
            writes.append(cached.header(cached.seal))
        writes.append(Write(Table.REMARKS, key, None))
    return writes


def _object(value: bytes) -> CachedObject | None:
    try:
        header = msgspec.msgpack.decode(value, type=Header)
    except msgspec.DecodeError:
        return None
    found = header.object
    # Thousands of objects share a source: one string for all.
    cached = CachedObject(ObjectId(sys.intern(found.source), found.path, found.size, found.version), header.used_s)
    cached.seal = header.seal
    cached.had_backing = header.had_backing
    cached.has_header = True
    return cached


def _pins(index: Index) -> dict[str, Pin]:
    pins = (msgspec.msgpack.decode(value, type=Pin) for _, value in index.scan(Table.PINS))
    return {pin.pin_id: pin for pin in pins}


def begin_session(index: Index) -> int:
    """Note that this boot runs with an open state; the epoch, one higher when the last boot ended uncleanly.

    Not noted where the index cannot be written: what was due at the next boot then stays due, for nothing of what that
    would be about is written either. Raises NoSpace.
    """
    boot = _boot_id()
    epoch = int(index.get(Table.META, b"epoch") or b"0")
    last = index.get(Table.META, b"boot")
    clean = index.get(Table.META, b"clean") == b"1"
    if last is not None and last != boot and not clean:
        epoch += 1
    elif last == boot and not clean:
        return epoch  # noted already
    if index.read_only:
        return epoch
    index.apply(
        [
            Write(Table.META, b"boot", boot),
            Write(Table.META, b"clean", b"0"),
            Write(Table.META, b"epoch", str(epoch).encode()),
        ],
        durable=True,
    )
    return epoch


def end_session(index: Index) -> None:
    """All that was written is durable: a reboot from here on is a clean one. Raises NoSpace."""
    if index.read_only:
        return
    index.apply([Write(Table.META, b"clean", b"1")], durable=True)


def _boot_id() -> bytes:
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        # Never equal to another start's: the state then counts as unclean unless it was closed.
        return uuid.uuid4().bytes
