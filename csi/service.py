"""The driver's composition root: sockets, servicers, threads, signals."""

import logging
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import grpc
import msgspec

from cachefs.errors import UsageError
from csi.controller import Controller
from csi.identity import Identity
from csi.mounts import Kernel, Targets
from csi.node import Node
from csi.options import Policy
from csi.publisher import Publisher
from csi.records import Publications
from csi.registration import SOCKET_NAME, Registration
from csi.server import ControlServer, ServerApi
from csi.spec import csi_pb2_grpc, registration_pb2_grpc

log = logging.getLogger(__name__)

WORKERS = 128
"""Threads are made as needed. Publishes may take PUBLISHES_MAX of them, so that one hung store never keeps an unpublish
waiting."""
PUBLISHES_MAX = 96
CALLS_MAX = 256
"""More at once are refused with RESOURCE_EXHAUSTED; the kubelet comes again."""
MESSAGE_BYTES_MAX = 4 * 1024 * 1024
STOP_GRACE_S = 5.0
SOCKET_PATH_BYTES_MAX = 107


class DriverConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `cachefs csi`."""

    endpoint: str
    mode: Literal["node", "controller", "all"] = "all"
    node_id: str = ""
    kubelet_dir: Path = Path("/var/lib/kubelet")
    server_socket: Path = Path("/var/lib/cachefs/run/control.sock")
    server_uids: frozenset[int] = frozenset({0, 65534})
    mount_root: Path = Path("/var/lib/cachefs/root")
    state_dir: Path = Path("/var/lib/cachefs/csi")
    registration_dir: Path | None = None
    kubelet_endpoint: str | None = None
    policy: Policy = Policy()


def socket_path(endpoint: str) -> Path:
    """unix:///path or unix:/path. Raises UsageError for everything else: the driver never listens on a network."""
    scheme, _, rest = endpoint.partition(":")
    path = rest[2:] if rest.startswith("//") else rest
    if scheme != "unix" or not path.startswith("/"):
        raise UsageError("--endpoint: unix:///ABSOLUTE/PATH")
    if len(path.encode()) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"--endpoint: a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes")
    return Path(path)


class Driver:
    """Started by start(), ended by stop(); wait() returns the exit code."""

    def __init__(self, config: DriverConfig, *, kernel: Kernel | None = None, server: ServerApi | None = None) -> None:
        if config.mode != "controller" and not config.node_id:
            raise UsageError("--node-id is missing")
        self._config = config
        self._server = server or ControlServer(config.server_socket, server_uids=config.server_uids)
        self._kernel = kernel or Kernel()
        # put() may be called from a signal handler, which an Event's set() may not.
        self._stop: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._grpc: list[tuple[grpc.Server, Path]] = []
        self._publisher: Publisher | None = None

    def make_records(self) -> Publications:
        """The node's publications; a test gives its own."""
        records = Publications(self._config.state_dir / "publications")
        for name in records.damaged:
            log.error("the record %s is damaged and was set aside", name)
        return records

    def start(self) -> None:
        """Listen, register, finish what the last driver left. Raises UsageError for what cannot be listened on."""
        config = self._config
        path = socket_path(config.endpoint)
        server = self._new_server()
        if config.mode != "controller":
            targets = Targets(config.kubelet_dir, config.mount_root, self._kernel)
            self._publisher = Publisher(
                records=self.make_records(),
                targets=targets,
                server=self._server,
                policy=config.policy,
                publishes_max=PUBLISHES_MAX,
            )
            csi_pb2_grpc.add_NodeServicer_to_server(Node(self._publisher, config.node_id), server)
        if config.mode != "node":
            csi_pb2_grpc.add_ControllerServicer_to_server(Controller(config.policy), server)
        is_ready = self._server.probe if config.mode != "controller" else None
        csi_pb2_grpc.add_IdentityServicer_to_server(Identity(is_ready), server)
        self._listen(server, path)
        if self._publisher is not None:
            threading.Thread(target=self._publisher.run_tidy, name="tidy", daemon=True).start()
        if config.registration_dir is not None and config.mode != "controller":
            registration = self._new_server()
            endpoint = config.kubelet_endpoint or str(path)
            servicer = Registration(endpoint, lambda: self.stop(1))
            registration_pb2_grpc.add_RegistrationServicer_to_server(servicer, registration)
            self._listen(registration, config.registration_dir / SOCKET_NAME)
        log.info("%s listens on %s", config.mode, path)

    def _new_server(self) -> grpc.Server:
        options = (
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.so_reuseport", 0),
            # The kubelet's `:authority: localhost` is all that ever comes over a unix socket.
            ("grpc.http2.max_ping_strikes", 0),
        )
        pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="rpc")
        return grpc.server(pool, options=options, maximum_concurrent_rpcs=CALLS_MAX)

    def _listen(self, server: grpc.Server, path: Path) -> None:
        """0600, and in a directory of root's: who may connect is who may open it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.unlink(missing_ok=True)
            old_mask = os.umask(0o177)
            try:
                server.add_insecure_port(f"unix:{path}")
            finally:
                os.umask(old_mask)
        except (OSError, RuntimeError) as exc:
            raise UsageError(f"cannot listen on {path}: {getattr(exc, 'strerror', None) or 'bind failed'}") from None
        server.start()
        self._grpc.append((server, path))

    def stop(self, exit_code: int = 0) -> None:
        """From a signal handler or a thread: wait() returns."""
        self._stop.put(exit_code)

    def wait(self) -> int:
        """Until stop(); lets the calls in progress end (STOP_GRACE_S) and removes the sockets. The exit code."""
        exit_code = self._stop.get()
        if self._publisher is not None:
            self._publisher.stop()
        for event in [server.stop(STOP_GRACE_S) for server, _path in self._grpc]:
            event.wait(STOP_GRACE_S * 2)
        for _server, path in self._grpc:
            path.unlink(missing_ok=True)
        return exit_code
