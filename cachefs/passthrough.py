"""Files that the kernel reads by itself: may it, which backing ids are there, and do they work.

Backing ids belong to the keeper, which hands the list to every new server. An id that this server registered is
given back at the last RELEASE of its inode: with an id left, nobody could tell whether the blob is in use. For an
id of an earlier server that count may be off by what a kill interrupted, so it is given back only once the kernel
has forgotten the inode.
"""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from cachefs.chunk import ObjectId
from cachefs.kernel.session import Backing
from cachefs.link import PassthroughRefused

SELF_CHECK_INODE = 2**32 - 1
"""Never given out by the tree; only its name is looked up, it is in no listing."""

NOT_CHECKED = "not checked yet"
SELF_CHECK_DEADLINE_S = 5.0
SELF_CHECK_BYTES = 128 * 1024
SELF_CHECK_PREFIX = ".cachefs-self-check-"
CHECK_WAIT_S = 5.0
"""How long an open waits for a check at most. The check usually takes 25 ms, but 10 s for each question that a keeper
does not answer."""

CHECK_WAITERS_MAX = 256
"""Opens that wait at one time, of the 1200 requests that are served: with 1300 openers and no limit the check's own
requests were not read, and it failed."""

PIPE_BYTES = 65536

_READER = """
import sys
try:
    with open(sys.argv[1], "rb", buffering=0) as file:
        data = file.read()
except OSError as exc:
    sys.stderr.write(exc.strerror or "error")
    sys.exit(3)
sys.stdout.buffer.write(data)
"""

logger = logging.getLogger(__name__)


class BackingReplaced(Exception):
    """The inode is open through another blob than the one that is there now: it needs a new inode."""


class Link(Protocol):
    """The part of KeeperLink that is used here."""

    def backings(self) -> tuple[Backing, ...]: ...
    async def register(self, node: int, fd: int, object_key: str) -> int: ...
    async def close_backing(self, backing_id: int) -> None: ...


class SealedBlobs(Protocol):
    """The part of ChunkCache that is used here."""

    async def open_sealed(self, object_id: ObjectId) -> int | None: ...


class _Known(msgspec.Struct):
    backing_id: int
    device: int
    inode: int
    inherited: bool


class SelfCheck(msgspec.Struct):
    """The file of the check while it runs. `reads` counts READs that reached the server: there should be none."""

    name: str
    backing_id: int
    data: bytes
    reads: int = 0


class CheckWait:
    """Who has to know what a running check will say waits here, never without end. For the trio thread."""

    def __init__(self) -> None:
        self._ended: trio.Event | None = None
        self._until_s = 0.0
        self._waiting = 0

    @property
    def running(self) -> bool:
        return self._ended is not None

    def begin(self) -> None:
        self._ended = trio.Event()
        self._until_s = trio.current_time() + CHECK_WAIT_S

    def end(self) -> None:
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    async def wait(self) -> None:
        """Until end(), or CHECK_WAIT_S after begin(); not at all where CHECK_WAITERS_MAX wait already."""
        if self._ended is None or self._waiting >= CHECK_WAITERS_MAX:
            return
        self._waiting += 1
        try:
            with trio.move_on_at(self._until_s):
                await self._ended.wait()
        finally:
            self._waiting -= 1


class Passthrough:
    """`reason` says why files are not read by the kernel itself; "" when they are. For the trio thread."""

    def __init__(self, link: Link, cache: SealedBlobs, is_known: Callable[[int], Awaitable[bool]], reason: str) -> None:
        """`is_known`: has the kernel this inode still? `reason`: why it must not even be tried, or ""."""
        self._link = link
        self._cache = cache
        self._is_known = is_known
        self.reason = reason or NOT_CHECKED
        self.check_file: SelfCheck | None = None
        self._known: dict[int, _Known] = {}
        self._left_by_check: list[int] = []
        """Of the check file of a server that was killed: with that id there, the keeper refuses another check file."""
        for backing in link.backings():
            if backing.node == SELF_CHECK_INODE:
                self._left_by_check.append(backing.backing_id)
                continue
            self._known[backing.node] = _Known(backing.backing_id, backing.device, backing.inode, inherited=True)
        self._refused_logged = False

    def disable(self, reason: str) -> None:
        """Not tried from now on; what was said first stays."""
        if self.unchecked:
            self.reason = reason

    def believe(self) -> None:
        """An earlier server of this mount saw it work."""
        if self.unchecked:
            self.reason = ""

    @property
    def unchecked(self) -> bool:
        """It may work, and only a check can tell."""
        return self.reason == NOT_CHECKED

    @property
    def enabled(self) -> bool:
        return not self.reason

    async def open(self, inode: int, object_id: ObjectId, *, is_open: bool) -> int | None:
        """The backing id to open `inode` with, or None: open it cached. The caller holds the inode's lock.

        `is_open`: it is open in passthrough mode already. Raises BackingReplaced when only another blob is there.
        """
        fd = await self._cache.open_sealed(object_id)
        if fd is None:
            if is_open:
                raise BackingReplaced
            return None
        try:
            stat = os.fstat(fd)
            known = self._known.get(inode)
            if known is not None and (known.device, known.inode) == (stat.st_dev, stat.st_ino):
                return known.backing_id
            if is_open:
                raise BackingReplaced
            if known is not None:
                await self._give_back(inode, known)
            backing_id = await self._link.register(inode, fd, object_id.key.hex())
            self._known[inode] = _Known(backing_id, stat.st_dev, stat.st_ino, inherited=False)
            return backing_id
        except PassthroughRefused as exc:
            if not self._refused_logged:
                logger.warning("a file is read through the server, not by the kernel itself: %s", exc)
                self._refused_logged = True
            return None
        finally:
            os.close(fd)

    async def closed(self, inode: int) -> None:
        """The last RELEASE of a passthrough inode came. The caller holds the inode's lock."""
        known = self._known.get(inode)
        if known is not None and not known.inherited:
            await self._give_back(inode, known)

    async def give_back_idle(self, is_open: Callable[[int], bool]) -> None:
        """Give back inherited ids of inodes that are not open and that the kernel has forgotten."""
        for inode, known in list(self._known.items()):
            if not known.inherited or is_open(inode) or await self._is_known(inode):
                continue
            if self._known.get(inode) is known and not is_open(inode):  # it may have been opened meanwhile
                await self._give_back(inode, known)

    def has_inherited(self) -> bool:
        return any(known.inherited for known in self._known.values())

    async def _give_back(self, inode: int, known: _Known) -> None:
        if self._known.get(inode) is known:
            del self._known[inode]
        await self._link.close_backing(known.backing_id)

    # The self-check

    async def check(self, mountpoint: Path, directory: Path, nursery: trio.Nursery) -> None:
        """One passthrough open of a test file, by another process: no READ comes and the bytes are right, or the
        mode is off and `reason` says why. The file lies in `directory` (of the local tier) while it is registered.
        What the check of a killed server left there goes first.

        Never raises for what the kernel or the file system refuse; needs the FUSE loop to run.
        """
        if not self.unchecked:
            return
        data = secrets.token_bytes(SELF_CHECK_BYTES)
        name = f"{SELF_CHECK_PREFIX}{secrets.token_hex(8)}"
        path = directory / name
        backing_id = 0
        try:
            while self._left_by_check:
                await self._link.close_backing(self._left_by_check.pop())
            for left in directory.glob(f"{SELF_CHECK_PREFIX}*"):
                left.unlink(missing_ok=True)
            with path.open("xb") as file:
                file.write(data)
            with path.open("rb", buffering=0) as file:
                backing_id = await self._link.register(SELF_CHECK_INODE, file.fileno(), "self-check")
            self.check_file = SelfCheck(name, backing_id, data)
            self.reason = await self._read_back(mountpoint / name, self.check_file, nursery)
        except PassthroughRefused as exc:
            self.reason = str(exc)
        except OSError as exc:
            self.reason = f"the self-check could not be made: {exc.strerror or exc}"
        finally:
            self.check_file = None
            with contextlib.suppress(OSError):  # the next check deletes it
                path.unlink(missing_ok=True)
            if backing_id:
                await self._link.close_backing(backing_id)
        if self.reason:
            logger.warning("sealed files are read through the server, not by the kernel itself: %s", self.reason)

    async def _read_back(self, path: Path, check: SelfCheck, nursery: trio.Nursery) -> str:
        """Why the check failed, or ""."""
        # A process, never a thread of this one: a system call on one's own mount waits for oneself.
        command = [sys.executable, "-I", "-S", "-c", _READER, os.fspath(path)]
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        got = bytearray()
        said = bytearray()
        done = False
        try:
            with trio.move_on_after(SELF_CHECK_DEADLINE_S):
                async with trio.open_nursery() as readers:
                    readers.start_soon(_collect, process.stdout, got)
                    readers.start_soon(_collect, process.stderr, said)
                await process.wait()
                done = True
        finally:
            if not done:
                process.kill()
                nursery.start_soon(process.wait)  # one that hangs in the kernel must not hold up the start
        if not done:
            return f"the self-check got no answer in {SELF_CHECK_DEADLINE_S:.0f} s"
        if process.returncode != 0:
            return f"the self-check could not read its file: {said.decode(errors='replace').strip()[:200]}"
        if check.reads:
            return "the kernel asked the server for the bytes of a passthrough file"
        if got != check.data:
            return "the self-check read wrong bytes"
        return ""


async def _collect(stream: trio.abc.ReceiveStream | None, into: bytearray) -> None:
    assert stream is not None
    while len(into) <= SELF_CHECK_BYTES and (part := await stream.receive_some(PIPE_BYTES)):
        into += part


def unavailable_reason(*, masked: bool, offered: bool) -> str:
    """Why passthrough cannot even be tried, or ""."""
    if masked:
        return "masked in the configuration (kernel_disable)"
    if not offered:
        return f"the kernel does not offer it (Linux 6.9 or newer; this is {os.uname().release})"
    return ""
