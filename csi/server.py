"""What the driver asks the server over the control socket. This file is the contract; the server implements it.

Wire: as cachefs/client.py: one request per connection, a line of JSON {"method", "params"}; the answer is zero or
more lines {"progress": ...} and then {"result": ...} or {"error": {"type", "message", "exit_code"}}. Both ends check
the other's uid (SO_PEERCRED): the server takes root and its own uid, the driver takes root and `--server-uid`.

`key` is the driver's name of one publication (one volume at one target path): 40 hex digits, never reused for other
arguments. Every method may be called again with the same key, from several connections at once, and after a crash of
either side at any point; the server serialises calls of one key.

volume_publish {key, source, endpoint_url, region, include, exclude, layout, pin, prefetch, isolation, principal,
                credentials}  ->  {root}
    source        "s3://bucket/prefix", "gs://", "az://", "hf://org/repo[@revision]", "https://host/path"
    endpoint_url  str | None      region  str | None
    include, exclude  lists of globs over paths below the source; both empty: everything
    layout        "": the model is the view's root; else the one subdirectory of the view that it is in
    pin           bool: keep the view's objects for as long as the key is published
    prefetch      "auto": the small files of a model (configuration, tokenizer), at the top now and in directories when
                  they are looked into; "all": the whole view in load order; "none". In the background, begun before
                  the answer is sent, so before the container starts
    isolation     "shared": bytes are shared by content; "strict": a cache of the principal's namespace's own
    principal     "namespace/service account", or "" outside of Kubernetes
    credentials   {"kind", "values", "tokens", "role"}, see csi/credentials.py:
                  static: `values` by the names of SECRET_NAMES; web_identity: `tokens` {audience: {"token",
                  "expires"}}, `role` an ARN or None (EKS Pod Identity: audience pods.eks.amazonaws.com; GKE: the
                  workload identity pool; Azure: api://AzureADTokenExchange); chain: the server's own; anonymous.
                  Kept in memory only, never logged, never in status. A server process that
                  is killed leaves them to the next one; after a restart of its container a key has none until the
                  next volume_credentials or volume_publish: what is local is served, fetches wait
                  (`on_unreachable`), the condition says `credentials`.
    root          path of the view's directory relative to the FUSE root: `name` or `name/name`, no `..`. Keys with the
                  same source, options, principal and isolation may get the same root; it lives until the last of
                  them is unpublished.
    Does an authenticated listing of the source's top with these credentials (at most one LIST of a new snapshot, none
    of a known one that this principal may see already): who may not list gets AccessDenied, not a view.
    A known key: the credentials are replaced, the same root is returned, and no error of the store is raised.
    Errors: NotFound, AccessDenied, UsageError, StoreUnavailable, StoreTimeout, Offline, NoSpace, IndexUnwritable,
    IndexFull; after an error the key is not published.

volume_unpublish {key}  ->  {}
    Drops the view when it was its last key; unknown keys are no error. IndexUnwritable: it is dropped, but that is not
    recorded yet, to be asked again. Open files live on until they are closed.

volume_credentials {key, credentials}  ->  {}
    Replaces the credentials (token rotation, every republish). Does not ask the store. Errors: NotFound (the server
    does not know the key: the driver then calls volume_publish again).

volume_stats {key}  ->  {bytes_total, bytes_local, objects_total, objects_sealed, condition}
    condition     {abnormal: bool, message: str, reason: one of REASONS}; message is one line without secrets
    Never asks the store; answers within 1 s. Errors: NotFound.

probe {}  ->  {ready: bool, version: str}
    ready: the FUSE root is mounted and served.

The server keeps published keys (not their credentials) over its own restarts. It listens as its own user from the
start: SO_PEERCRED tells who called listen(2), not who serves now.

Paths of a node (`--node-dir NODE`, /var/lib/cachefs in the manifests):
    NODE/root       the FUSE root, mounted by the keeper with allow_other; it stays when the last volume is unpublished,
                    and binds in other mount namespaces are not the server's to see
    NODE/run        0700, the server's user: control.sock, and the socket between keeper and server
    NODE/cache      the server's state directory
    NODE/csi        the driver's records
"""

import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from csi.credentials import Credentials
from csi.failure import BadRequest, Broken, Denied, Failure, Full, TooSlow, Unknown, Unreachable
from csi.options import VolumeOptions

_T = TypeVar("_T")

REASONS = ("healthy", "offline", "stale", "denied", "integrity", "credentials", "restart_needed")
ANSWER_BYTES_MAX = 1024 * 1024
PUBLISH_TIMEOUT_S = 100.0
"""The kubelet gives a publish two minutes; ours ends before, so that its answer is read by somebody."""
CALL_TIMEOUT_S = 5.0

FAILURES: dict[str, type[Failure]] = {
    "NotFound": Unknown,
    "AccessDenied": Denied,
    "UsageError": BadRequest,
    "StoreUnavailable": Unreachable,
    "StoreTimeout": TooSlow,
    "Offline": Unreachable,
    "NoSpace": Full,
    "IndexUnwritable": Full,
    "IndexFull": Full,
}
"""By the name of the server's error class (cachefs/errors.py)."""


class Condition(msgspec.Struct, frozen=True):
    """Of a published volume."""

    abnormal: bool
    message: str
    reason: str = "healthy"


class VolumeStats(msgspec.Struct, frozen=True):
    """Bytes and objects of one view, and how it is."""

    bytes_total: int
    bytes_local: int
    objects_total: int
    objects_sealed: int
    condition: Condition


class _Root(msgspec.Struct, frozen=True):
    root: str


class _Ready(msgspec.Struct, frozen=True):
    ready: bool


class ServerApi(Protocol):
    """The contract as a type; tests pass their own."""

    def volume_publish(self, key: str, options: VolumeOptions, credentials: Credentials) -> str: ...

    def volume_unpublish(self, key: str) -> None: ...

    def volume_credentials(self, key: str, credentials: Credentials) -> None: ...

    def volume_stats(self, key: str) -> VolumeStats: ...

    def probe(self) -> bool: ...


class ControlServer:
    """ServerApi over the control socket. Every method raises Unreachable when nobody answers."""

    def __init__(self, path: Path, *, server_uids: frozenset[int]) -> None:
        self._path = path
        self._server_uids = server_uids

    def volume_publish(self, key: str, options: VolumeOptions, credentials: Credentials) -> str:
        """The view's root below the FUSE root."""
        params = {
            "key": key,
            "source": options.source,
            "endpoint_url": options.endpoint_url,
            "region": options.region,
            "include": options.include,
            "exclude": options.exclude,
            "layout": options.layout,
            "pin": options.pin,
            "prefetch": options.prefetch,
            "isolation": options.isolation,
            "principal": options.principal,
            "credentials": credentials.document(),
        }
        return _checked(self._call("volume_publish", params, PUBLISH_TIMEOUT_S), _Root).root

    def volume_unpublish(self, key: str) -> None:
        """Forget the key."""
        self._call("volume_unpublish", {"key": key}, CALL_TIMEOUT_S)

    def volume_credentials(self, key: str, credentials: Credentials) -> None:
        """New credentials for a key; Unknown when the server has none such."""
        self._call("volume_credentials", {"key": key, "credentials": credentials.document()}, CALL_TIMEOUT_S)

    def volume_stats(self, key: str) -> VolumeStats:
        """Unknown when the server does not know the key."""
        return _checked(self._call("volume_stats", {"key": key}, CALL_TIMEOUT_S), VolumeStats)

    def probe(self) -> bool:
        """Whether volumes can be published."""
        return _checked(self._call("probe", {}, CALL_TIMEOUT_S), _Ready).ready

    def _call(self, method: str, params: Mapping[str, Any], timeout_s: float) -> Any:
        """Not cachefs.client.call: a secret must not be sent before the peer's uid is known."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(timeout_s)
            try:
                sock.connect(str(self._path))
                self._check_peer(sock)
                sock.sendall(msgspec.json.encode({"method": method, "params": params}) + b"\n")
                return _read_answer(sock)
            except TimeoutError:
                raise TooSlow(f"the server does not answer within {timeout_s:.0f} s") from None
            except OSError as exc:
                raise Unreachable(f"the server does not answer ({exc.strerror or 'closed'})") from None

    def _check_peer(self, sock: socket.socket) -> None:
        size = struct.calcsize("3i")
        _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid not in self._server_uids:
            raise Broken(f"the process at the server's socket has uid {uid}; secrets are not sent there")


def _read_answer(sock: socket.socket) -> Any:
    with sock.makefile("rb") as lines:
        while line := lines.readline(ANSWER_BYTES_MAX):
            try:
                answer = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.MsgspecError:
                raise Broken("the server's answer is not JSON") from None
            if "progress" in answer:
                continue
            error = answer.get("error")
            if isinstance(error, dict):
                raise FAILURES.get(str(error.get("type")), Broken)(str(error.get("message", "the server failed")))
            return answer.get("result")
    raise Unreachable("the server went away before it answered")


def _checked(answer: Any, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError:
        raise Broken("the server's answer has another shape than agreed") from None
