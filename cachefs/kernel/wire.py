"""Facts of the FUSE protocol (include/uapi/linux/fuse.h): INIT, notifications, backing files. No pyfuse3 here."""

import fcntl
import os
import select
import struct
from collections.abc import Collection

import msgspec

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
assert IN_HEADER.size == 40
assert INIT_OUT.size == 64

OPCODE_INIT = 26
MINOR_MIN = 31
"""7.31 is Linux 5.4; older kernels were never tried."""
MINOR_MAX = 45
READ_BYTES_MAX = 1 << 21
MAX_BACKGROUND = 1024
"""At 64, 64 blocked cold READs held up a ready read of another file; at 1024 with 120 blocked: no delay."""
CONGESTION_THRESHOLD = 400
MAX_WRITE = 4096
"""The tree is read-only; more than libfuse's buffer would end the server with EINVAL. READs are 1 MiB all the same."""
MAX_PAGES = 256

# Bits of flags | flags2 << 32 that we ask for when the kernel offers them, under the names of `kernel_disable`.
# READDIRPLUS_AUTO (14) is never asked for (listdir would get ENOSYS), nor WRITEBACK_CACHE (16, excludes passthrough).
INIT_FLAGS = {
    "async_read": 1 << 0,
    "atomic_o_trunc": 1 << 3,
    "big_writes": 1 << 5,
    "readdirplus": 1 << 13,
    "async_dio": 1 << 15,
    "parallel_dirops": 1 << 18,
    "max_pages": 1 << 22,
    "cache_symlinks": 1 << 23,
    "init_ext": 1 << 30,
    "passthrough": 1 << 37,
}
HAS_RESEND = 1 << 39
"""Offered by kernels that know FUSE_NOTIFY_RESEND (6.9); nothing to ask for."""
INIT_EXT = 1 << 30

NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7

IOC_CLONE = 0x8004E500
IOC_BACKING_OPEN = 0x4010E501
IOC_BACKING_CLOSE = 0x4004E502


class InitRequest(msgspec.Struct, frozen=True):
    """The kernel's INIT. `flags` has flags2 in its upper half."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int


def parse_init(data: bytes) -> InitRequest:
    """Raises ValueError for what is no INIT of protocol 7."""
    if len(data) < IN_HEADER.size + INIT_IN.size:
        raise ValueError(f"the first request has only {len(data)} bytes")
    length, opcode, unique = struct.unpack_from("=IIQ", data)
    if opcode != OPCODE_INIT or length != len(data):
        raise ValueError(f"the first request is no INIT: opcode {opcode}, {length} bytes")
    major, minor, max_readahead, flags = INIT_IN.unpack_from(data, IN_HEADER.size)
    if major != 7:
        raise ValueError(f"FUSE protocol {major}.{minor}")
    if flags & INIT_EXT:
        (upper,) = struct.unpack_from("=I", data, IN_HEADER.size + INIT_IN.size)
        flags |= upper << 32
    return InitRequest(unique, major, minor, max_readahead, flags)


def wanted_flags(init: InitRequest, disabled: Collection[str]) -> int:
    """The INIT flags to answer with: offered by the kernel, known to us, not masked."""
    wanted = 0
    for name, bit in INIT_FLAGS.items():
        if name not in disabled:
            wanted |= init.flags & bit
    if not wanted & INIT_EXT:
        wanted &= 0xFFFFFFFF
    return wanted


def features(init: bytes, disabled: Collection[str]) -> frozenset[str]:
    """The names of what this mount uses of the kernel: keys of INIT_FLAGS, and "resend"."""
    request = parse_init(init)
    wanted = wanted_flags(request, disabled)
    names = {name for name, bit in INIT_FLAGS.items() if wanted & bit}
    if request.flags & HAS_RESEND and "resend" not in disabled:
        names.add("resend")
    return frozenset(names)


def init_answer(init: InitRequest, disabled: Collection[str]) -> bytes:
    """The answer to INIT: out_header and the 64 bytes of init_out."""
    wanted = wanted_flags(init, disabled)
    depth = 1 if wanted & INIT_FLAGS["passthrough"] else 0
    body = INIT_OUT.pack(
        7,
        min(init.minor, MINOR_MAX),
        init.max_readahead,
        wanted & 0xFFFFFFFF,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_WRITE,
        1,  # time_gran: nanoseconds
        MAX_PAGES,
        0,  # map_alignment
        wanted >> 32,
        depth,
        0,  # request_timeout: a READ may wait for the network for minutes
    )
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, init.unique) + body


def read_init(fuse_fd: int, timeout_s: float) -> bytes:
    """The kernel's INIT from a device that was just mounted. Raises TimeoutError."""
    poller = select.poll()
    poller.register(fuse_fd, select.POLLIN)
    if not poller.poll(timeout_s * 1000):
        raise TimeoutError("the kernel sent no INIT")
    return os.read(fuse_fd, READ_BYTES_MAX)


def is_connected(fuse_fd: int) -> bool:
    """False once the file system is unmounted or its connection aborted: the device says POLLERR."""
    poller = select.poll()
    poller.register(fuse_fd, 0)
    return not any(events & (select.POLLERR | select.POLLNVAL) for _, events in poller.poll(0))


def clone_device(fuse_fd: int) -> int:
    """A further descriptor of the same connection, with its own list of requests that were taken and not answered.

    When the last copy of the clone is closed, the kernel fails those requests (ECONNABORTED) and goes on: what a
    server's death should do where the kernel cannot send them again. Raises OSError.
    """
    clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(clone, IOC_CLONE, bytearray(struct.pack("=I", fuse_fd)))
    except OSError:
        os.close(clone)
        raise
    return clone


def resend_message() -> bytes:
    """Ask for all requests again that a dead server had taken. Once, before the first read of a new server."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


def forget_entry_message(parent: int, name: bytes) -> bytes:
    """fuse_notify_inval_entry_out (parent, namelen, flags) and the name with its NUL."""
    body = struct.pack("=QII", parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def forget_attributes_message(node: int) -> bytes:
    """fuse_notify_inval_inode_out (ino, off, len): off -1 leaves the pages."""
    body = struct.pack("=Qqq", node, -1, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_INODE, 0) + body


def open_backing(fuse_fd: int, blob_fd: int) -> int:
    """Register a file that the kernel may read for us. Needs CAP_SYS_ADMIN; raises OSError. Returns its id."""
    result: int = fcntl.ioctl(fuse_fd, IOC_BACKING_OPEN, bytearray(struct.pack("=iIQ", blob_fd, 0, 0)))
    return result


def close_backing(fuse_fd: int, backing_id: int) -> None:
    """Take a registration back; files that are open through it go on. Raises OSError."""
    fcntl.ioctl(fuse_fd, IOC_BACKING_CLOSE, bytearray(struct.pack("=I", backing_id)))
