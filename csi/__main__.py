"""`python -m csi`: parse the command line, run the driver. `cachefs csi` is the same command."""

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

CHECK_TIMEOUT_S = 10.0


class _JsonLines(logging.Formatter):
    """One JSON document per line; never a traceback, whose text may hold what a request carried."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {"time": stamp, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        return json.dumps(line)


def _set_up_logging(level: str, form: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # grpcio logs exceptions of servicers with their text: rpc.py has said all that may be said.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)


def parser() -> argparse.ArgumentParser:
    """The flags of the driver."""
    flags = argparse.ArgumentParser(prog="cachefs csi", description="The CSI driver csi.cachefs.io.")
    flags.add_argument("--endpoint", required=True, help="unix:///PATH of the CSI socket")
    flags.add_argument("--mode", choices=("node", "controller", "all"), default="all")
    flags.add_argument("--node-id", default="", help="the node's name (modes node and all)")
    flags.add_argument("--kubelet-dir", type=Path, default=Path("/var/lib/kubelet"))
    flags.add_argument("--server-socket", type=Path, default=Path("/var/lib/cachefs/run/control.sock"))
    flags.add_argument("--server-uid", type=int, action="append", help="uids that the server may have (0 and 65534)")
    flags.add_argument("--mount-root", type=Path, default=Path("/var/lib/cachefs/root"), help="the FUSE root")
    flags.add_argument("--state-dir", type=Path, default=Path("/var/lib/cachefs/csi"))
    flags.add_argument("--registration-dir", type=Path, help="the kubelet's plugins_registry; absent: no registration")
    flags.add_argument("--kubelet-endpoint", help="path of the CSI socket as the kubelet sees it")
    flags.add_argument("--allow-endpoint", action="append", default=[], help="endpoint for ephemeral volumes")
    flags.add_argument("--allow-node-credentials", action="store_true", help="persistent volumes use the server's own")
    flags.add_argument("--tokens-from-context", action="store_true", help="before serviceAccountTokenInSecrets")
    flags.add_argument("--check", choices=("live", "ready"), help="ask the running driver; exit 0: it is")
    flags.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    flags.add_argument("--log-format", choices=("text", "json"), default="text")
    return flags


def _check(endpoint: str, what: str) -> int:
    """For probes of a container: 0 the driver answers (`ready`: and can publish), 1 it does not."""
    import grpc

    from csi.spec import csi_pb2, csi_pb2_grpc

    with grpc.insecure_channel(endpoint, options=(("grpc.default_authority", "localhost"),)) as channel:
        try:
            answer = csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=CHECK_TIMEOUT_S)
        except grpc.RpcError as exc:
            print(f"cachefs csi: the driver does not answer ({exc.code().name})", file=sys.stderr)
            return 1
    if what == "ready" and not answer.ready.value:
        print("cachefs csi: the driver waits for the server", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 stopped by a signal, 1 the kubelet refused the registration, 2 a wrong command line."""
    # Before grpc is imported: no fork handlers, no chatter on stderr.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    args = parser().parse_args(arguments)
    _set_up_logging(args.log_level, args.log_format)
    if args.check is not None:
        return _check(args.endpoint, args.check)
    from cachefs.errors import CachefsError
    from csi.options import Policy
    from csi.service import Driver, DriverConfig

    config = DriverConfig(
        endpoint=args.endpoint,
        mode=args.mode,
        node_id=args.node_id,
        kubelet_dir=args.kubelet_dir,
        server_socket=args.server_socket,
        server_uids=frozenset(args.server_uid or (0, 65534)),
        mount_root=args.mount_root,
        state_dir=args.state_dir,
        registration_dir=args.registration_dir,
        kubelet_endpoint=args.kubelet_endpoint,
        policy=Policy(
            endpoints=tuple(args.allow_endpoint),
            node_credentials=args.allow_node_credentials,
            context_tokens=args.tokens_from_context,
        ),
    )
    try:
        driver = Driver(config)
        # Before it listens: whoever sees the socket may already send a signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: driver.stop())
        driver.start()
    except CachefsError as exc:
        print(f"cachefs csi: {exc}", file=sys.stderr)
        return exc.exit_code
    return driver.wait()


if __name__ == "__main__":
    sys.exit(main())
