"""What is fetched before anybody reads it: a model's small files when its directory is first listed, or all of a
volume (`--prefetch auto`, `all`). Readers go first; what fails stays for them.
"""

import collections
import contextlib
import functools
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import trio

from cachefs.chunk import ObjectId, chunk_count
from cachefs.core import Core
from cachefs.errors import AccessDenied, CachefsError, IntegrityError, NoSpace, NotFound, ObjectChanged, Offline
from cachefs.model_files import load_order, looks_like_model, small_files
from cachefs.prefetch import Prefetcher
from cachefs.snapshot import Listing, Volume, join

SMALL_WAIT_S = 30.0
"""For the small files of one directory to be started; by then a load that is under way has read them itself."""

SMALL_WORKERS = 4
"""Directories at a time: a source that hangs holds up the small files of others for a while only."""

DIRECTORIES_MAX = 1_000
"""That wait for their small files; those that are listed then have none fetched."""

POLL_S = 0.05
FAILURES_MAX = 24
"""In a row: the source does not answer, and is not asked for the rest of a hundred gigabytes."""

SKIPPED_MAX = 100
"""Objects that are gone or changed since they were listed: each costs a pass."""

TRIES_MAX = 10
PAUSE_S = (2.0, 300.0)
"""After a failure of the source, doubled each time: 10 tries are 20 minutes."""

log = logging.getLogger(__name__)


class _GaveUp(Exception):
    """Many chunks failed one after the other."""


class Ahead:
    """One per server. Run `run`; what is asked for before it waits for it. Methods run on the trio thread."""

    def __init__(self, core: Core, prefetcher: Prefetcher) -> None:
        self._core = core
        self._prefetcher = prefetcher
        self._volumes: set[Volume] = set()
        self._wanting: set[Volume] = set()
        """Where small files are wanted: one of the volume's pods said so, which need not be the first."""
        self._late_s: dict[Volume, float] = {}
        """When a directory's small files took all of SMALL_WAIT_S: so long again no worker waits for that volume."""
        self._scopes: dict[Volume, set[trio.CancelScope]] = {}
        self._sweeping: dict[Volume, object] = {}
        """A mark of the sweep that runs: it may end long after stop(), when another one has begun."""
        self._early: list[Callable[[], None]] = []
        self._nursery: trio.Nursery | None = None
        self._send, self._receive = trio.open_memory_channel[tuple[Volume, str, Listing]](DIRECTORIES_MAX)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for _ in range(SMALL_WORKERS):
                    nursery.start_soon(self._small_worker, self._receive.clone())
                early, self._early = self._early, []
                for start in early:
                    start()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(self, volume: Volume, prefetch: str, *, top: str = "", look: bool = True) -> None:
        """A volume is there. `prefetch`: "auto", "none" or "all"; `top`: the directory that is its source.

        Without `look` "auto" waits until somebody looks into it (after a restart, when it was done already).
        """
        self._volumes.add(volume)
        if prefetch != "none":
            self._wanting.add(volume)
        if self._core.config.offline:
            return
        if prefetch == "all":
            self._begin(volume, functools.partial(self._everything, volume, top))
        elif prefetch == "auto" and look:
            self._begin(volume, functools.partial(self._look, volume, top))

    def _begin(self, volume: Volume, work: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            self._early.append(functools.partial(self._begin, volume, work))
        elif volume in self._volumes:
            self._nursery.start_soon(self._guarded, volume, work)

    def stop(self, volume: Volume) -> None:
        """The volume is gone, or nobody has it any more."""
        self._volumes.discard(volume)
        self._wanting.discard(volume)
        self._late_s.pop(volume, None)
        self._sweeping.pop(volume, None)  # it may start again before this one has ended
        for scope in self._scopes.get(volume, set()):
            scope.cancel()

    def listed(self, volume: Volume, directory: str, listing: Listing) -> None:
        """A directory was looked into for the first time."""
        if volume in self._wanting and not self._core.config.offline:
            self._want_small(volume, directory, listing)

    def _want_small(self, volume: Volume, directory: str, listing: Listing) -> None:
        if volume in self._volumes and looks_like_model(listing.entries):
            try:
                self._send.send_nowait((volume, directory, listing))
            except trio.WouldBlock:
                log.debug("too many directories at once: the small files of one are left to its readers")

    async def _guarded(self, volume: Volume, work: Callable[[], Awaitable[None]]) -> None:
        """Ends with the volume; its failures are nobody's."""
        scope = trio.CancelScope()
        scopes = self._scopes.setdefault(volume, set())
        scopes.add(scope)
        try:
            with scope:
                await work()
        except CachefsError as exc:
            log.debug("prefetch of %s ends: %s", volume.name, exc)
        except Exception:  # our own bug must not end the server
            log.exception("prefetch of %s failed", volume.name)
        finally:
            scopes.discard(scope)
            if not scopes and self._scopes.get(volume) is scopes:
                del self._scopes[volume]

    # -- small files

    async def _look(self, volume: Volume, top: str) -> None:
        """A root that takes more than a page is not listed for this: whoever looks into it does that."""
        listing = await self._core.snapshots.freeze_short(volume, top)
        if listing is not None:
            self._want_small(volume, top, listing)

    async def _small_worker(self, receive: trio.MemoryReceiveChannel[tuple[Volume, str, Listing]]) -> None:
        async for volume, directory, listing in receive:
            if volume in self._volumes:
                await self._guarded(volume, functools.partial(self._fetch_small, volume, directory, listing))

    async def _fetch_small(self, volume: Volume, directory: str, listing: Listing) -> None:
        if trio.current_time() < self._late_s.get(volume, -math.inf) + SMALL_WAIT_S:
            return
        with trio.move_on_after(SMALL_WAIT_S) as scope:
            for entry in small_files(listing.entries):
                object_id = self._core.snapshots.object_id(volume, directory, entry)
                if not self._core.cache.has(object_id, 0):
                    await self._prefetcher.fetch(volume.store, object_id, 0)
        if scope.cancelled_caught and volume in self._volumes:
            self._late_s[volume] = trio.current_time()

    # -- all of a volume

    async def _everything(self, volume: Volume, top: str) -> None:
        """Passes over the volume until nothing in one failed, or more of them are pointless."""
        if volume in self._sweeping:  # published twice
            return
        mark = self._sweeping[volume] = object()
        try:
            await self._sweep(volume, top)
        finally:
            if self._sweeping.get(volume) is mark:
                del self._sweeping[volume]

    async def _sweep(self, volume: Volume, top: str) -> None:
        sweep = _Sweep(self._core, self._prefetcher, volume, top)
        pause_s, pause_s_max = PAUSE_S
        tries = 0
        while True:
            before = sweep.progress
            try:
                if not await sweep.go():
                    log.info("prefetch of %s is done: %d chunks were fetched", volume.name, sweep.fetched)
                    return
            except (AccessDenied, NoSpace, NotFound, Offline) as exc:
                log.info("prefetch of %s ends: %s", volume.name, exc)
                return
            except CachefsError as exc:
                log.debug("prefetch of %s waits: %s", volume.name, exc)
            if sweep.progress > before:
                tries, pause_s = 0, PAUSE_S[0]
            tries += 1
            if tries > TRIES_MAX:
                log.warning("prefetch of %s ends: %d tries in a row brought nothing", volume.name, TRIES_MAX)
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, pause_s_max)


class _Sweep:
    """The chunks of a volume in load order, as many in flight as the budget and the source's pace allow."""

    def __init__(self, core: Core, prefetcher: Prefetcher, volume: Volume, top: str) -> None:
        self._core = core
        self._prefetcher = prefetcher
        self._volume = volume
        self._top = top
        self._started: collections.deque[tuple[ObjectId, int]] = collections.deque()
        self._failed: list[tuple[ObjectId, int]] = []
        self._failures_in_a_row = 0
        self._skipped: set[ObjectId] = set()
        self._oldest: ObjectId | None = None
        """Of the volume's local objects the least recently used: once it is evicted, others of the volume follow."""
        self.fetched = 0

    @property
    def progress(self) -> int:
        return self.fetched + len(self._skipped)

    async def go(self) -> bool:
        """One pass. True when chunks failed, and the source answers now. Raises what the source says."""
        self._started.clear()
        self._failed.clear()
        self._failures_in_a_row = 0
        try:
            await self._touch_all()
            await self._start_all()
            while self._started:
                self._settle()
                if self._started:
                    await trio.sleep(POLL_S)
        except _GaveUp:
            pass
        if not self._failed or self._evicts_its_own():
            return False
        object_id, index = self._failed[0]
        try:
            await self._core.cache.ensure(self._volume.store, object_id, index)
            self.fetched += 1
        except (ObjectChanged, NotFound, IntegrityError) as exc:  # of this object; the others may be fine
            if len(self._skipped) >= SKIPPED_MAX:
                raise
            self._skipped.add(object_id)
            log.debug("prefetch of %s goes on without an object: %s", self._volume.name, exc)
        return True

    async def _touch_all(self) -> None:
        """What is local of the volume is the last to go for the rest of it, and what is loaded first the very last."""
        cache = self._core.cache
        local: list[ObjectId] = []
        self._oldest = None
        if not cache.usage().objects_total:
            return
        with contextlib.suppress(CachefsError):  # said again by the listing that follows
            async with contextlib.aclosing(self._files()) as files:
                async for object_id in files:
                    if cache.local_bytes(object_id):
                        local.append(object_id)
        for object_id in reversed(local):
            cache.touch(object_id)
        self._oldest = local[-1] if local else None

    def _evicts_its_own(self) -> bool:
        return self._oldest is not None and not self._core.cache.local_bytes(self._oldest)

    async def _start_all(self) -> None:
        async with contextlib.aclosing(self._files()) as files:
            await self._start_files(files)

    async def _start_files(self, files: AsyncIterator[ObjectId]) -> None:
        cache = self._core.cache
        left_bytes, staying = cache.room()
        left_bytes -= sum(staying.values())
        async for object_id in files:
            if object_id in self._skipped:
                continue
            left_bytes -= object_id.size - staying.get(object_id, 0)
            for index in range(chunk_count(object_id.size)):
                if left_bytes < 0 or (not cache.is_local(object_id, index) and self._evicts_its_own()):
                    log.info("prefetch of %s ends: the cache cannot hold all of it", self._volume.name)
                    return
                if not cache.is_local(object_id, index):
                    await self._prefetcher.fetch(self._volume.store, object_id, index)
                    self._started.append((object_id, index))
                    self._settle()

    async def _files(self) -> AsyncGenerator[ObjectId, None]:
        """Directory by directory, sub-directories after the files."""
        snapshots = self._core.snapshots
        pending = [self._top]
        while pending:
            directory = pending.pop()
            listing = await snapshots.freeze(self._volume, directory)
            # In a thread: sorting a million names takes seconds.
            for entry in await self._core.offload.disk(load_order, listing.entries):
                yield snapshots.object_id(self._volume, directory, entry)
                await trio.lowlevel.checkpoint()
            names = [entry.name for entry in listing.entries if entry.is_directory]
            pending.extend(join(directory, name) for name in reversed(names))

    def _settle(self) -> None:
        """Look at what was started first: as long as it is in flight, nothing is said of what came after it."""
        cache = self._core.cache
        while self._started and not cache.is_filling(*self._started[0]):
            chunk = self._started.popleft()
            if cache.is_local(*chunk):
                self.fetched += 1
                self._failures_in_a_row = 0
                if self._oldest is None:
                    self._oldest = chunk[0]
                continue
            self._failed.append(chunk)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= FAILURES_MAX:
                raise _GaveUp
