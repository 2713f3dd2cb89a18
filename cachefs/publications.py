"""Node mode: what the CSI driver asks for (csi/server.py has the contract). Keys, views, credentials, conditions.

A key is one volume at one place in a pod. Keys with the same source, options, principal and identity share a view, a
directory under the FUSE root. Bytes are shared by content, access is not: a view lists and fetches with the credentials
of its own keys only. Keys are kept in the index; credentials are in memory and in a memory file that the supervisor
hands to the next server process.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import trio

from cachefs import __version__
from cachefs.ahead import Ahead
from cachefs.cached import Pin
from cachefs.control import Caller, Method, Params, Progress
from cachefs.core import Core
from cachefs.errors import (
    AccessDenied,
    CachefsError,
    IndexUnwritable,
    IntegrityError,
    NotFound,
    ObjectChanged,
    Offline,
    StoreTimeout,
    StoreUnavailable,
    UsageError,
)
from cachefs.index import Table, Write
from cachefs.ledger import Ledger
from cachefs.node_link import NodeLink
from cachefs.store.given import Given, ViewStore
from cachefs.tree import Tree
from cachefs.views import Publication, Request, View, new_publication, open_publication, volume_config
from cachefs.work import convert

log = logging.getLogger(__name__)

KEYS_MAX = 10_000
SWEEP_S = 2.0
PUBLISH_DEADLINE_S = 90.0
PROVEN_S = 600.0
"""So long a principal that could list a view may publish it again without a request. Withdrawn access shows up then."""


class Publications:
    """All views of a node. Run `run`; the methods are for the trio thread."""

    # INVARIANT: every publication's view is in _views, and its key in that view's `publications` unless it is gone.

    def __init__(self, *, core: Core, tree: Tree, link: NodeLink, ledger: Ledger, ahead: Ahead) -> None:
        self._core = core
        self._ahead = ahead
        self._tree = tree
        self._keep = link.keep
        self._node = link.node
        self._ledger = ledger
        self._publications: dict[str, Publication] = {}
        self._given: dict[str, Given] = {}
        self._views: dict[str, View] = {}
        self._locks: dict[str, tuple[trio.Lock, int]] = {}
        self._nursery: trio.Nursery | None = None

    def methods(self) -> Mapping[str, Method]:
        """The requests of the contract."""
        return {
            "volume_publish": self._publish,
            "volume_unpublish": self._unpublish,
            "volume_credentials": self._credentials,
            "volume_stats": self._stats,
            "probe": self._probe,
        }

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Show what was published before, then own the background work until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._load()
            task_status.started()
            while True:
                await trio.sleep(SWEEP_S)
                try:
                    await self._sweep()
                except CachefsError as exc:
                    log.warning("unpublished volumes could not be tidied up: %s", exc)

    async def _load(self) -> None:
        given = {}
        if data := self._keep.read("credentials"):
            given = msgspec.json.decode(data, type=dict[str, Given])
        for _, value in list(self._core.index.scan(Table.VOLUMES)):
            try:
                publication = msgspec.msgpack.decode(value, type=Publication)
                view = await self._view(publication)
            except (CachefsError, msgspec.MsgspecError) as exc:  # the admin's policy is another one now
                log.warning("a published volume is not shown: %s", exc)
                continue
            self._publications[publication.key] = publication
            if not publication.gone:
                view.publications.add(publication.key)
            if publication.key in given:
                self._given[publication.key] = given[publication.key]
                view.keys.give(given[publication.key])
            if not publication.gone and (publication.kind == "anonymous" or view.keys.given is not None):
                self._ahead.start(view.volume, publication.prefetch, top=view.store.layout, look=False)
        log.info("%d published volumes, %d with credentials", len(self._publications), len(self._given))

    # Requests

    async def _probe(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        return {"ready": True, "version": __version__}

    async def _publish(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        request = convert_secret(params, Request)
        if not is_key(request.key):
            raise UsageError("key: 8 to 64 letters and digits")
        async with self._locked(request.key):
            known = self._publications.get(request.key)
            if known is None or known.gone:
                try:
                    with trio.fail_after(PUBLISH_DEADLINE_S):
                        return {"root": await self._publish_new(request)}
                except trio.TooSlowError as exc:
                    raise StoreTimeout(f"{request.source}: no answer within {PUBLISH_DEADLINE_S:.0f} s") from exc
            if not known.shows(request):
                raise UsageError("the key is published with other options: unpublish it first")
            if request.credentials.kind == known.kind:
                await self._give(request.key, request.credentials)
            else:
                log.warning("volume %s: credentials of another kind were given and are not used", request.key)
            return {"root": known.view}

    async def _publish_new(self, request: Request) -> str:
        if len(self._publications) >= KEYS_MAX:
            raise UsageError(f"{KEYS_MAX} volumes are published on this node: no more")
        publication = new_publication(request, self._node)
        async with self._locked("view " + publication.view):
            is_new = publication.view not in self._views
            view = await self._view(publication)
            try:
                await self._prove(view, publication, request)
                if publication.pin:
                    await self._core.cache.pin(self._pin(view, publication))
                record = Write(Table.VOLUMES, request.key.encode(), msgspec.msgpack.encode(publication))
                await self._core.offload.index(self._apply, [record])
            except BaseException:
                if is_new and not view.publications:
                    self._remove_view(publication.view)
                raise
            self._publications[request.key] = publication
            view.publications.add(request.key)
            await self._give(request.key, request.credentials)
        self._ahead.start(view.volume, publication.prefetch, top=view.store.layout)
        log.info("published %s as %s", publication.source, publication.view)
        return publication.view

    async def _prove(self, view: View, publication: Publication, request: Request) -> None:
        """One listing with these credentials: who may not list gets an error, not a view.

        Not asked again within PROVEN_S: whether what may, still may. Raises what the store raises, Offline.
        """
        given = request.credentials
        if view.is_proven(given, trio.current_time() - PROVEN_S, is_account=bool(request.principal)):
            return
        if self._core.config.offline:
            raise Offline("volumes cannot be published offline: nobody can say who may see them")
        if view.publications:  # others read with their credentials meanwhile
            inner, keys = open_publication(publication, self._node, self._core.config, self._core.count_hedge)
            keys.give(given)
            try:
                await self._core.offload.store(inner.probe)
            finally:
                inner.close()
        else:
            before = view.keys.given
            view.keys.give(given)
            try:
                await self._look(view)
            except BaseException:
                view.keys.give(before)  # files may still be open in it
                raise
        view.proven = given
        view.proven_s = trio.current_time()

    async def _look(self, view: View) -> None:
        top = view.store.layout  # the directory that is the source itself
        if not await self._core.snapshots.is_frozen(view.volume, top):
            listing = await self._core.snapshots.refreeze(view.volume, top)
            if listing.entries:
                return
            # Nothing there, or the patterns hide it.
        await self._core.offload.store(view.store.probe)

    async def _unpublish(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        key = str(params.get("key"))
        if not is_key(key):
            return {}
        async with self._locked(key):
            publication = self._publications.get(key)
            if publication is None and self._core.index.get(Table.VOLUMES, key.encode()) is not None:
                # Not shown, because the admin's policy changed.
                await self._core.offload.index(self._apply, [Write(Table.VOLUMES, key.encode(), None)])
            if publication is not None and not publication.gone:
                publication = await self._withdraw(publication)
            if publication is not None:
                await self._unpin(publication)
                await self._sweep_one(publication, self._open_views())
        if trouble := self._core.index.trouble:
            # What a spill has ends with the mount, and the disk still says that it is published: to be asked again.
            raise IndexUnwritable(f"the volume is shown no more, and that cannot be recorded: {trouble}")
        return {}

    async def _withdraw(self, publication: Publication) -> Publication:
        """It is shown to no new pod."""
        view = self._views[publication.view]
        gone = msgspec.structs.replace(publication, gone=True)
        record = Write(Table.VOLUMES, publication.key.encode(), msgspec.msgpack.encode(gone))
        await self._core.offload.index(self._apply, [record])
        self._publications[publication.key] = gone
        view.publications.discard(publication.key)
        if not view.publications:
            self._ahead.stop(view.volume)
        return gone

    async def _unpin(self, publication: Publication) -> None:
        """Unless another pod of its view has it pinned. Done again until the disk has taken it."""
        view = self._views[publication.view]
        if publication.pin and not any(self._publications[other].pin for other in view.publications):
            pin_id = self._pin(view, publication).pin_id
            if any(pin.pin_id == pin_id for pin in self._core.cache.pins()):
                await self._core.cache.unpin(pin_id)

    async def _credentials(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        key = str(params.get("key"))
        given = convert_secret(params.get("credentials"), Given)
        async with self._locked(key):
            publication = self._known(key)
            if given.kind == publication.kind:
                await self._give(key, given)
            else:
                log.warning("volume %s: credentials of another kind were given and are not used", key)
        return {}

    async def _stats(self, params: Params, progress: Progress, caller: Caller) -> dict[str, Any]:
        publication = self._known(str(params.get("key")))
        view = self._views[publication.view]
        totals = await self._core.volume_totals(view.volume)
        names = ("bytes_total", "bytes_local", "objects_total", "objects_sealed")
        return {**{name: totals[name] for name in names}, "condition": self._condition(publication, view)}

    def _condition(self, publication: Publication, view: View) -> dict[str, Any]:
        trouble = view.store.trouble
        reason, message = "healthy", ""
        if publication.kind != "anonymous" and view.keys.given is None:
            reason = "credentials"
            message = "waits for credentials: local bytes are read, others wait until the volume is published again"
        elif isinstance(trouble, IntegrityError):
            reason, message = "integrity", "the store sent bytes that are not what it promised"
        elif isinstance(trouble, AccessDenied):
            reason, message = (
                "denied",
                "the store refuses the volume's credentials: local bytes are read, others are not",
            )
        elif self._core.config.offline or isinstance(trouble, StoreUnavailable):
            reason, message = "offline", "the store does not answer: local bytes are read, others wait"
        elif isinstance(trouble, ObjectChanged | NotFound) or self._core.snapshots.is_stale(view.volume):
            reason, message = "stale", "the source has changed: what this volume shows is not all there any more"
        elif trouble is not None:
            reason, message = "offline", "the store cannot be asked: see the server's log"
        return {"abnormal": reason != "healthy", "message": message, "reason": reason}

    def _known(self, key: str) -> Publication:
        publication = self._publications.get(key)
        if publication is None or publication.gone:
            raise NotFound("no volume is published under this key")
        return publication

    # Views

    async def _view(self, publication: Publication) -> View:
        """The view, made when it is not there. Raises UsageError."""
        view = self._views.get(publication.view)
        if view is not None:
            return view
        inner, keys = open_publication(publication, self._node, self._core.config, self._core.count_hedge)
        store = ViewStore(inner, layout=publication.layout, isolation=publication.isolation)
        config = volume_config(publication)
        volume = await self._tree.add_volume(config, store)
        view = self._views[publication.view] = View(volume, store, keys)
        self._core.volumes[publication.view] = volume
        return view

    def _remove_view(self, name: str) -> None:
        view = self._views.pop(name)
        self._ahead.stop(view.volume)
        self._tree.remove_volume(name)
        self._core.volumes.pop(name, None)
        view.store.close()

    # Credentials

    async def _give(self, key: str, given: Given) -> None:
        """Replace what a key uses. The store is not asked. Raises UsageError for what cannot be used."""
        given.check("s3", node_credentials=self._node.allow_node_credentials)
        view = self._views[self._publications[key].view]
        if self._given.get(key) != given:
            self._given[key] = given
            self._keep_credentials()
        if view.keys.given != given:
            resumes = view.keys.given is None or isinstance(view.store.trouble, AccessDenied)
            view.keys.give(given)
            if resumes:  # what ended, or did not begin, for want of these
                self._resume(view)
            if isinstance(view.store.trouble, AccessDenied | StoreUnavailable):
                view.store.trouble = None

    def _resume(self, view: View) -> None:
        """Go on with what the view's pods want fetched. What already runs is not begun again."""
        for key in view.publications:
            self._ahead.start(view.volume, self._publications[key].prefetch, top=view.store.layout, look=False)

    def _keep_credentials(self) -> None:
        """For the next server process of this supervisor; nowhere else."""
        descriptor = os.memfd_create("cachefs-credentials", os.MFD_CLOEXEC)
        try:
            data = memoryview(msgspec.json.encode(self._given))
            while data:
                data = data[os.write(descriptor, data) :]
            self._keep.keep(credentials=descriptor)
        finally:
            os.close(descriptor)

    # Background

    def _pin(self, view: View, publication: Publication) -> Pin:
        path = view.store.key_of_source()
        return Pin(f"csi-{publication.view}", view.store.identity, path, time.time())

    async def _sweep(self) -> None:
        gone = [publication for publication in self._publications.values() if publication.gone]
        open_views = self._open_views() if gone else set()
        for publication in gone:
            async with self._locked(publication.key):
                if self._publications.get(publication.key) is publication:
                    await self._sweep_one(publication, open_views)

    async def _sweep_one(self, publication: Publication, open_views: set[str]) -> None:
        """Forget a key that was unpublished, and its view when nothing is open in it."""
        if publication.view in open_views:
            return
        async with self._locked("view " + publication.view):
            await self._unpin(publication)
            await self._core.offload.index(self._apply, [Write(Table.VOLUMES, publication.key.encode(), None)])
            del self._publications[publication.key]
            if self._given.pop(publication.key, None) is not None:  # until now for files that were open
                self._keep_credentials()
            others = any(other.view == publication.view for other in self._publications.values())
            if not others and publication.view in self._views and not self._views[publication.view].publications:
                self._remove_view(publication.view)

    def _open_views(self) -> set[str]:
        return self._tree.views_of(entry.inode for entry in self._ledger.entries())

    def _apply(self, writes: Iterable[Write]) -> None:
        self._core.index.apply(list(writes), durable=True)

    def _locked(self, name: str) -> "_Held":
        return _Held(self._locks, name)

    def check_invariants(self) -> None:
        for publication in self._publications.values():
            view = self._views[publication.view]
            assert publication.gone or publication.key in view.publications, publication.key
        assert set(self._given) <= set(self._publications)


class _Held:
    """A lock by name that exists as long as somebody holds it or waits."""

    def __init__(self, locks: dict[str, tuple[trio.Lock, int]], name: str) -> None:
        self._locks = locks
        self._name = name

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._name, (trio.Lock(), 0))
        self._locks[self._name] = (lock, users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._forget()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._locks[self._name][0].release()
        self._forget()

    def _forget(self) -> None:
        lock, users = self._locks.pop(self._name)
        if users > 1:
            self._locks[self._name] = (lock, users - 1)


def is_key(text: str) -> bool:
    """Whether this can be a publication's key (which is a key of the index, too)."""
    return text.isascii() and text.isalnum() and 8 <= len(text) <= 64


def convert_secret(value: Any, kind: type[Any]) -> Any:
    """As work.convert, for what has credentials in it: the message names no value."""
    try:
        return convert(value, kind)
    except UsageError as exc:
        place = str(exc).rpartition(" - at ")[2] if " - at " in str(exc) else "a parameter"
        raise UsageError(f"{place[:80]} is missing or of the wrong kind") from None
