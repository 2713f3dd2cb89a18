"""The only pyfuse3 import, and the only place where an error becomes an errno. Translates, decides nothing.

A server always resumes a session: the keeper mounted and answered the kernel's INIT, so libfuse is fed the stored
INIT through a socket, which is replaced by the device while libfuse handles it.
"""

import errno
import functools
import importlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import trio

from cachefs.errors import CachefsError, IsADirectory, NotADirectory, NotFound, ReadOnly, StaleInode
from cachefs.kernel.session import Session
from cachefs.kernel.wire import resend_message
from cachefs.vfs import BLOCK_BYTES, NAME_BYTES_MAX, Attributes, Vfs


def _load_shim() -> bool:
    """Load the functions that stand before libfuse's. False when the extension was not built."""
    flags = sys.getdlopenflags()
    # RTLD_GLOBAL, and before pyfuse3: the loader then finds our functions first.
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        importlib.import_module("cachefs._fuseshim")
    except ImportError:
        return False
    finally:
        sys.setdlopenflags(flags)
    return True


SHIM_BUILT = _load_shim()

import pyfuse3  # noqa: E402

MAX_TASKS = 1200
"""More than the kernel's 1024 background requests: READs that wait never hold up a stat."""

TIMEOUT_S = 86400
"""Names and attributes hold until the kernel is told otherwise: a stat costs 0.9 us instead of 47."""

READ_BLOCK_BYTES = 1024 * 1024
"""st_blksize: cp and cat read in pieces of it. The kernel never asks for more per READ (256 pages)."""

HAND_OVER_GRACE_S = 0.5

TOLD_AGAIN_S = 10.0
ORDINARY = (NotFound, NotADirectory, IsADirectory, StaleInode, ReadOnly)
"""What programs ask for all the time."""

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]


def _answer(handler: Handler[P, T]) -> Handler[P, T]:
    """For every handler: pyfuse3 catches only FUSEError, anything else that escapes would end the session.

    trio.Cancelled passes: the server ends, the request is not answered and comes again by RESEND.
    """

    async def wrapper(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except CachefsError as exc:
            self.vfs.count_error(exc, of_read=handler.__name__ == "read")
            self.tell(handler.__name__, exc)
            raise pyfuse3.FUSEError(exc.errno) from None
        except Exception as exc:
            self.vfs.count_error(exc, of_read=handler.__name__ == "read")
            logger.exception("unexpected error in %s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    functools.update_wrapper(wrapper, handler)
    return wrapper


class Operations(pyfuse3.Operations):
    """The handlers. What is not here gets ENOSYS, which the kernel remembers for the life of the mount: FLUSH,
    FSYNC, ACCESS and the reading of extended attributes then cost nothing any more (SEMANTICS.md)."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, vfs: Vfs, on_init: Callable[[], None]) -> None:
        super().__init__()
        self.vfs = vfs
        self._on_init = on_init
        self._told_s: dict[str, float] = {}

    def tell(self, request: str, exc: CachefsError) -> None:
        """A user who sees EIO looks into the log: one line per kind of error and TOLD_AGAIN_S, ordinary ones aside."""
        kind, now_s = type(exc).__name__, trio.current_time()
        if isinstance(exc, ORDINARY) or now_s - self._told_s.get(kind, -TOLD_AGAIN_S) < TOLD_AGAIN_S:
            logger.debug("%s: %s", request, exc)
            return
        self._told_s[kind] = now_s
        logger.warning("%s is answered with %s: %s", request, errno.errorcode[exc.errno], exc)

    def init(self) -> None:
        self._on_init()

    @_answer
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _entry(await self.vfs.lookup(parent_inode, name))

    @_answer
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _entry(self.vfs.getattr(inode))

    async def forget(self, inode_list: Any) -> None:
        """Nothing is counted: FORGETs are lost over a restart, so nothing may depend on them."""

    @_answer
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self.vfs.opendir(inode)

    @_answer
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def reply(name: bytes, attributes: Attributes, next_offset: int) -> bool:
            return bool(pyfuse3.readdir_reply(token, name, _entry(attributes), next_offset))

        await self.vfs.readdir(fh, start_id, reply)

    @_answer
    async def releasedir(self, fh: int) -> None:
        self.vfs.releasedir(fh)

    @_answer
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        opened = await self.vfs.open(inode, flags)
        return pyfuse3.FileInfo(fh=opened.handle, keep_cache=opened.keep_cache)

    @_answer
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self.vfs.read(fh, off, size)  # type: ignore[return-value]  # any buffer is fine

    @_answer
    async def release(self, fh: int) -> None:
        await self.vfs.release(fh)

    @_answer
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        usage = self.vfs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = usage.blocks
        data.f_bfree = data.f_bavail = usage.free_blocks
        data.f_namemax = NAME_BYTES_MAX
        return data

    @_answer
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        raise pyfuse3.FUSEError(errno.EINVAL)

    @_answer
    async def _refuse(self, *args: Any) -> Any:
        raise ReadOnly("the mount is read-only")

    # The kernel refuses most of these by itself (MS_RDONLY).
    setattr: Any = _refuse
    mknod: Any = _refuse
    mkdir: Any = _refuse
    unlink: Any = _refuse
    rmdir: Any = _refuse
    symlink: Any = _refuse
    rename: Any = _refuse
    link: Any = _refuse
    write: Any = _refuse
    create: Any = _refuse
    setxattr: Any = _refuse
    removexattr: Any = _refuse


def _entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = attributes.inode
    if attributes.is_directory:
        entry.st_mode = stat.S_IFDIR | (0o500 if attributes.private else 0o555)
        entry.st_nlink = 2
    else:
        entry.st_mode = stat.S_IFREG | 0o444
        entry.st_nlink = 1
    entry.st_size = attributes.size
    entry.st_blocks = -(-attributes.size // 512)
    entry.st_blksize = READ_BLOCK_BYTES
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.modified_ns
    entry.entry_timeout = entry.attr_timeout = TIMEOUT_S if attributes.lasting else 0
    return entry


async def serve(
    vfs: Vfs,
    session: Session,
    *,
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the session until it is unmounted, or until `stop`: then no more requests are taken, handlers get
    HAND_OVER_GRACE_S, and what is not answered comes again at the next server (RESEND).

    The volumes must be in the tree and `vfs.run` must run. Started when requests are answered; who opens a sealed
    file waits until its mode is known. Raises RuntimeError, OSError when libfuse or the device refuse. Once per
    process.
    """
    vfs.adopt(extension_built=SHIM_BUILT)
    # Without the shim a read that finds no request must wait in the kernel: pyfuse3 would end at EAGAIN.
    os.set_blocking(session.fuse_fd, not SHIM_BUILT)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device = os.dup(theirs.fileno())  # libfuse's descriptor for the life of the session
    theirs.close()
    running = trio.Event()
    operations = Operations(vfs, functools.partial(_take_device, session, device, running))
    try:
        pyfuse3.init(operations, f"/dev/fd/{device}", {"fsname=cachefs"})
        ours.send(session.init)
    except BaseException:
        ours.close()
        os.close(device)
        raise
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report, vfs, session, running, task_status)
            if stop is not None:
                nursery.start_soon(_stop_when_wanted, stop, nursery.cancel_scope)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
        ours.close()


def _take_device(session: Session, device: int, running: trio.Event) -> None:
    """Called while libfuse handles INIT: from here on it reads the real device, which no longer waits for an answer."""
    os.dup2(session.fuse_fd, device, inheritable=False)
    if session.restarted and "resend" not in session.config.server.kernel_disable:
        try:
            os.write(device, resend_message())  # before any read: later it would duplicate
        except OSError as exc:
            logger.warning("requests that the last server had taken are lost: %s", exc.strerror)
    running.set()


async def _report(vfs: Vfs, session: Session, running: trio.Event, task_status: trio.TaskStatus[None]) -> None:
    try:
        await running.wait()
        if session.restarted or session.config.as_root:
            vfs.check_passthrough_later()  # it starts a process: 25 ms
        else:
            await vfs.check_passthrough()  # or fusermount3 would find the mount busy with it, right after the start
    finally:
        task_status.started()  # also when it was unmounted before that: an end, and no failure


async def _stop_when_wanted(stop: trio.Event, scope: trio.CancelScope) -> None:
    await stop.wait()
    pyfuse3.terminate()
    await trio.sleep(HAND_OVER_GRACE_S)
    scope.cancel()
