"""Publish, republish, unpublish and stats of volumes on this node. Knows no gRPC.

Rules that the kubelet's behaviour dictates: once published, a republish never unmounts and never fails for what the
store or the credentials do (the condition says so); an unpublish never waits for the server (a pod must be able to
go); every step may be the last before a SIGKILL.
"""

import logging
import threading
from collections.abc import Mapping

import msgspec

from csi.credentials import choose_credentials
from csi.failure import BadRequest, Conflict, Failure, Full, NotAllowedNow, TooSlow, Unknown, Unreachable
from csi.locks import KeyLocks
from csi.mounts import Targets
from csi.options import Policy, VolumeOptions, parse_options
from csi.records import RECIPE, Publication, Publications, arguments_digest, publication_key, same_arguments
from csi.server import Condition, ServerApi, VolumeStats

log = logging.getLogger(__name__)

MOUNT_FLAGS = frozenset({"ro", "rw", "nosuid", "nodev", "noexec", "noatime", "relatime"})
"""mountOptions that change nothing here: every volume is mounted ro,nosuid,nodev and, unless lifted, noexec."""
UNCERTAIN = (Unreachable, TooSlow)
"""After these the server may have done the work or may still do it."""
TIDY_INTERVAL_S = 5.0
"""While the server has to be told of something; else TIDY_RARELY_S."""
TIDY_RARELY_S = 600.0
STATS_KEPT_MAX = 4096


class PublishRequest(msgspec.Struct, frozen=True, kw_only=True):
    """NodePublishVolume without gRPC."""

    volume_id: str
    target: str
    context: Mapping[str, str]
    secrets: Mapping[str, str]
    access_mode: int
    exclusive: bool
    """The access mode allows one target path per node."""
    mount_flags: tuple[str, ...] = ()
    readonly: bool = False


class Publisher:
    """The node's publications. Thread-safe."""

    def __init__(
        self, *, records: Publications, targets: Targets, server: ServerApi, policy: Policy, publishes_max: int
    ) -> None:
        self._records = records
        self._targets = targets
        self._server = server
        self._policy = policy
        self._locks = KeyLocks()
        self._publishes = threading.BoundedSemaphore(publishes_max)
        self._last_stats: dict[str, VolumeStats] = {}
        self._wake = threading.Event()
        self._stopped = False

    def publish(self, request: PublishRequest) -> None:
        """Mount the volume at the target. Any Failure; the same call may be made again after each."""
        if not self._publishes.acquire(blocking=False):
            raise Full("too many publishes are in progress")
        try:
            self._publish(request)
        finally:
            self._publishes.release()

    def _publish(self, request: PublishRequest) -> None:
        target = self._targets.normal(request.target)
        digest = arguments_digest(
            request.volume_id, request.context, request.access_mode, request.mount_flags, request.readonly
        )
        key = publication_key(request.volume_id, target)
        with self._locks.hold(target):
            record = self._records.get(key)
            if record is not None and record.state != "leaving" and self._is_mounted(record):
                self._republish(record, digest, request)
                return
            if record is not None and record.state == "leaving":
                # The server may still know the key, and a key that it knows gets its view without a listing: with
                # credentials that were withdrawn meanwhile.
                self._server.volume_unpublish(key)
            self._publish_new(key, target, digest, request)

    def _is_mounted(self, record: Publication) -> bool:
        """Whether our mount is at the record's target, alive or dead. Raises NotAllowedNow for a foreign one."""
        mounts = self._targets.mounts_at(record.target)
        if not mounts:
            return False
        device = str(mounts[-1].major_minor)
        if device in self._devices(record) or mounts[-1].fstype == "fuse.cachefs":
            return True
        raise NotAllowedNow("something else is mounted at the target path")

    def _devices(self, record: Publication | None) -> frozenset[str]:
        """The file systems whose mounts at a target are ours. A record's device counts only while no reboot gave the
        number to something else: it was written after our own mount, and only unpublish removes it."""
        devices = {self._targets.root_device()} | ({record.device} if record is not None else set())
        return frozenset(devices - {""})

    def _republish(self, record: Publication, digest: str, request: PublishRequest) -> None:
        if not same_arguments(record, digest):
            raise Conflict("the volume is published at this target path with other arguments")
        if record.state == "publishing" or record.recipe != RECIPE:
            # The mount was the last step before a crash, or an older driver compared other things.
            device = record.device or self._targets.root_device()
            changed = {"state": "published", "digest": digest, "recipe": RECIPE, "device": device}
            record = msgspec.structs.replace(record, **changed)
            self._records.put(record)
        try:
            options = parse_options(request.volume_id, request.context, self._policy)
            credentials = choose_credentials(options, request.secrets, request.context, self._policy)
            try:
                self._server.volume_credentials(record.key, credentials)
            except Unknown:
                self._server.volume_publish(record.key, options, credentials)
        except Failure as exc:
            # Never final for a running pod: NodeGetVolumeStats tells the kubelet.
            log.warning("republish of %s: %s", record.key, type(exc).__name__)

    def _publish_new(self, key: str, target: str, digest: str, request: PublishRequest) -> None:
        options = parse_options(request.volume_id, request.context, self._policy)
        credentials = choose_credentials(options, request.secrets, request.context, self._policy)
        unknown_flags = sorted(set(request.mount_flags) - MOUNT_FLAGS)
        if unknown_flags:
            raise BadRequest(f"mount options are not supported, known are {', '.join(sorted(MOUNT_FLAGS))}")
        record = Publication(
            key=key,
            volume_id=request.volume_id,
            target=target,
            digest=digest,
            state="publishing",
            exclusive=request.exclusive,
        )
        self._records.reserve(record)
        try:
            self._clear(target)
            root = self._server.volume_publish(key, options, credentials)
            self._mount(record, root, options)
        except UNCERTAIN:
            # The record stays: the kubelet asks again or unpublishes, and then the server is told.
            raise
        except Failure:
            self._abandon(record)
            raise

    def _mount(self, record: Publication, root: str, options: VolumeOptions) -> None:
        self._targets.make_directory(record.target)
        device = self._targets.root_device()
        record = msgspec.structs.replace(record, root=root, device=device)
        self._records.put(record)
        self._targets.bind(root, record.target, noexec=options.noexec)
        self._records.put(msgspec.structs.replace(record, state="published"))

    def _clear(self, target: str) -> None:
        """A mount without a record: ours (the records were lost) is replaced, a foreign one is not touched."""
        if self._targets.mounts_at(target) and not self._targets.release(target, self._devices(None)):
            raise NotAllowedNow("something else is mounted at the target path")

    def _abandon(self, record: Publication) -> None:
        try:
            self._targets.release(record.target, self._devices(record))
        except Failure:
            log.warning("publication %s: its target is left behind", record.key)
        self._leave(record)

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Take the mount and the directory away; done already, or never published: no error."""
        target = self._targets.normal(target_path)
        key = publication_key(volume_id, target)
        with self._locks.hold(target):
            record = self._records.get(key)
            if record is None and self._of_another(target):
                log.warning("unpublish of %s: another volume is published at its target", key)
                return
            released = self._targets.release(target, self._devices(record))
            if not released:
                # A foreign mount: not ours to take away, and not a reason to hold up the pod's removal.
                log.warning("unpublish of %s: something else is mounted at its target", key)
            self._last_stats.pop(key, None)
            if record is not None:
                self._leave(record)
            else:
                self._forget_at_server(key)

    def _forget_at_server(self, key: str) -> None:
        """For a state directory that was lost: the key is a hash, so the server can still be told."""
        try:
            self._server.volume_unpublish(key)
        except Failure as exc:
            log.debug("unpublish of the unknown %s: %s", key, type(exc).__name__)

    def _of_another(self, target: str) -> bool:
        return any(record.target == target and record.state != "leaving" for record in self._records.all())

    def _leave(self, record: Publication) -> None:
        """Tell the server; when it does not answer, remember to."""
        leaving = msgspec.structs.replace(record, state="leaving")
        self._records.put(leaving)
        try:
            self._server.volume_unpublish(record.key)
        except Failure:
            self._wake.set()
            return
        self._records.remove(record.key)

    def stats(self, volume_id: str, path: str) -> VolumeStats:
        """Raises Unknown when the volume is not published at the path."""
        try:
            target = self._targets.normal(path)
        except BadRequest:
            raise Unknown("no volume is published at this path") from None
        record = self._records.get(publication_key(volume_id, target))
        if record is None or record.state != "published":
            raise Unknown("no volume is published at this path")
        lost = self._lost(record)
        try:
            stats = self._server.volume_stats(record.key)
        except Failure as exc:
            stats = self._last_stats.get(record.key) or VolumeStats(0, 0, 0, 0, Condition(False, "", "healthy"))
            reason = (
                "the cache server does not know the volume yet"
                if isinstance(exc, Unknown)
                else ("the cache server does not answer; reads of local files go on, others wait")
            )
            stats = msgspec.structs.replace(stats, condition=Condition(True, reason, "offline"))
        else:
            if len(self._last_stats) < STATS_KEPT_MAX:
                self._last_stats[record.key] = stats
        return msgspec.structs.replace(stats, condition=lost) if lost is not None else stats

    def _lost(self, record: Publication) -> Condition | None:
        """The condition of a pod whose mount belongs to a FUSE session that is gone."""
        mounts = self._targets.mounts_at(record.target)
        if not mounts:
            return Condition(True, "the volume is not mounted any more: restart the pod", "restart_needed")
        current = self._targets.root_device()
        if current and str(mounts[-1].major_minor) != current:
            message = "keeper and server were gone at once and the mount was lost: restart the pod"
            return Condition(True, message, "restart_needed")
        return None

    def tidy(self) -> int:
        """Finish what crashes and outages left: tell the server of volumes that left, drop publications whose pod
        directory is gone. Returns how many records still wait for the server."""
        for record in self._records.all():
            try:
                with self._locks.hold(record.target):
                    self._tidy_one(record.key)
            except Failure as exc:
                log.debug("tidy %s: %s", record.key, type(exc).__name__)
        return sum(record.state == "leaving" for record in self._records.all())

    def _tidy_one(self, key: str) -> None:
        record = self._records.get(key)
        if record is None:
            return
        if record.state == "leaving":
            self._server.volume_unpublish(key)
            self._records.remove(key)
        elif not self._targets.parent_exists(record.target):
            self._leave(record)

    def run_tidy(self) -> None:
        """Until stop(): at start, then by the clock."""
        waiting = self.tidy()
        while not self._stopped:
            self._wake.wait(TIDY_INTERVAL_S if waiting else TIDY_RARELY_S)
            if not self._stopped:
                self._wake.clear()
                waiting = self.tidy()

    def stop(self) -> None:
        """Ends run_tidy()."""
        self._stopped = True
        self._wake.set()
