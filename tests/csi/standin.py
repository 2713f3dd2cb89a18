"""A stand-in for the server: the contract of csi/server.py over real directories of a tmpfs, for tests of the driver.

`python -m tests.csi.standin --socket S --root TMPFS --state FILE --calls FILE`. What a source does is in its name:
s3://missing/..., s3://denied/... (refused unless aws_access_key_id is AKIAGOOD), s3://down/..., s3://slow/... (waits
until TMPFS/../release exists), s3://echo/... (an error that repeats the secret), s3://escape/... (a root outside).
"""

import argparse
import hashlib
import json
import os
import socketserver
import threading
import time
from pathlib import Path
from typing import Any

MODEL = "model.safetensors"
SLOW_DEADLINE_S = 60.0


class ServerError(Exception):
    """An error answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Views:
    """Published keys (kept over restarts) and their credentials (not kept)."""

    def __init__(self, root: Path, state: Path) -> None:
        self._root = root
        self._state = state
        self._mutex = threading.Lock()
        self._keys: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.exists() else {}
        self._credentials: dict[str, Any] = {}

    def volume_publish(self, params: dict[str, Any]) -> dict[str, Any]:
        key, source = params["key"], params["source"]
        with self._mutex:
            known = self._keys.get(key)
            self._credentials[key] = params["credentials"]
            if known is not None:
                return {"root": known["root"]}
        self._behave(source, params["credentials"])
        names = ("source", "endpoint_url", "region", "include", "exclude", "layout", "principal", "isolation")
        view = hashlib.sha256(json.dumps([params[name] for name in names]).encode()).hexdigest()[:16]
        with self._mutex:
            directory = self._root / view / params["layout"]
            directory.mkdir(parents=True, exist_ok=True)
            (directory / MODEL).write_text(source)
            self._keys[key] = {"root": view}
            self._save()
        return {"root": "../../etc" if "//escape/" in source else view}

    def _behave(self, source: str, credentials: dict[str, Any]) -> None:
        if source.startswith("s3://missing/"):
            raise ServerError("NotFound", "no such prefix")
        if source.startswith("s3://denied/") and credentials["values"].get("aws_access_key_id") != "AKIAGOOD":
            raise ServerError("AccessDenied", "the credentials may not list it")
        if source.startswith("s3://down/"):
            raise ServerError("StoreUnavailable", "the store does not answer")
        if source.startswith("s3://echo/"):
            raise ServerError("UsageError", "bad credentials: " + json.dumps(credentials))
        deadline_s = time.monotonic() + SLOW_DEADLINE_S
        while source.startswith("s3://slow/") and not (self._root.parent / "release").exists():
            if time.monotonic() > deadline_s:
                raise ServerError("StoreTimeout", "nobody released it")
            time.sleep(0.05)

    def volume_unpublish(self, params: dict[str, Any]) -> dict[str, Any]:
        with self._mutex:
            self._credentials.pop(params["key"], None)
            if self._keys.pop(params["key"], None) is not None:
                self._save()
        return {}

    def volume_credentials(self, params: dict[str, Any]) -> dict[str, Any]:
        with self._mutex:
            self._known(params["key"])
            self._credentials[params["key"]] = params["credentials"]
        return {}

    def volume_stats(self, params: dict[str, Any]) -> dict[str, Any]:
        with self._mutex:
            self._known(params["key"])
            has_credentials = params["key"] in self._credentials
        condition = {"abnormal": False, "message": "", "reason": "healthy"}
        if not has_credentials:
            condition = {"abnormal": True, "message": "waiting for credentials", "reason": "credentials"}
        if (self._root.parent / "offline").exists():
            condition = {"abnormal": True, "message": "the store is offline", "reason": "offline"}
        return {
            "bytes_total": 1000,
            "bytes_local": 250,
            "objects_total": 4,
            "objects_sealed": 1,
            "condition": condition,
        }

    def probe(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"ready": not (self._root.parent / "starting").exists(), "version": "stand-in"}

    def keys(self, params: dict[str, Any]) -> dict[str, Any]:
        """Not in the contract: for assertions."""
        with self._mutex:
            return {"keys": sorted(self._keys), "credentials": dict(self._credentials)}

    def _known(self, key: str) -> None:
        if key not in self._keys:
            raise ServerError("NotFound", "no such key")

    def _save(self) -> None:
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps(self._keys))
        new.rename(self._state)


METHODS = ("volume_publish", "volume_unpublish", "volume_credentials", "volume_stats", "probe", "keys")


def make_handler(views: Views, calls: Path) -> type[socketserver.StreamRequestHandler]:
    """The handler class of one server."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if not line:
                return
            request = json.loads(line)
            method, params = request["method"], request["params"]
            with calls.open("a") as file:
                file.write(json.dumps([method, params.get("key", "")]) + "\n")
            try:
                if method not in METHODS:
                    raise ServerError("UsageError", "no such method")
                answer = {"result": getattr(views, method)(params)}
            except ServerError as exc:
                answer = {"error": {"type": exc.kind, "message": str(exc), "exit_code": 1}}
            try:
                self.wfile.write(b'{"progress": {"step": 1}}\n')
                self.wfile.write(json.dumps(answer).encode() + b"\n")
            except OSError:
                return  # the driver was killed while it waited

    return Handler


class Server(socketserver.ThreadingUnixStreamServer):
    """Many connections at once."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Until a signal."""
    parser = argparse.ArgumentParser()
    for name in ("--socket", "--root", "--state", "--calls"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--uid", type=int, default=0)
    args = parser.parse_args()
    args.socket.unlink(missing_ok=True)
    if args.uid:
        # Before listen(): SO_PEERCRED tells who listened.
        os.setuid(args.uid)
    with Server(str(args.socket), make_handler(Views(args.root, args.state), args.calls)) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
