"""What keeper and server say to each other: one JSON message per SEQPACKET packet, with descriptors beside it.

A session is too large for a packet once there are many backing files (a packet is bounded by the socket's send
buffer, 208 KiB by default), so it travels in a memfd.
"""

import array
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from cachefs.config import MountConfig, VolumeConfig

MESSAGE_BYTES_MAX = 65536
DESCRIPTORS_MAX = 8
SESSION_BYTES_MAX = 256 * 1024 * 1024
"""A million backing files are about 150 MB; more than this is not a session."""

Kind = Literal[
    "session",  # keeper -> server at its start, server -> keeper at a takeover
    "hello",  # node mode, server -> keeper: give me the session (text "serving": I serve one); offers what it holds
    "ready",  # server: I serve
    "failed",  # server: I cannot serve (text, exit_code)
    "register",  # server: a backing file (request, node, object_key) with its descriptor
    "registered",  # keeper: (request, node, backing_id, device, inode)
    "refused",  # keeper: (request, text)
    "close",  # server: this backing id is not needed any more (request, backing_id)
    "closed",  # keeper: (request)
    "volumes",  # server: the volumes that a restarted server shall have, in a memfd
    "unmount",  # server: unmount and end us both
    "upgrade",  # server: hand over to this interpreter (request, text)
    "upgrading",  # keeper: (request); a stop follows
    "adopted",  # keeper, after a takeover: I supervise you now
    "stop",  # keeper: end; text says "unmount" or "hand_over"
]


class Backing(msgspec.Struct, frozen=True):
    """One blob that the kernel reads by itself: its device and inode, and the ObjectId.key (hex) that it holds."""

    node: int
    backing_id: int
    device: int
    inode: int
    object_key: str


class Session(msgspec.Struct):
    """All that a server needs to serve a mount, and a new keeper to hold it. Descriptors are -1 on the wire."""

    fuse_fd: int
    init: bytes
    """The kernel's INIT request as it was read from the device."""
    restarted: bool
    """A server of this mount may have died with requests in hand: send RESEND unless it is masked."""
    generation: int
    """0 for the first server of a mount."""
    backings: tuple[Backing, ...]
    config: MountConfig
    keeper_pid: int
    ledger_fd: int = -1
    """An unlinked memory file that every server of this mount maps."""
    device: str = ""
    """MAJOR:MINOR of the mount, as in mountinfo."""
    server_pid: int = 0
    server_ready: bool = False
    server_module: str = "cachefs.daemon"
    python: str = ""
    """The interpreter that servers of this mount are started with."""
    foreground: bool = False
    root_path: str = ""
    """Where this server process finds the FUSE root; "": at config.mountpoint. Not the keeper's to say."""
    never_served: bool = False
    """No server of this mount was ready yet: a command waits for it, or for the line that says what is wrong."""
    upgrade_result: str = ""
    """What came of the last upgrade: "" (there was none), "ok", or why it was rolled back."""


class Message(msgspec.Struct, omit_defaults=True):
    """One packet; which fields count is said at `Kind`."""

    kind: Kind
    request: int = 0
    node: int = 0
    backing_id: int = 0
    device: int = 0
    inode: int = 0
    object_key: str = ""
    text: str = ""
    exit_code: int = 1


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected SEQPACKET sockets, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_message(sock: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one packet. BlockingIOError: the buffer is full; BrokenPipeError, ConnectionError: the peer is gone."""
    data = msgspec.json.encode(message)
    assert len(data) <= MESSAGE_BYTES_MAX
    socket.send_fds(sock, [data], list(descriptors))


def receive_message(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """One packet and its descriptors (close-on-exec, the caller closes them), or None when the peer is gone.

    Raises BlockingIOError when there is none yet, msgspec.DecodeError for one that makes no sense.
    """
    try:
        try:
            data, descriptors, flags = receive_descriptors(sock, MESSAGE_BYTES_MAX)
        except ConnectionResetError:
            # The peer was killed with a packet unread. That is said first, once; what it had sent comes after it.
            data, descriptors, flags = receive_descriptors(sock, MESSAGE_BYTES_MAX)
    except ConnectionError:
        return None
    if not data:
        close_all(descriptors)
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise msgspec.DecodeError("a message that is too long or has too many descriptors")
        return msgspec.json.decode(data, type=Message), descriptors
    except msgspec.DecodeError:
        close_all(descriptors)
        raise


def receive_descriptors(sock: socket.socket, bytes_max: int) -> tuple[bytes, list[int], int]:
    """One packet, its descriptors (close-on-exec) and recvmsg's flags.

    Not socket.recv_fds: it drops the flags that it is given (CPython 3.11), and every child would inherit them.
    """
    numbers = array.array("i")
    space = socket.CMSG_LEN(DESCRIPTORS_MAX * numbers.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(bytes_max, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return data, list(numbers), flags


def close_all(descriptors: Sequence[int]) -> None:
    """Close each descriptor."""
    for descriptor in descriptors:
        os.close(descriptor)


def pack_session(session: Session) -> int:
    """The session in a new memfd (the caller closes it)."""
    wire = msgspec.structs.replace(session, fuse_fd=-1, ledger_fd=-1)
    return _memory_file("cachefs-session", msgspec.json.encode(wire, enc_hook=str))


def unpack_session(descriptor: int, *, fuse_fd: int, ledger_fd: int) -> Session:
    """The inverse of pack_session(); the descriptor stays open."""
    session = msgspec.json.decode(read_memory_file(descriptor), type=Session, dec_hook=_decode_path)
    session.fuse_fd = fuse_fd
    session.ledger_fd = ledger_fd
    return session


def pack_volumes(volumes: Sequence[VolumeConfig]) -> int:
    """Volumes in a new memfd (the caller closes it)."""
    return _memory_file("cachefs-volumes", msgspec.json.encode(tuple(volumes)))


def unpack_volumes(descriptor: int) -> tuple[VolumeConfig, ...]:
    """The inverse of pack_volumes(). Raises msgspec.DecodeError, ValueError for what is none."""
    return msgspec.json.decode(read_memory_file(descriptor), type=tuple[VolumeConfig, ...])


def read_memory_file(descriptor: int) -> bytes:
    """All bytes of a memfd from another process, which may hold more than is wanted or shrink meanwhile."""
    size = os.fstat(descriptor).st_size
    if size > SESSION_BYTES_MAX:
        raise ValueError(f"a session of {size} bytes")
    parts: list[bytes] = []
    offset = 0
    while offset < size:
        part = os.pread(descriptor, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _memory_file(name: str, data: bytes) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _decode_path(kind: type, value: object) -> object:
    if kind is not Path:
        raise NotImplementedError
    return Path(str(value))
