"""A Vfs over a real tree, cache and ledger and stores in memory; only the kernel and the keeper are stood in for."""

import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import trio

from cachefs.cache import ChunkCache
from cachefs.config import MountConfig, VolumeConfig
from cachefs.hints import Hints
from cachefs.kernel import wire
from cachefs.kernel.session import Backing, Session
from cachefs.ledger import Ledger
from cachefs.link import KeeperLink, PassthroughRefused
from cachefs.notifier import Notifier
from cachefs.offload import Offload
from cachefs.snapshot import Snapshots
from cachefs.store import Store
from cachefs.tree import Tree
from cachefs.vfs import Attributes, Vfs
from tests.support.caches import config_for, opened_cache
from tests.support.memory_store import MemoryStore

LEDGER_BYTES = 64 * 1024


def kernel_init(flags: int = sum(wire.INIT_FLAGS.values()) | wire.HAS_RESEND) -> bytes:
    """An INIT request of a kernel that offers `flags`."""
    body = struct.pack("=IIIII44x", 7, 45, 131072, flags & 0xFFFFFFFF, flags >> 32)
    return wire.IN_HEADER.pack(wire.IN_HEADER.size + len(body), wire.OPCODE_INIT, 1, 0, 0, 0, 0, 0, 0) + body


class FakeKeeper:
    """Registers backing files as the keeper does, and lives as long as the mount."""

    def __init__(self) -> None:
        self.ids: dict[int, Backing] = {}
        self.next_id = 1
        self.closed: list[int] = []
        self.refuse = ""


class FakeLink:
    """KeeperLink's methods over a FakeKeeper."""

    def __init__(self, keeper: FakeKeeper, session: Session) -> None:
        self.session = session
        self._keeper = keeper

    def backings(self) -> tuple[Backing, ...]:
        return tuple(self._keeper.ids.values())

    async def register(self, node: int, fd: int, object_key: str) -> int:
        await trio.lowlevel.checkpoint()
        if self._keeper.refuse:
            raise PassthroughRefused(self._keeper.refuse)
        assert not any(backing.node == node for backing in self._keeper.ids.values()), "a second id for one inode"
        number = self._keeper.next_id
        self._keeper.next_id += 1
        stat = os.fstat(fd)
        self._keeper.ids[number] = Backing(node, number, stat.st_dev, stat.st_ino, object_key)
        return number

    async def close_backing(self, backing_id: int) -> None:
        await trio.lowlevel.checkpoint()
        del self._keeper.ids[backing_id]
        self._keeper.closed.append(backing_id)


class FakeNotifier:
    """Notes what the kernel would have been told."""

    def __init__(self) -> None:
        self.forgotten: list[tuple[int, bytes]] = []
        self.known_to_kernel: set[int] | None = None
        """None: all inodes."""

    def forget_entry(self, parent: int, name: bytes) -> None:
        self.forgotten.append((parent, name))

    async def is_known(self, node: int) -> bool:
        await trio.lowlevel.checkpoint()
        return self.known_to_kernel is None or node in self.known_to_kernel


class Stage:
    """One server's life. `keeper` and `ledger_fd` outlive it."""

    def __init__(
        self, vfs: Vfs, tree: Tree, cache: ChunkCache, keeper: FakeKeeper, notifier: FakeNotifier, hints: Hints
    ) -> None:
        self.vfs = vfs
        self.hints = hints
        self.tree = tree
        self.cache = cache
        self.keeper = keeper
        self.notifier = notifier

    async def walk(self, path: str, start: int = 1) -> Attributes:
        """Lookups from the root; "" is the root."""
        found = self.vfs.getattr(start)
        for part in path.split("/") if path else []:
            found = await self.vfs.lookup(found.inode, part.encode())
        return found

    async def open(self, path: str) -> tuple[int, int]:
        """(inode, handle)."""
        inode = (await self.walk(path)).inode
        return inode, (await self.vfs.open(inode, os.O_RDONLY)).handle

    async def read_all(self, handle: int, size: int, piece: int = 1024 * 1024) -> bytes:
        """In pieces, as the kernel asks."""
        parts = []
        for offset in range(0, size, piece):
            parts.append(bytes(await self.vfs.read(handle, offset, piece)))
        return b"".join(parts)

    async def names(self, inode: int, handle: int | None = None, start: int = 0, most: int = 10**6) -> list[str]:
        handle = self.vfs.opendir(inode) if handle is None else handle
        found: list[str] = []

        def reply(name: bytes, attributes: Attributes, offset: int) -> bool:
            if len(found) >= most:
                return False
            found.append(name.decode())
            return True

        await self.vfs.readdir(handle, start, reply)
        return found

    async def sealed(self, path: str) -> None:
        """Until the object is sealed."""
        node = self.tree.node((await self.walk(path)).inode)
        assert node.object_id is not None
        with trio.fail_after(30):
            while not self.cache.is_sealed(node.object_id):
                await trio.sleep(0.005)


class Mount:
    """What outlives servers: the keeper and the ledger."""

    def __init__(self, state: Path, *, flags: int | None = None, at_root: bool = False, checked: bool = True) -> None:
        self.state = state
        self.at_root = at_root
        self.keeper = FakeKeeper()
        self.ledger_fd = os.memfd_create("ledger")
        os.ftruncate(self.ledger_fd, LEDGER_BYTES)
        if checked:  # as if an earlier server had seen passthrough work
            Ledger(self.ledger_fd).note_passthrough_checked()
        self.init = kernel_init() if flags is None else kernel_init(flags)
        self.generation = 0

    @contextlib.asynccontextmanager
    async def server(
        self, *stores: MemoryStore, drain: bool = True, kernel_disable: tuple[str, ...] = (), **options: Any
    ) -> AsyncIterator[Stage]:
        """One server over volumes v0, v1, ... (one: at the FUSE root). `drain=False` is a SIGKILL."""
        async with opened_cache(self.state, drain=drain, **options) as cache, trio.open_nursery() as nursery:
            offload = Offload()
            snapshots = Snapshots(cache._index, offload, session="one")
            tree = Tree(cache._index, offload, snapshots, volumes_at_root=self.at_root)
            server = config_for(self.state, kernel_disable=kernel_disable)
            config = MountConfig(
                server=server, volumes=(), mountpoint=self.state / "mnt", as_root=self.at_root, session="one"
            )
            session = Session(-1, self.init, self.generation > 0, self.generation, (), config, 1)
            self.generation += 1
            notifier = FakeNotifier()
            ledger = Ledger(self.ledger_fd)
            hints = Hints(cache, tree, offload)
            vfs = Vfs(
                tree=tree,
                cache=cache,
                notifier=cast(Notifier, notifier),
                link=cast(KeeperLink, FakeLink(self.keeper, session)),
                ledger=ledger,
                metrics=cache._metrics,
                hints=hints,
            )
            await nursery.start(snapshots.run)
            await nursery.start(tree.run)
            await nursery.start(vfs.run)
            for number, store in enumerate(stores):
                name = f"v{number}"
                await tree.add_volume(VolumeConfig(name=name, source=store.url, uid=11, gid=12), cast(Store, store))
            vfs.adopt(extension_built=True)
            yield Stage(vfs, tree, cache, self.keeper, notifier, hints)
            vfs.check_invariants()
            hints.check_invariants()
            nursery.cancel_scope.cancel()
