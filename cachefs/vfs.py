"""What the kernel sees: lookup, getattr, readdir, open, read, release. Decides nothing about bytes, knows no errno."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from cachefs.chunk import ObjectId, chunk_spans
from cachefs.errors import (
    AccessDenied,
    CachefsError,
    IsADirectory,
    NotADirectory,
    NotFound,
    ObjectChanged,
    ReadOnly,
    StaleInode,
)
from cachefs.kernel.wire import features
from cachefs.ledger import Ledger, Mode
from cachefs.link import KeeperLink
from cachefs.metrics import Metrics
from cachefs.notifier import Notifier
from cachefs.openfiles import OpenFiles, OpenInode, inode_of, passthrough_handle
from cachefs.passthrough import SELF_CHECK_INODE, BackingReplaced, CheckWait, Passthrough, unavailable_reason
from cachefs.prefetch import Known, Place, Prefetcher
from cachefs.store import Store
from cachefs.tree import ROOT_INODE, Node, Tree

WAITING_READS_MAX = 768
"""Per volume, of the 1200 requests that are served at a time: one hung origin cannot take every slot."""

REFRESH_INTERVAL_S = 1.0
"""A directory is listed again at most so often, however many of its objects changed."""

REFRESH_WAIT_S = 10.0
"""How long a READ that met a changed object waits for the new listing before it fails: whoever opens the file
again finds the new version. Longer, and the error would be late for nothing."""

SETTLE_INTERVAL_S = 2.0
"""Between two looks at what an earlier server left, while there is any."""

BLOCK_BYTES = 4096
NAME_BYTES_MAX = 255

logger = logging.getLogger(__name__)


class Usage(Protocol):
    """The part of cached.Usage that statfs needs."""

    @property
    def used_bytes(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...


class Cache(Protocol):
    """The part of ChunkCache that the file system uses."""

    on_sealed: Callable[[ObjectId], None]

    async def read(self, store: Store, object_id: ObjectId, offset: int, length: int) -> bytes | memoryview: ...
    def offer(self, store: Store, object_id: ObjectId, index: int, *, spare: bool = False) -> bool: ...
    def has(self, object_id: ObjectId, index: int) -> bool: ...
    async def ensure(self, store: Store, object_id: ObjectId, index: int) -> None: ...
    async def open_sealed(self, object_id: ObjectId) -> int | None: ...
    def is_local(self, object_id: ObjectId, index: int) -> bool: ...
    def is_here(self, object_id: ObjectId, offset: int, length: int) -> bool: ...
    def is_sealed(self, object_id: ObjectId) -> bool: ...
    def note_open(self, object_id: ObjectId) -> None: ...
    def note_close(self, object_id: ObjectId) -> None: ...
    def usage(self) -> Usage: ...


class Attributes(NamedTuple):
    """What stat(2) shows. `lasting`: the kernel may keep it until it is told otherwise."""

    inode: int
    is_directory: bool
    size: int
    modified_ns: int
    uid: int
    gid: int
    lasting: bool = True
    private: bool = False
    """For its owner only."""


class Opened(NamedTuple):
    """The answer to OPEN. A passthrough handle must not ask for keep_cache (EIO)."""

    handle: int
    keep_cache: bool


class FileSystemUsage(NamedTuple):
    """Of the local tier, in blocks of BLOCK_BYTES."""

    blocks: int
    free_blocks: int


class Vfs:
    """One FUSE file system over the tree and the cache. Run run(), then adopt(), before the first request."""

    def __init__(
        self,
        *,
        tree: Tree,
        cache: Cache,
        notifier: Notifier,
        link: KeeperLink,
        ledger: Ledger,
        metrics: Metrics,
        hints: Known | None = None,
        private_root: bool = False,
    ) -> None:
        """`private_root`: nobody on this machine but root and this user reaches the volumes from the FUSE root.

        Without `hints` readahead knows nothing of files but what is read of them.
        """
        self._private_root = private_root
        self._tree = tree
        self._cache = cache
        self._notifier = notifier
        self._config = link.session.config
        self._root_path = Path(link.session.root_path or self._config.mountpoint)
        disabled = self._config.server.kernel_disable
        reason = unavailable_reason(
            masked="passthrough" in disabled, offered="passthrough" in features(link.session.init, disabled)
        )
        self._passthrough = Passthrough(link, cache, self._is_known, reason)
        self.prefetcher = Prefetcher(cache, hints)
        self._ledger = ledger
        self._metrics = metrics
        self._hits = metrics.read_requests.labels("hit")
        self._misses = metrics.read_requests.labels("miss")
        self._files = OpenFiles(ledger, cache)
        self._listings: dict[int, Sequence[tuple[str, Node]]] = {}
        """What an open directory handle reads from: offsets stay valid when the directory is refreshed meanwhile."""
        self._listing_serial = 0
        self._turns: dict[str, trio.Semaphore] = {}
        self._refreshes: dict[int, trio.Event] = {}
        self._refreshed_s: dict[int, float] = {}
        self._nursery: trio.Nursery | None = None
        self._check_wait = CheckWait()
        """Of opens of sealed files, and of who asks for the mode."""

    # Life

    def adopt(self, *, extension_built: bool) -> None:
        """Take over what an earlier server of this mount had open. The volumes must be in the tree, run() must run."""
        if not extension_built:
            self._passthrough.disable("the extension module _fuseshim is not built")
        if self._ledger.passthrough_checked:
            self._passthrough.believe()
        nodes: dict[int, Node | None] = {}
        for entry in self._files.inherited():
            try:
                nodes[entry.inode] = self._tree.node(entry.inode)
            except CachefsError as exc:
                logger.info("inode %d is open, but of no volume that is mounted: %s", entry.inode, exc)
                nodes[entry.inode] = None
        self._files.adopt(nodes)
        assert self._nursery is not None
        self._nursery.start_soon(self._settle_inherited)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The tasks behind the requests, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._cache.on_sealed = self.on_sealed
            nursery.start_soon(self.prefetcher.run)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # the cache drains after us, and seals objects while it does

    async def check_passthrough(self) -> None:
        """See Passthrough.check(). Nothing is done once it worked in this mount, or where it cannot work."""
        assert self._nursery is not None
        if not self._passthrough.unchecked:
            return
        directory = self._config.server.state_dir / "blobs"
        await self._passthrough.check(self._root_path, directory, self._nursery)
        if self._passthrough.enabled:
            self._ledger.note_passthrough_checked()
        self._ledger.note_passthrough_check_ended()  # not by a server that is killed or replaced before

    def check_passthrough_later(self) -> None:
        """The same in the background. Opens of sealed files wait for its end (see CheckWait), so that none is cached
        for want of 25 ms; not where an earlier server came to an end of it in vain: its readers have waited."""
        assert self._nursery is not None
        if self._passthrough.unchecked and not self._ledger.passthrough_check_ended:
            self._check_wait.begin()
        self._nursery.start_soon(self._check_in_background)

    async def _check_in_background(self) -> None:
        try:
            if self._nursery is not None:  # else this server ends already
                await self.check_passthrough()
        finally:
            self._check_wait.end()

    async def wait_for_passthrough_check(self) -> None:
        """Until passthrough_state() says what holds from now on, as far as CheckWait waits."""
        await self._check_wait.wait()

    def passthrough_state(self) -> tuple[bool, list[str]]:
        """Whether sealed files are read by the kernel itself, and if not, why."""
        return self._passthrough.enabled, [self._passthrough.reason] if self._passthrough.reason else []

    async def _settle_inherited(self) -> None:
        """What an earlier server left: counts that a kill made uncertain, backing ids that nobody uses any more.

        Only the kernel knows: it never forgets an inode that is open.
        """
        while self._passthrough.has_inherited() or self._files.uncertain():
            await trio.sleep(SETTLE_INTERVAL_S)
            for state in self._files.uncertain():
                opened_total = state.opened_total
                if not await self._is_known(state.inode):
                    self._files.settle(state, opened_total)
            await self._passthrough.give_back_idle(lambda inode: self._files.get(inode) is not None)

    async def _is_known(self, inode: int) -> bool:
        """Whether the kernel has this inode. Its name is forgotten then, so that an unused one is gone next time."""
        if not await self._notifier.is_known(inode):
            return False
        try:
            node = self._tree.node(inode)
        except CachefsError:
            return True
        self._notifier.forget_entry(node.parent, os.fsencode(node.name))
        return True

    # Names

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """Raises NotFound, and what Tree.lookup() raises."""
        if name == b".":
            return self.getattr(parent)
        if name == b"..":
            return self.getattr(self._tree.node(parent).parent)
        check = self._passthrough.check_file
        if check is not None and parent == ROOT_INODE and name == check.name.encode():
            return _check_attributes(len(check.data))
        return self._attributes(await self._tree.lookup(parent, os.fsdecode(name)))

    def getattr(self, inode: int) -> Attributes:
        """Raises NotFound, StaleInode."""
        if inode == SELF_CHECK_INODE and (check := self._passthrough.check_file) is not None:
            return _check_attributes(len(check.data))
        return self._attributes(self._tree.node(inode))

    def _attributes(self, node: Node) -> Attributes:
        if not node.view and self._private_root:
            return Attributes(node.inode, True, 0, 0, os.geteuid(), os.getegid(), private=True)
        uid = gid = 0
        if node.view:
            config = self._tree.volume(node.view).config
            uid, gid = config.uid, config.gid
        modified_ns = int(node.modified_s * 1_000_000) * 1000  # stores give milliseconds at best
        return Attributes(node.inode, node.is_directory, node.size, modified_ns, uid, gid)

    def opendir(self, inode: int) -> int:
        """A handle. Raises NotADirectory, NotFound, StaleInode."""
        if not self._tree.node(inode).is_directory:
            raise NotADirectory(f"inode {inode} is a file")
        self._listing_serial = self._listing_serial % 0x7FFFFFFF + 1
        return self._listing_serial << 32 | inode

    async def readdir(self, handle: int, start: int, reply: Callable[[bytes, Attributes, int], bool]) -> None:
        """Call reply(name, attributes, next offset) for each name from offset `start`, until it returns False.

        Offsets are positions in the frozen, sorted listing: the same in every server of the mount.
        """
        listing = self._listings.get(handle)
        if listing is None or start == 0:  # rewinddir() shows what is there now
            listing = self._listings[handle] = await self._tree.children(inode_of(handle))
        for position in range(start, len(listing)):
            name, node = listing[position]
            if not reply(os.fsencode(name), self._attributes(node), position + 1):
                return

    def releasedir(self, handle: int) -> None:
        self._listings.pop(handle, None)

    def statfs(self) -> FileSystemUsage:
        usage = self._cache.usage()
        free_bytes = max(0, usage.capacity_bytes - usage.used_bytes)
        return FileSystemUsage(usage.capacity_bytes // BLOCK_BYTES, free_bytes // BLOCK_BYTES)

    # Open and release

    async def open(self, inode: int, flags: int) -> Opened:
        """Choose the mode at the first open of an inode and keep it to its last RELEASE: the kernel insists (EIO).

        Raises ReadOnly, IsADirectory, NotFound, StaleInode (the kernel then looks the name up again).
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnly("the mount is read-only")
        if inode == SELF_CHECK_INODE and (check := self._passthrough.check_file) is not None:
            return Opened(passthrough_handle(inode, check.backing_id), keep_cache=False)
        node = self._tree.node(inode)
        if node.is_directory:
            raise IsADirectory(f"{node.path} is a directory")
        if self._check_wait.running and self._has_no_mode_yet(node):
            await self._check_wait.wait()  # not with the inode's lock: who waits for that is not counted
        if node.superseded:
            await self._check_same_version(node)
        async with self._files.using(inode, node) as state:
            backing_id = await self._backing_for(state, node)
            if backing_id is not None:
                handle = passthrough_handle(inode, backing_id)
                self._files.add_open(state, Mode.PASSTHROUGH)
            else:
                handle = self._files.cached_handle(inode)
                self._files.add_open(state, Mode.CACHED)
        self._metrics.opens.labels(state.mode.name.lower()).inc()
        return Opened(handle, keep_cache=backing_id is None)

    def _has_no_mode_yet(self, node: Node) -> bool:
        """It is sealed, and its next open decides whether the kernel reads it by itself."""
        state = self._files.get(node.inode)
        return (
            (state is None or not state.is_open)
            and node.object_id is not None
            and self._cache.is_sealed(node.object_id)
        )

    async def _check_same_version(self, node: Node) -> None:
        """A superseded inode may be opened when its path only got a new number because the file was sealed."""
        try:
            current = await self._tree.lookup(node.parent, node.name)
        except NotFound:
            current = None
        if current is None or current.object_id != node.object_id:
            raise StaleInode(f"{node.path} has another version now")

    async def _backing_for(self, state: OpenInode, node: Node) -> int | None:
        """The backing id to answer an OPEN with, None for cached mode. Holds the inode's lock."""
        assert node.object_id is not None
        is_open = state.is_open
        if is_open and state.mode is Mode.CACHED:
            if self._passthrough.enabled and not node.superseded and self._cache.is_sealed(node.object_id):
                self._publish_anew(state)  # it was sealed before this server came; the next open has it better
            return None
        if not is_open:
            unknown = self._files.unknown_are_cached
            if not self._passthrough.enabled or unknown or not self._cache.is_sealed(node.object_id):
                return None
        try:
            return await self._passthrough.open(node.inode, node.object_id, is_open=is_open)
        except BackingReplaced:
            await self._replace(node.inode)
            raise StaleInode(f"{node.path} has another blob now") from None

    async def release(self, handle: int) -> None:
        self.prefetcher.forget(handle)
        inode = inode_of(handle)
        if inode == SELF_CHECK_INODE:
            return
        state = self._files.release(handle)
        if state is not None and state.mode is Mode.PASSTHROUGH:
            # Not here: a server that was killed before the answer would count this RELEASE again.
            self._start(self._close_backing, inode)

    async def _close_backing(self, inode: int) -> None:
        async with self._files.using(inode, None) as state:
            if not state.is_open:
                await self._passthrough.closed(inode)

    # Read

    async def read(self, handle: int, offset: int, length: int) -> bytes | memoryview:
        """`length` bytes from `offset`, fewer only at the end of the file. Valid until the caller's next await.

        Raises what ChunkCache.read() raises; ObjectChanged when the store has another version and the bytes are
        not local.
        """
        inode = inode_of(handle)
        if inode == SELF_CHECK_INODE and (check := self._passthrough.check_file) is not None:
            check.reads += 1
            return check.data[offset : offset + length]
        state = self._files.get(inode)
        node = state.node if state is not None and state.node is not None else self._tree.node(inode)
        object_id = node.object_id
        if object_id is None:
            raise IsADirectory(f"{node.path} is a directory")
        store = self._tree.volume(node.view).store
        self.prefetcher.note_read(handle, store, object_id, offset, length, Place(node.parent, node.name))
        hit = all(self._cache.is_local(object_id, span.index) for span in chunk_spans(object_id.size, offset, length))
        # What a buffer has needs no turn either: the turns may all be taken by READs of a source that hangs.
        turn = None if hit or self._cache.is_here(object_id, offset, length) else await self._wait_for_turn(node.view)
        try:
            try:
                data = await self._cache.read(store, object_id, offset, length)
            except AccessDenied:
                if not self._tree.volume(node.view).config.principal:
                    raise
                # It may be the answer to another principal, whose fill was joined: now with our own credentials.
                data = await self._cache.read(store, object_id, offset, length)
            (self._hits if hit else self._misses).inc()
            self.prefetcher.note_served(handle)
            return data
        except (ObjectChanged, NotFound) as exc:
            await self._refresh(node.parent)
            if isinstance(exc, NotFound):  # ENOENT would say that the name is wrong; the handle is stale
                raise ObjectChanged(f"{node.path} is gone from its source") from exc
            raise
        finally:
            if turn is not None:
                turn.release()

    async def _wait_for_turn(self, view: str) -> trio.Semaphore:
        """To wait for the volume's source. The caller releases it."""
        turn = self._turns.get(view)
        if turn is None:
            turn = self._turns[view] = trio.Semaphore(WAITING_READS_MAX)
        try:
            turn.acquire_nowait()  # no checkpoint in the usual case
        except trio.WouldBlock:
            await turn.acquire()
        return turn

    # Changes

    def on_sealed(self, object_id: ObjectId) -> None:
        """An object is all local and checked. Where cold handles hold its inode in cached mode, give the path a
        new inode, so that the next open gets passthrough; the old handles live on."""
        if self._passthrough.enabled:
            for state in self._files.cached(object_id):
                if state.node is not None and not state.node.superseded:
                    self._publish_anew(state)

    def _publish_anew(self, state: OpenInode) -> None:
        self._start(self._replace, state.inode)

    async def _replace(self, inode: int) -> None:
        try:
            old = self._tree.node(inode)
            new = await self._tree.replace(inode)
        except CachefsError as exc:  # the path or the volume is gone, or the index is full: the old inode goes on
            logger.warning("inode %d keeps its number: %s", inode, exc)
            return
        if new.inode != inode:
            self._notifier.forget_entry(old.parent, os.fsencode(old.name))

    async def _refresh(self, directory: int) -> None:
        """List a directory again after one of its objects changed, once for all who ask. Waits for it a while."""
        done = self._refreshes.get(directory)
        if done is None:
            now = trio.current_time()
            self._refreshed_s = {
                inode: then for inode, then in self._refreshed_s.items() if now - then < REFRESH_INTERVAL_S
            }
            if directory in self._refreshed_s:
                return
            done = self._refreshes[directory] = trio.Event()
            if not self._start(self._refresh_now, directory):
                del self._refreshes[directory]
                return
        with trio.move_on_after(REFRESH_WAIT_S):
            await done.wait()

    async def _refresh_now(self, directory: int) -> None:
        try:
            for parent, name in await self._tree.refresh_directory(directory):
                self._notifier.forget_entry(parent, os.fsencode(name))
        except CachefsError as exc:
            logger.warning("a directory with a changed object could not be listed again: %s", exc)
        finally:
            self._refreshed_s[directory] = trio.current_time()
            self._refreshes.pop(directory).set()

    def _start(self, function: Callable[[int], Awaitable[None]], inode: int) -> bool:
        """In the background. False when this server is about to end: the next one does it."""
        if self._nursery is None:
            return False
        self._nursery.start_soon(function, inode)
        return True

    def count_error(self, error: BaseException, *, of_read: bool) -> None:
        """An error that a request is answered with."""
        self._metrics.count_error(error)
        if of_read:
            self._metrics.read_requests.labels("error").inc()

    def check_invariants(self) -> None:
        self._files.check_invariants()


def _check_attributes(size: int) -> Attributes:
    return Attributes(SELF_CHECK_INODE, False, size, 0, os.geteuid(), os.getegid(), lasting=False)
