"""A small FUSE server that a real keeper starts instead of cachefs.daemon: the files of one directory, read-only.

    python -m tests.mount.tiny_server FD

The directory is the source of the one volume (file:///...). Files in STATE/ switch its behaviour: `slow` and `hang`
delay READs, `hang_lookup` LOOKUPs, `passthrough` opens in passthrough mode, `fail` fails the start, `die_at_start`
ends it, `die_at_read` ends it at each READ, `never_ready` keeps it from saying that it serves. It writes what it
knows to STATE/server.json when it is ready, and takes commands in STATE/command (a JSON list), answered in
STATE/answer.
"""

import errno
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import msgspec
import trio

sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
import cachefs._fuseshim  # noqa: E402, F401

sys.setdlopenflags(os.RTLD_NOW)
import pyfuse3  # noqa: E402

from cachefs.errors import UsageError  # noqa: E402
from cachefs.kernel import wire  # noqa: E402
from cachefs.kernel.session import packet_pair  # noqa: E402
from cachefs.link import KeeperLink, PassthroughRefused  # noqa: E402
from cachefs.notifier import Notifier  # noqa: E402

FUSE_DEVICE = os.makedev(10, 229)


class TinyFS(pyfuse3.Operations):
    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, link: KeeperLink, directory: Path, placeholder: int) -> None:
        super().__init__()
        self.link = link
        self.directory = directory
        self.placeholder = placeholder
        self.state = link.session.config.server.state_dir
        names = sorted(os.listdir(directory))
        self.inodes = {name.encode(): number + 2 for number, name in enumerate(names)}
        self.fds = {self.inodes[name.encode()]: os.open(directory / name, os.O_RDONLY) for name in names}
        self.by_node = {backing.node: backing.backing_id for backing in link.backings()}
        self.reads = 0
        self.lookups = 0

    def on(self, switch: str) -> bool:
        return (self.state / switch).exists()

    def init(self) -> None:
        session = self.link.session
        os.dup2(session.fuse_fd, self.placeholder, inheritable=False)
        if session.restarted and "resend" in wire.features(session.init, session.config.server.kernel_disable):
            os.write(session.fuse_fd, wire.resend_message())

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o555, 2
        else:
            entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o444, 1
            entry.st_size = os.fstat(self.fds[inode]).st_size
        return entry

    async def getattr(self, inode, ctx=None):
        return self.attributes(inode)

    async def lookup(self, parent, name, ctx=None):
        self.lookups += 1
        while self.on("hang_lookup"):
            await trio.sleep(0.02)
        if name not in self.inodes:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(self.inodes[name])

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start, token):
        for number, name in enumerate(sorted(self.inodes)):
            if number >= start and not pyfuse3.readdir_reply(
                token, name, self.attributes(self.inodes[name]), number + 1
            ):
                return

    async def open(self, inode, flags, ctx):
        if self.on("passthrough"):
            backing_id = self.by_node.get(inode)
            if backing_id is None:
                try:
                    backing_id = self.by_node[inode] = await self.link.register(inode, self.fds[inode], f"{inode:x}")
                except PassthroughRefused as exc:
                    print(exc, file=sys.stderr, flush=True)
                    raise pyfuse3.FUSEError(errno.EACCES) from exc
            return pyfuse3.FileInfo(fh=1 << 63 | backing_id << 32 | inode, keep_cache=False)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def release(self, fh):
        return None

    async def read(self, fh, offset, size):
        self.reads += 1
        if self.on("die_at_read"):
            os._exit(9)
        if self.on("slow"):
            await trio.sleep(0.02)
        while self.on("hang"):
            await trio.sleep(0.02)
        return os.pread(self.fds[fh & 0xFFFFFFFF], size, offset)


def hostile_descriptor(kind: str, state: Path) -> int:
    """What a server might send that it must not get read for it."""
    own = state / "own"
    if kind == "same":
        return os.open(own, os.O_RDONLY)
    own.unlink(missing_ok=True)
    own.write_bytes(b"mine")
    if kind == "path":
        return os.open("/etc/shadow", os.O_PATH)
    if kind == "outside":
        return os.open("/etc/passwd", os.O_RDONLY)
    if kind == "writable":
        return os.open(own, os.O_RDWR)
    if kind == "directory":
        return os.open(state, os.O_RDONLY)
    if kind == "other_owner":
        os.chown(own, 1234, 1234)
        return os.open(own, os.O_RDONLY)
    if kind == "deleted":
        descriptor = os.open(own, os.O_RDONLY)
        own.unlink()
        return descriptor
    if kind == "socket":
        return packet_pair()[0].detach()
    if kind == "memory":
        return os.memfd_create("memory")
    assert kind == "good"
    return os.open(own, os.O_RDONLY)


async def obey(link: KeeperLink, notifier: Notifier, fs: TinyFS, command: list) -> object:
    state = link.session.config.server.state_dir
    match command:
        case ["hostile", kind]:
            try:
                return await link.register(77, hostile_descriptor(kind, state), "00")
            except PassthroughRefused as exc:
                return str(exc)
        case ["close_backing", number]:
            await link.close_backing(number)
        case ["upgrade", python]:
            try:
                await link.request_upgrade(python)
            except UsageError as exc:
                return str(exc)
        case ["set_volume_region", region]:
            volume = msgspec.structs.replace(link.session.config.volumes[0], region=region)
            link.set_volumes([volume])
        case ["unmount"]:
            link.request_unmount()
        case ["forget_entry", parent, name]:
            notifier.forget_entry(parent, name.encode())
        case ["is_known", node]:
            return await notifier.is_known(node)
        case ["nonsense"]:
            sock = link._sock
            assert sock is not None
            for data in (b"{", b"[]", b'{"kind": "rule"}', b'{"kind": "stop"}', b'{"kind": "volumes"}', b"\xff" * 9000):
                socket.send_fds(sock, [data], [0] * 5)
            socket.send_fds(sock, [b'{"kind": "volumes"}'], [os.memfd_create("x")])
            socket.send_fds(sock, [b'{"kind": "register", "node": -1}'], [0])
            socket.send_fds(sock, [b'{"kind": "close", "backing_id": 12345}'], [0] * 20)
        case ["lookups"]:
            return fs.lookups
        case ["reads"]:
            return fs.reads
        case ["ping"]:
            return "pong"
        case _:
            raise AssertionError(command)
    return "done"


async def take_commands(link: KeeperLink, notifier: Notifier, fs: TinyFS) -> None:
    state = link.session.config.server.state_dir
    while True:
        await trio.sleep(0.01)
        try:
            command = json.loads((state / "command").read_text())
        except FileNotFoundError:
            continue
        (state / "command").unlink()
        write(state / "answer", {"answer": await obey(link, notifier, fs, command)})


def write(path: Path, value: object) -> None:
    """Whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


async def serve(link: KeeperLink, fs: TinyFS, placeholder: int) -> None:
    state = link.session.config.server.state_dir

    def stop() -> None:
        nursery.cancel_scope.cancel()

    async def announce() -> None:
        while os.fstat(placeholder).st_rdev != FUSE_DEVICE:
            await trio.sleep(0.001)
        session = link.session
        while fs.on("never_ready"):
            await trio.sleep(0.02)
        link.ready()
        facts = {
            "pid": os.getpid(),
            "generation": session.generation,
            "restarted": session.restarted,
            "keeper_pid": session.keeper_pid,
            "backings": [backing.backing_id for backing in link.backings()],
            "ledger_starts": count_start(session.ledger_fd),
            "upgrade_result": session.upgrade_result,
            "version": os.environ.get("TINY_VERSION", ""),
            "features": sorted(wire.features(session.init, session.config.server.kernel_disable)),
            "region": session.config.volumes[0].region,
        }
        while True:
            write(state / "live.json", {"keeper_pid": session.keeper_pid, "reads": fs.reads, "lookups": fs.lookups})
            if facts:
                write(state / "server.json", facts)
                facts = {}
            await trio.sleep(0.02)

    async def listen_to_signals() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                link.request_unmount()

    notifier = Notifier(link.session.fuse_fd)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run, stop)
        nursery.start_soon(notifier.run)
        nursery.start_soon(announce)
        nursery.start_soon(take_commands, link, notifier, fs)
        nursery.start_soon(listen_to_signals)
        await pyfuse3.main(max_tasks=1200)
        nursery.cancel_scope.cancel()


def count_start(ledger_fd: int) -> int:
    starts = int.from_bytes(os.pread(ledger_fd, 8, 0), "little") + 1
    os.pwrite(ledger_fd, starts.to_bytes(8, "little"), 0)
    return starts


def main() -> None:
    link = KeeperLink.receive(int(sys.argv[1]))
    config = link.session.config
    state = config.server.state_dir
    if (state / "fail").exists():
        link.failed(UsageError("the bucket does not exist"))
        sys.exit(2)
    if (state / "die_at_start").exists():
        sys.exit(7)
    ours, theirs = packet_pair()
    placeholder = os.dup(ours.fileno())
    ours.close()
    fs = TinyFS(link, Path(config.volumes[0].source.removeprefix("file://")), placeholder)
    pyfuse3.init(fs, f"/dev/fd/{placeholder}", {"fsname=cachefs"})
    theirs.send(link.session.init)
    trio.run(serve, link, fs, placeholder)
    os._exit(0)


if __name__ == "__main__":
    main()
