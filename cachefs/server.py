"""What a running server answers to: volumes that come and go, status, and the core's work, over the control socket."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from cachefs import __version__
from cachefs.ahead import Ahead
from cachefs.binds import LOOK_S, Lifetimes, MountChanges, bound_at
from cachefs.config import ServerConfig, VolumeConfig
from cachefs.control import Caller, Method, Params, Progress
from cachefs.core import Core
from cachefs.errors import AccessDenied, CachefsError, NotFound, StoreUnavailable, UsageError
from cachefs.ledger import Ledger
from cachefs.link import KeeperLink
from cachefs.metrics import Metrics
from cachefs.snapshot import Volume
from cachefs.tree import Tree
from cachefs.vfs import Vfs
from cachefs.work import convert, work_methods

log = logging.getLogger(__name__)

PROBE_DEADLINE_S = 60.0
SECOND_LOOK_S = 0.05


class ServerStopping(CachefsError):
    """The last volume is gone and the server ends: ask again, a new one takes the request."""


class Server:
    """One per process, on the trio thread."""

    def __init__(
        self,
        *,
        core: Core,
        tree: Tree,
        link: KeeperLink,
        ledger: Ledger,
        vfs: Vfs,
        metrics: Metrics,
        ahead: Ahead,
    ) -> None:
        self._core = core
        self._tree = tree
        self._link = link
        self._ledger = ledger
        self._vfs = vfs
        self._metrics = metrics
        self._ahead = ahead
        self._config = link.session.config
        self._started_s = time.time()
        self._lifetimes = Lifetimes(trio.current_time, core.config.bind_timeout_s)
        self._stopping = False

    # -- volumes ------------------------------------------------------------------------------------------------

    async def add_first_volumes(self) -> None:
        """Those that the session has. Their stores are asked until a server was ready: later the mount is there."""
        for volume in self._config.volumes:
            await self._add(volume, probe=self._link.session.never_served)

    async def _add(self, config: VolumeConfig, *, probe: bool) -> None:
        store = self._core.open_store(config)
        if probe:
            known = self._core.snapshots.is_known(Volume(config, store), "")
            if not self._core.config.offline:
                await self._probe(config, known=known)
            elif not known:
                raise UsageError(f"{config.source} was never mounted with this state: mount it without --offline first")
        volume = await self._tree.add_volume(config, store)
        self._core.volumes[config.name] = volume
        self._lifetimes.expect(config.name)
        self._ahead.start(volume, config.prefetch, look=probe)

    async def _probe(self, config: VolumeConfig, *, known: bool) -> None:
        store = self._core.open_store(config)
        try:
            with trio.fail_after(PROBE_DEADLINE_S):
                await self._core.offload.store(store.probe)
        except trio.TooSlowError as exc:
            raise UsageError(f"{config.source} does not answer within {PROBE_DEADLINE_S:.0f} s") from exc
        except (NotFound, AccessDenied, StoreUnavailable) as exc:
            hint = ", or mount what is local with --offline" if known and isinstance(exc, StoreUnavailable) else ""
            raise UsageError(f"{config.source} cannot be mounted: {exc}{hint}") from exc

    def _remove(self, name: str) -> None:
        self._ahead.stop(self._core.volumes[name])
        self._tree.remove_volume(name)
        del self._core.volumes[name]
        self._lifetimes.removed(name)
        log.info("volume %s is gone", name)
        self._tell_keeper()
        if not self._core.volumes and not self._stopping:
            self._stopping = True
            log.info("no volume is left: unmounting")
            self._link.request_unmount()

    def _tell_keeper(self) -> None:
        self._link.set_volumes([volume.config for volume in self._core.volumes.values()])

    async def watch_binds(self) -> None:
        """Remove volumes whose last bind is gone; when none is left, ask for the end. Not root: nothing to do."""
        if not self._config.as_root:
            return
        changes = MountChanges()
        try:
            while True:
                gone = self._look()
                if gone:
                    # What is read of mountinfo while others mount is not one moment: a model never goes by one look.
                    await trio.sleep(SECOND_LOOK_S)
                    gone = [name for name in self._look() if name in gone]
                in_use = self._open_views()
                for name in gone:
                    if name not in in_use:
                        self._remove(name)
                soon = self._lifetimes.expecting or bool(gone)
                await changes.wait(1.0 if soon else LOOK_S)
        finally:
            changes.close()

    def _look(self) -> list[str]:
        return self._lifetimes.update(bound_at(self._link.session.device), list(self._core.volumes))

    def _open_views(self) -> set[str]:
        """Volumes with files that are open: after a lazy unmount they are read to the end."""
        return self._tree.views_of(entry.inode for entry in self._ledger.entries())

    # -- requests -------------------------------------------------------------------------------------------------

    def methods(self) -> Mapping[str, Method]:
        """Every request that this server knows."""
        return {
            **work_methods(self._core),
            "ping": self._ping,
            "volumes": self._volumes,
            "status": self._status,
            "check_options": self._check_options,
            "volume_add": self._volume_add,
            "volume_remove": self._volume_remove,
            "upgrade": self._upgrade,
            "stop": self._stop,
        }

    async def _ping(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        session = self._link.session
        return {
            "pid": os.getpid(),
            "keeper_pid": session.keeper_pid,
            "version": __version__,
            "restarts": session.generation,
            "upgrade_result": session.upgrade_result,
        }

    async def _volumes(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        """Names and sources; cheaper than status."""
        volumes = self._core.volumes.values()
        return {
            "as_root": self._config.as_root,
            "mountpoint": str(self._config.mountpoint),
            "volumes": [{"name": volume.name, "source": volume.config.source} for volume in volumes],
        }

    def exposition(self) -> bytes:
        """A scrape's answer, with the gauges as they are now."""
        self._core.tiers()
        return self._metrics.exposition()

    async def _status(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        await self._vfs.wait_for_passthrough_check()
        session = self._link.session
        bound = bound_at(session.device) if self._config.as_root else {}
        volumes = []
        for volume in list(self._core.volumes.values()):
            places = bound.get(volume.name, []) if self._config.as_root else [self._config.mountpoint]
            passthrough, reasons = self._vfs.passthrough_state()
            volumes.append(
                {
                    "name": volume.name,
                    "source": volume.config.source,
                    "mountpoint": str(places[0]) if places else None,
                    "mountpoints": [str(place) for place in places],
                    "mode": volume.config.mode,
                    "passthrough": passthrough,
                    "mode_reasons": reasons,
                    **await self._core.volume_totals(volume),
                }
            )
        read_bytes = self._metrics.read_bytes
        return {
            "server": {
                "pid": os.getpid(),
                "version": __version__,
                "start_time_s": self._started_s,
                "restarts": session.generation,
                "state_dir": str(self._core.config.state_dir),
                "upgrade_result": session.upgrade_result,
            },
            "keeper": {"pid": session.keeper_pid},
            "volumes": volumes,
            "tiers": self._core.tiers(),
            "cache": {
                "hit_bytes": int(read_bytes.total(result="hit")),
                "miss_bytes": int(read_bytes.total(result="miss") + read_bytes.total(result="uncached")),
                "store_bytes": int(self._metrics.store_bytes.total()),
                "evicted_bytes": int(self._metrics.evicted_bytes.total()),
            },
        }

    async def _check_options(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        check_options(self._core.config, params.get("options", {}))
        return {}

    async def _volume_add(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        """Show one more volume under the FUSE root; who asked binds NAME from there within 30 s."""
        if not self._config.as_root or caller.uid != 0:
            raise UsageError(
                f"a server that was not started by root shows one mount, and {self._core.config.state_dir} has one: "
                "give another --state-dir"
            )
        if self._stopping:
            raise ServerStopping("the server is about to end: try again")
        check_options(self._core.config, params.get("options", {}))
        config = convert(params.get("volume"), VolumeConfig)
        added = config.name not in self._core.volumes
        if added:
            await self._add(config, probe=True)
            if self._stopping:  # while the store was asked, the last other volume went
                raise ServerStopping("the server is about to end: try again")
            self._tell_keeper()
        else:
            if self._core.volumes[config.name].config != config:
                raise UsageError(f"the volume name {config.name} is taken by another source")
            bound = bound_at(self._link.session.device)
            self._lifetimes.expect(config.name, len(bound.get(config.name, ())))
        return {"name": config.name, "path": str(self._config.mountpoint / config.name), "added": added}

    async def _volume_remove(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        """Take a volume back that could not be bound. A volume that is bound somewhere stays."""
        name = str(params.get("name"))
        bound = bound_at(self._link.session.device)
        if name in self._core.volumes and not bound.get(name):
            self._remove(name)
        return {"name": name}

    async def _upgrade(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        await self._link.request_upgrade(str(params.get("python") or sys.executable))
        return {"from_version": __version__, "restarts": self._link.session.generation}

    async def _stop(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        self._stopping = True
        self._link.request_unmount()
        return {"pid": os.getpid(), "keeper_pid": self._link.session.keeper_pid}


def check_options(running: ServerConfig, wanted: Mapping[str, Any]) -> None:
    """Raises UsageError that names both values of the first server option that differs."""
    have = msgspec.to_builtins(running, enc_hook=str)
    for name, value in wanted.items():
        if have.get(name) != msgspec.to_builtins(value, enc_hook=str):
            raise UsageError(
                f"the running server of {running.state_dir} has {name} = {have.get(name)!r}, this command asks for "
                f"{value!r}: leave the option out, unmount all first, or give another --state-dir"
            )
