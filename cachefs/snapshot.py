"""Snapshots: each directory of a source is listed when it is first looked into, and stays as it was then.

Where freeze() looks, in this order:
1. memory;
2. the index, if the listing is of this session (the same mount, maybe an earlier server of it);
3. the store, by LIST, retried with backoff until `list_deadline_s`;
4. the index again, whatever session the listing is of: only when the store does not answer (with a warning),
   or when it may not be asked (`offline`).

What is kept is what the store has; a volume's include and exclude patterns apply when a listing is handed out.
So volumes of the same source and the same principal share listings.
"""

import contextlib
import functools
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import msgspec
import trio

from cachefs.chunk import ObjectId
from cachefs.config import VolumeConfig
from cachefs.errors import CachefsError, NoSpace, Offline, StoreUnavailable
from cachefs.flights import Flights
from cachefs.globs import Globs
from cachefs.index import Index, Table, Write
from cachefs.metrics import Metrics
from cachefs.names import is_showable, renamed_file
from cachefs.offload import Offload
from cachefs.store import ObjectInfo, Store

INLINE_DECODE_BYTES = 256 * 1024
"""Larger stored listings (above about 2,000 entries, 2 ms) are decoded in a thread."""

INLINE_MATCH_COST = 50_000
"""Listings that cost more to filter (about 1 ms) are filtered in a thread."""

SHORT_ENTRIES = 900
"""With more names a directory takes more than one LIST (1,000 keys, of which some are markers)."""

STALE_FOR_S = 10.0
"""After the store did not answer, further directories are shown from old listings for so long without asking it."""

_log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One name of a directory. `key_name` is the last part of the key; it differs from `name` only in a collision.

    For a directory: size 0, version "", modified_s 0.
    """

    name: str
    size: int
    version: str
    modified_s: float
    is_directory: bool
    key_name: str


class Listing(msgspec.Struct, frozen=True):
    """A frozen directory: entries sorted by name, when it was listed (seconds since 1970), by which session.

    `hidden` counts keys under the directory that no name can stand for (see names.py).
    """

    entries: tuple[Entry, ...]
    frozen_s: float
    session: str
    hidden: int = 0


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """The value in Table.LISTINGS."""

    directory: str
    frozen_s: float
    session: str
    hidden: int
    entries: tuple[Entry, ...]


class Volume:
    """A source under a name. `root_inode` is 0 where there is no tree (commands without a server)."""

    def __init__(self, config: VolumeConfig, store: Store, *, root_inode: int = 0) -> None:
        self.name = config.name
        self.config = config
        self.store = store
        self.root_inode = root_inode
        self.globs = Globs(config.include, config.exclude)
        self._shown: dict[str, tuple[Listing, Listing]] = {}  # directory -> listing, what is shown of it

    @functools.cached_property
    def listing_prefix(self) -> bytes:
        """16 bytes: the source and whose credentials list it. Keys of its listings start with them."""
        parts = [self.store.identity, self.store.url, self.config.profile or "", self.config.anonymous]
        if self.config.principal:
            parts.append(self.config.principal)
        return hashlib.blake2b(msgspec.json.encode(parts), digest_size=16).digest()

    def shown(self, directory: str, listing: Listing) -> Listing | None:
        """What include and exclude let through, where it is known already."""
        if self.globs.shows_all:
            return listing
        held = self._shown.get(directory)
        return held[1] if held is not None and held[0] is listing else None

    def filtered(self, directory: str, listing: Listing) -> Listing:
        """As shown(), found out now. Changes nothing: a thread may call it."""
        if (known := self.shown(directory, listing)) is not None:
            return known
        place, shows = self.globs.inside(directory), self.globs.shows
        entries = tuple(
            entry for entry in listing.entries if shows(place, entry.key_name, is_directory=entry.is_directory)
        )
        return listing if len(entries) == len(listing.entries) else msgspec.structs.replace(listing, entries=entries)

    def filter_cost(self, directory: str, listing: Listing) -> int:
        """How long filtered() takes, in about 25 ns."""
        return self.globs.cost * (len(listing.entries) + directory.count("/") + 1)

    def remember(self, directory: str, listing: Listing, shown: Listing) -> None:
        """What filtered() has found, for shown(); until another listing of that directory is."""
        self._shown[directory] = (listing, shown)

    def forget_shown(self) -> None:
        """Let go of all listings."""
        self._shown.clear()


class Totals(msgspec.Struct, frozen=True):
    """Of the frozen directories of a volume."""

    directories: int
    objects: int
    size_bytes: int
    hidden: int


def join(directory: str, name: str) -> str:
    """The path of `name` in `directory` (`""` is the root)."""
    return f"{directory}/{name}" if directory else name


def list_directory(
    store: Store, directory: str, on_page: Callable[[int], None] | None = None
) -> tuple[tuple[Entry, ...], int]:
    """All pages of one directory (blocks), as entries sorted by name, and how many keys no name can stand for.

    Nothing is assumed of the order of keys; a name that comes on two pages counts once. `on_page` is told how many
    names there are so far after each page.
    """
    base = f"{directory}/" if directory else ""
    files: dict[str, ObjectInfo] = {}
    directories: set[str] = set()
    hidden = 0
    for page in store.list_directory(directory):
        for prefix in page.prefixes:
            if is_showable(prefix):
                directories.add(prefix)
            else:
                hidden += 1
        for info in page.objects:
            name = info.path[len(base) :]
            if not info.path.startswith(base) or not is_showable(name):
                hidden += name != "" or info.size > 0  # not the directory's own marker
            else:
                files[name] = info
        if on_page is not None:
            on_page(len(files) + len(directories))
    return tuple(_entries(files, directories)), hidden


def _entries(files: dict[str, ObjectInfo], directories: set[str]) -> list[Entry]:
    entries = [Entry(name, 0, "", 0.0, True, name) for name in directories]
    taken = directories | files.keys() if directories & files.keys() else directories
    for name in sorted(files):
        info = files[name]
        shown = name
        if name in directories:
            shown = renamed_file(name, taken)
            taken.add(shown)
        entries.append(Entry(shown, info.size, info.version, info.modified_s, False, name))
    entries.sort(key=_entry_name)
    return entries


def _entry_name(entry: Entry) -> str:
    return entry.name


def _as_listing(stored: _Stored) -> Listing:
    return Listing(stored.entries, stored.frozen_s, stored.session, stored.hidden)


class _TooLongError(Exception):
    """The directory has more names than whoever asked wanted to list."""


class Snapshots:
    """The frozen listings of all volumes. Run `run` in a nursery before the first freeze()."""

    def __init__(
        self,
        index: Index,
        offload: Offload,
        clock: Callable[[], float] = time.time,
        *,
        session: str,
        offline: bool = False,
        list_deadline_s: float = 60.0,
        backoff_s: tuple[float, float] = (0.2, 5.0),
        metrics: Metrics | None = None,
    ) -> None:
        """`clock` is the wall clock; `backoff_s` the first and the longest wait between two tries of a LIST."""
        self._metrics = metrics
        self._index = index
        self._offload = offload
        self._clock = clock
        self._session = session
        self._offline = offline
        self._list_deadline_s = list_deadline_s
        self._backoff_s = backoff_s
        self._flights: Flights[bytes, Listing] = Flights()
        self._filters: Flights[tuple[int, int], Listing] = Flights()  # of a volume and a listing, which they keep alive
        self._memory: dict[bytes, tuple[str, Listing]] = {}  # key -> directory, unfiltered listing
        self._stale_until: dict[bytes, float] = {}  # listing_prefix -> trio time
        self._decoder = msgspec.msgpack.Decoder(_Stored)
        self.counts: Counter[str] = Counter()
        """`listed`, `from_index`, `stale`, `hidden_names`: directories (names) since the start."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The task that owns all listing in flight; ends when cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._filters.run)
            await self._flights.run(task_status)

    async def freeze(self, volume: Volume, directory: str) -> Listing:
        """The frozen listing of a directory (`""` is the root); never waits once it is in memory.

        Raises StoreUnavailable after `list_deadline_s`, Offline, NotFound, AccessDenied, IntegrityError. One
        listing is in flight per directory; cancelling a waiter does not cancel it.
        """
        key = self._key(volume, directory)
        held = self._memory.get(key)
        if held is not None:
            return await self._filtered(volume, directory, held[1])
        listing = await self._whole(self._flights.join, key, functools.partial(self._load, key, volume, directory))
        return await self._filtered(volume, directory, listing)

    async def _filtered(self, volume: Volume, directory: str, listing: Listing) -> Listing:
        """What the volume shows of a listing; once for both. In a thread where others would have to wait for it."""
        if (known := volume.shown(directory, listing)) is not None:
            return known
        if volume.filter_cost(directory, listing) > INLINE_MATCH_COST:
            make = functools.partial(self._filter, volume, directory, listing)
            return await self._filters.join((id(volume), id(listing)), make)
        return self._remember(volume, directory, listing, volume.filtered(directory, listing))

    async def _filter(self, volume: Volume, directory: str, listing: Listing) -> Listing:
        return self._remember(
            volume, directory, listing, await self._offload.match(volume.filtered, directory, listing)
        )

    def _remember(self, volume: Volume, directory: str, listing: Listing, shown: Listing) -> Listing:
        """Only of the listing that is held now: another may have been frozen while a thread filtered this one."""
        held = self._memory.get(self._key(volume, directory))
        if held is not None and held[1] is listing:
            volume.remember(directory, listing, shown)
        return shown

    async def _whole(
        self,
        join: Callable[[bytes, Callable[[], Awaitable[Listing]]], Awaitable[Listing]],
        key: bytes,
        make: Callable[[], Awaitable[Listing]],
    ) -> Listing:
        """What `join` gives; after a freeze_short() that was joined, and ended because there is more, once more."""
        while True:
            with contextlib.suppress(_TooLongError):
                return await join(key, make)

    async def freeze_short(self, volume: Volume, directory: str) -> Listing | None:
        """As freeze(); None for a directory that is not frozen and takes more than one LIST."""
        key = self._key(volume, directory)
        try:
            listing = await self._flights.join(
                key, functools.partial(self._load, key, volume, directory, entries_max=SHORT_ENTRIES)
            )
        except _TooLongError:
            return None
        return await self._filtered(volume, directory, listing)

    async def refreeze(self, volume: Volume, directory: str) -> Listing:
        """List again now, whatever is known: for a directory that has been seen to have changed.

        Raises as freeze() does; what was frozen stays then.
        """
        if self._offline:
            raise Offline(f"{join(volume.store.url, directory)} cannot be listed again offline")
        key = self._key(volume, directory)
        make = functools.partial(self._list, key, volume, directory)
        return await self._filtered(volume, directory, await self._whole(self._flights.join_later, key, make))

    async def peek(self, volume: Volume, directory: str) -> Listing | None:
        """What memory or else the index (of any session) knows; never asks the store."""
        key = self._key(volume, directory)
        held = self._memory.get(key)
        listing = held[1] if held is not None else await self._stored(key)
        return None if listing is None else await self._filtered(volume, directory, listing)

    def is_known(self, volume: Volume, directory: str) -> bool:
        """Whether peek() knows something."""
        key = self._key(volume, directory)
        return key in self._memory or self._index.get(Table.LISTINGS, key) is not None

    async def is_frozen(self, volume: Volume, directory: str) -> bool:
        """Whether this session has frozen it; never asks the store."""
        key = self._key(volume, directory)
        if key in self._memory:
            return True
        stored = await self._stored(key)
        return stored is not None and stored.session == self._session

    def is_stale(self, volume: Volume) -> bool:
        """Whether a directory of the volume is shown from a listing of an earlier session."""
        return any(
            listing.session != self._session
            for key, (_, listing) in self._memory.items()
            if key.startswith(volume.listing_prefix)
        )

    def object_id(self, volume: Volume, directory: str, entry: Entry) -> ObjectId:
        """The ObjectId of a file's entry."""
        assert not entry.is_directory, entry
        path = join(directory, entry.key_name)
        return volume.store.object_id(ObjectInfo(path, entry.size, entry.version, entry.modified_s))

    def known(self, volume: Volume) -> Iterator[tuple[str, Listing]]:
        """(directory, listing) of all that this session froze, in memory or in the index. Slow for large volumes."""
        seen: set[bytes] = set()
        for key, (directory, listing) in list(self._memory.items()):
            if key.startswith(volume.listing_prefix):
                seen.add(key)
                yield directory, volume.filtered(directory, listing)
        for key, value in self._index.scan(Table.LISTINGS, volume.listing_prefix):
            if key not in seen:
                stored = self._decoder.decode(value)
                if stored.session == self._session:
                    yield stored.directory, volume.filtered(stored.directory, _as_listing(stored))

    def totals(self, volume: Volume) -> Totals:
        """Sums over known(). Slow for large volumes: run it in a thread."""
        directories = objects = size_bytes = hidden = 0
        for _, listing in self.known(volume):
            directories += 1
            hidden += listing.hidden
            for entry in listing.entries:
                objects += not entry.is_directory
                size_bytes += entry.size
        return Totals(directories, objects, size_bytes, hidden)

    async def walk(self, volume: Volume, directory: str = "") -> AsyncIterator[tuple[str, Entry]]:
        """(directory, entry) of every file under `directory`; freezes what is not frozen yet, depth first."""
        pending = [directory]
        while pending:
            current = pending.pop()
            listing = await self.freeze(volume, current)
            for entry in listing.entries:
                if not entry.is_directory:
                    yield current, entry
            pending.extend(join(current, entry.name) for entry in reversed(listing.entries) if entry.is_directory)

    def forget(self, volume: Volume) -> None:
        """Drop the volume's listings from memory (not from the index): the next look is as after a restart."""
        volume.forget_shown()
        for key in [key for key in self._memory if key.startswith(volume.listing_prefix)]:
            del self._memory[key]

    @staticmethod
    def _key(volume: Volume, directory: str) -> bytes:
        # surrogatepass: a name that no key can have is asked for as well, and is answered "not found" above.
        digest = hashlib.blake2b(directory.encode(errors="surrogatepass"), digest_size=16).digest()
        return volume.listing_prefix + digest

    async def _load(self, key: bytes, volume: Volume, directory: str, *, entries_max: int | None = None) -> Listing:
        """Steps 1 to 4 of the module's docstring; runs as the flight of `key`."""
        held = self._memory.get(key)
        if held is not None:
            return held[1]
        old = await self._stored(key)
        if old is not None and old.session == self._session:
            return self._hold(key, directory, old, "from_index")
        if self._offline:
            if old is None:
                raise Offline(f"{join(volume.store.url, directory)} has never been listed and cannot be offline")
            return self._hold(key, directory, old, "from_index")
        if old is not None and self._stale_until.get(volume.listing_prefix, 0.0) > trio.current_time():
            return self._hold_stale(key, volume, directory, old, None)
        try:
            tries_max = None if old is None else 2
            return await self._list(key, volume, directory, tries_max=tries_max, entries_max=entries_max)
        except StoreUnavailable as exc:
            if old is None:
                raise
            self._stale_until[volume.listing_prefix] = trio.current_time() + STALE_FOR_S
            return self._hold_stale(key, volume, directory, old, exc)

    async def _stored(self, key: bytes) -> Listing | None:
        value = self._index.get(Table.LISTINGS, key)
        if value is None:
            return None
        if len(value) <= INLINE_DECODE_BYTES:
            return _as_listing(self._decoder.decode(value))
        return _as_listing(await self._offload.index(self._decoder.decode, value))

    def _hold(self, key: bytes, directory: str, listing: Listing, why: str) -> Listing:
        self._memory[key] = (directory, listing)
        self.counts[why] += 1
        return listing

    def _hold_stale(
        self, key: bytes, volume: Volume, directory: str, listing: Listing, error: CachefsError | None
    ) -> Listing:
        about = {
            "source": volume.store.url,
            "directory": directory,
            "age_s": round(self._clock() - listing.frozen_s, 1),
            "error": None if error is None else str(error),
        }
        _log.warning("the store does not answer: showing an old listing", extra=about)
        return self._hold(key, directory, listing, "stale")

    async def _list(
        self,
        key: bytes,
        volume: Volume,
        directory: str,
        *,
        tries_max: int | None = None,
        entries_max: int | None = None,
    ) -> Listing:
        """LIST with backoff, keep in memory and index. `tries_max` ends it earlier than the deadline does.

        Raises _TooLongError after the page with which there are `entries_max` names.
        """

        def on_page(entries: int) -> None:
            self._count_request("ok")
            if entries_max is not None and entries >= entries_max:
                raise _TooLongError

        deadline = trio.current_time() + self._list_deadline_s
        wait_s, wait_s_max = self._backoff_s
        tries = 0
        while True:
            tries += 1
            try:
                entries, hidden = await self._offload.store(list_directory, volume.store, directory, on_page)
                break
            except StoreUnavailable:
                if tries == tries_max or trio.current_time() + wait_s > deadline:
                    self._count_request("error")
                    raise
                self._count_request("retry")
            except CachefsError:
                self._count_request("error")
                raise
            await trio.sleep(wait_s)
            wait_s = min(wait_s * 2, wait_s_max)
        if hidden:
            self.counts["hidden_names"] += hidden
            about = {"source": volume.store.url, "directory": directory, "keys": hidden}
            _log.warning("keys that no name can stand for", extra=about)
        listing = Listing(entries, self._clock(), self._session, hidden)
        await self._persist(key, directory, listing)
        self._stale_until.pop(volume.listing_prefix, None)
        return self._hold(key, directory, listing, "listed")

    def _count_request(self, result: str) -> None:
        if self._metrics is not None:
            self._metrics.store_requests.labels("list", result).inc()

    async def _persist(self, key: bytes, directory: str, listing: Listing) -> None:
        """A full index costs a LIST after the next restart, not this look."""
        try:
            await self._offload.index(self._write, key, directory, listing)
        except NoSpace as exc:
            _log.warning("a listing could not be kept", extra={"directory": directory, "error": str(exc)})

    def _write(self, key: bytes, directory: str, listing: Listing) -> None:
        stored = _Stored(directory, listing.frozen_s, listing.session, listing.hidden, listing.entries)
        value = msgspec.msgpack.encode(stored)
        self._index.apply([Write(Table.LISTINGS, key, value)], durable=False)

    def check_invariants(self) -> None:
        self._flights.check_invariants()
        self._filters.check_invariants()
        for directory, listing in self._memory.values():
            names = [entry.name for entry in listing.entries]
            # INVARIANT: names are sorted, so readdir's offsets mean the same in every server; and unique.
            assert names == sorted(set(names)), directory
            # INVARIANT: every name can be shown.
            assert all(is_showable(name) for name in names), directory
            keys = [(entry.is_directory, entry.key_name) for entry in listing.entries]
            # INVARIANT: nothing is lost or shown twice.
            assert len(set(keys)) == len(keys), directory
