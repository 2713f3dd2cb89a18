"""The server: `python -m cachefs.daemon FD`, started by the keeper, or `--node FD`, started by the supervisor of node
mode. Builds everything, owns nursery and signals.

It always resumes: the keeper hands it a session, and the first start differs only in that the volumes are probed.
It ends in this order: FUSE, prefetch, fills in flight, index.
"""

import gc

gc.disable()  # 600 modules are loaded below, and none of them is garbage: 20 ms of 150

import faulthandler
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping

import trio

from cachefs import control, fuse, logs
from cachefs.ahead import Ahead
from cachefs.config import read_credentials
from cachefs.control import Method
from cachefs.core import Core, first_error, open_core
from cachefs.errors import CachefsError, UsageError, WorkFailed, is_disk_failure
from cachefs.hints import Hints
from cachefs.ledger import Ledger
from cachefs.link import KeeperLink
from cachefs.metrics import Metrics, serve_metrics
from cachefs.notifier import Notifier
from cachefs.recovery import open_index
from cachefs.server import Server
from cachefs.state import remember_size, state_lock
from cachefs.tree import Tree
from cachefs.vfs import Vfs

gc.enable()

LOCK_WAIT_S = 10.0
"""A server that was killed may take so long to let go of the state directory (its threads finish a write)."""

HAND_OVER_DRAIN_S = 0.2
"""Readers wait during a hand-over: fills that a slow store would hold up are given up, the next server starts them."""

NODE_LOCK_WAIT_S = 60.0
"""The server that this one replaces drains until then."""

NOT_ON_NODES = ("volume_add", "volume_remove", "upgrade", "stop")
"""Requests of a local mount: on a node volumes are published, and the mount is the keeper's."""

METRICS_AGAIN_S = 2.0
CONTROL_AGAIN_S = 2.0

log = logging.getLogger("cachefs.daemon")  # __name__ is "__main__" here


def main(arguments: list[str]) -> int:
    """Exit code 0: unmounted or handed over; 2: the first start failed and was reported; 1: restart me."""
    gc.freeze()  # what is loaded stays: no later collection looks at it
    read_credentials(os.environ)
    try:
        link = _begin_on_node(int(arguments[1])) if arguments[0] == "--node" else KeeperLink.receive(int(arguments[0]))
    except WorkFailed as exc:  # the keeper ended before it had mounted, and says why itself
        print(f"server {os.getpid()}: {exc}", file=sys.stderr)
        return 1
    server = link.session.config.server
    logs.set_up(server.state_dir, server.log_level, server.log_format)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)  # where a server that hangs hangs
    log.info("server %d of this mount starts (keeper %d)", link.session.generation, link.session.keeper_pid)
    try:
        resumes = not link.session.never_served
        with state_lock(server.state_dir, wait_s=_lock_wait_s(link), resumes=resumes) as trouble:
            if not trouble:
                remember_size(server.state_dir, server.cache_bytes_max)
            trio.run(functools.partial(_run, link, trouble), restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseException as exc:
        error = first_error(exc)
        if isinstance(error, CachefsError):
            log.error("%s", error)
        else:
            log.error("the server failed", exc_info=exc)
            what = str(error) if isinstance(error, OSError) else type(error).__name__
            error = WorkFailed(f"the server failed ({what}): see {server.state_dir}/log/server.log")
        link.failed(error)  # a keeper says it where our log cannot be written
        return error.exit_code if link.session.never_served else 1
    log.info("server %d ends", link.session.generation)
    return 0


def _begin_on_node(descriptor: int) -> KeeperLink:
    from cachefs.node_link import NodeLink  # with publications.py 5 ms, which a local mount has no use for

    return NodeLink.begin(descriptor)


def _lock_wait_s(link: KeeperLink) -> float:
    if link.on_node:
        return NODE_LOCK_WAIT_S
    return LOCK_WAIT_S if link.session.generation else 0.0


async def _run(link: KeeperLink, trouble: str) -> None:
    """`trouble`: why the state directory cannot be written, or ""."""
    session = link.session
    config = session.config
    ledger = Ledger(session.ledger_fd)
    metrics = Metrics(ledger.counters)
    index = open_index(config.server, session=config.session, resumes=not session.never_served, trouble=trouble)
    async with open_core(config.server, metrics, session=config.session, index=index) as core:
        tree = Tree(core.index, core.offload, core.snapshots, volumes_at_root=config.as_root, mark=ledger)
        notifier = Notifier(session.fuse_fd)
        vfs = Vfs(
            tree=tree,
            cache=core.cache,
            notifier=notifier,
            link=link,
            ledger=ledger,
            metrics=metrics,
            hints=Hints(core.cache, tree, core.offload),
            private_root=link.on_node,  # pods get binds; whose volume is whose is between them
        )
        ahead = Ahead(core, vfs.prefetcher)
        tree.on_listed = ahead.listed
        server = Server(core=core, tree=tree, link=link, ledger=ledger, vfs=vfs, metrics=metrics, ahead=ahead)
        await _serve(link, core, tree, notifier, vfs, server, ledger, ahead)
    # The index is closed: whoever waits for the lock finds all in order.


async def _serve(
    link: KeeperLink,
    core: Core,
    tree: Tree,
    notifier: Notifier,
    vfs: Vfs,
    server: Server,
    ledger: Ledger,
    ahead: Ahead,
) -> None:
    config = link.session.config
    stop = trio.Event()

    def told_to_stop() -> None:
        if link.stop_kind == "hand_over":
            core.drain_s = HAND_OVER_DRAIN_S
        stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_signals, functools.partial(_end, link, stop))
        nursery.start_soon(link.run, told_to_stop)
        await nursery.start(tree.run)
        nursery.start_soon(notifier.run)
        await server.add_first_volumes()
        methods = dict(server.methods())
        if link.on_node:
            from cachefs.node_link import NodeLink
            from cachefs.publications import Publications

            assert isinstance(link, NodeLink)
            publications = Publications(core=core, tree=tree, link=link, ledger=ledger, ahead=ahead)
            await nursery.start(publications.run)
            methods = {name: method for name, method in methods.items() if name not in NOT_ON_NODES}
            methods |= publications.methods()
        await nursery.start(vfs.run)
        if config.server.metrics is not None:
            if link.session.never_served:
                await nursery.start(_serve_metrics, server, config.server.metrics)
            else:
                nursery.start_soon(_serve_metrics_again, server, config.server.metrics)
        ended = trio.Event()
        await nursery.start(_serve_fuse, vfs, link, stop, ended)
        await nursery.start(_serve_control, link, methods)
        if not link.on_node:
            nursery.start_soon(server.watch_binds)
        link.ready()
        nursery.start_soon(core.cache.prepare)
        nursery.start_soon(ahead.run)
        log.info("serving %d volumes", len(core.volumes))
        await ended.wait()
        nursery.cancel_scope.cancel()


async def _serve_metrics(
    server: Server, address: str, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    host, _, port = address.rpartition(":")
    await serve_metrics(server.exposition, host.strip("[]"), int(port), task_status=task_status)


async def _serve_metrics_again(server: Server, address: str) -> None:
    """After a restart: that somebody else took the port meanwhile must not keep a mount from coming back."""
    told = False
    while True:
        try:
            await _serve_metrics(server, address)
        except UsageError as exc:
            if not told:
                log.warning("no metrics for now: %s", exc)
            told = True
        await trio.sleep(METRICS_AGAIN_S)


async def _serve_control(
    link: KeeperLink, methods: Mapping[str, Method], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """That the runtime directory lies on a disk that has become read-only must not keep a mount from coming back."""
    told = False
    async with trio.open_nursery() as nursery:
        while True:
            try:
                await nursery.start(control.serve, link.session.config.server.runtime_dir, methods)
                break
            except OSError as exc:
                if link.session.never_served or not is_disk_failure(exc.errno):
                    raise
                if not told:
                    log.warning("no command is answered for now: %s", exc)
                    task_status.started()
                told = True
            await trio.sleep(CONTROL_AGAIN_S)
        if not told:
            task_status.started()


async def _serve_fuse(
    vfs: Vfs,
    link: KeeperLink,
    stop: trio.Event,
    ended: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """FUSE ends when it is told to, or by itself when the kernel has unmounted: then everything does."""
    await fuse.serve(vfs, link.session, stop=stop, task_status=task_status)
    ended.set()


def _end(link: KeeperLink, stop: trio.Event) -> None:
    if link.on_node:
        link.stop_kind = "hand_over"
        stop.set()
    else:
        link.request_unmount()


async def _signals(end: Callable[[], None]) -> None:
    """SIGTERM and SIGINT: the keeper unmounts and ends us both; on a node only this server ends."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as numbers:
        async for number in numbers:
            log.info("%s: ending", signal.Signals(number).name)
            end()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    # Not sys.exit(): a thread that hangs in a dead store's request must not hold up the end.
    os._exit(code)
