"""The API of a running server: requests over a unix socket, one per connection (see client.py for the form).

The socket lies in a directory that only its owner may enter (0700), and the kernel says who connects
(SO_PEERCRED): root or the server's own user, nobody else. A client that goes away cancels its request; one that
does not take its answer is dropped; neither holds up another one.
"""

import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from cachefs.errors import CachefsError, UsageError, WorkFailed
from cachefs.kernel.locks import SOCKET_NAME

REQUEST_BYTES_MAX = 1024 * 1024
REQUEST_DEADLINE_S = 30.0
SEND_DEADLINE_S = 30.0
PROGRESS_INTERVAL_S = 0.2
CLIENTS_MAX = 64

log = logging.getLogger(__name__)

Params = Mapping[str, Any]
Progress = Callable[[dict[str, Any]], None]


class Caller(msgspec.Struct, frozen=True):
    """Who asks, as the kernel says."""

    pid: int
    uid: int
    gid: int


Method = Callable[[Params, Progress, Caller], Awaitable[Any]]


class _Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream, methods: Mapping[str, Method], server_uid: int) -> None:
        self._stream = stream
        self._methods = methods
        self._server_uid = server_uid

    async def run(self) -> None:
        caller = self._caller()
        if caller.uid not in (0, self._server_uid):
            await self._send_error(UsageError("this server takes requests of root and of its own user only"))
            return
        try:
            method, params = await self._request()
        except CachefsError as exc:
            await self._send_error(exc)
            return
        try:
            result = await self._work(method, params, caller)
        except CachefsError as exc:
            await self._send_error(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as exc:  # our own bug: the server lives, the caller is told, the log has the traceback
            log.exception("the request %s failed", method)
            await self._send_error(WorkFailed(f"{method} failed inside the server ({type(exc).__name__}): see its log"))
        else:
            await self._send({"result": result})

    def _caller(self) -> Caller:
        ucred = self._stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return Caller(*struct.unpack("3i", ucred))

    async def _request(self) -> tuple[str, Params]:
        data = bytearray()
        with trio.move_on_after(REQUEST_DEADLINE_S) as deadline:
            while b"\n" not in data:
                part = await self._stream.receive_some(65536)
                if not part:
                    raise trio.BrokenResourceError
                data += part
                if len(data) > REQUEST_BYTES_MAX:
                    raise UsageError("the request is larger than 1 MiB")
        if deadline.cancelled_caught:
            raise UsageError(f"the request did not come within {REQUEST_DEADLINE_S:.0f} s")
        try:
            request = msgspec.json.decode(data.split(b"\n", 1)[0])
            method, params = request["method"], request.get("params", {})
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as exc:
            raise UsageError('the request is no line like {"method": "status", "params": {}}') from exc
        if not isinstance(method, str) or method not in self._methods or not isinstance(params, dict):
            raise UsageError(f"this server (another version?) knows no request {method!r}")
        return method, params

    async def _work(self, method: str, params: Params, caller: Caller) -> Any:
        """Run the method while watching the client: when it goes away, its request is cancelled."""
        latest: list[dict[str, Any]] = []
        outcome: list[Any] = []
        failure: list[Exception] = []
        done = trio.Event()
        watching = trio.CancelScope()

        async def watch(everything: trio.CancelScope) -> None:
            with watching:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while await self._stream.receive_some(4096):
                        pass  # nothing more is expected
                everything.cancel()

        async def report() -> None:
            # Never cancelled in the middle of a line: it ends by itself when the work is done.
            while not done.is_set():
                with trio.move_on_after(PROGRESS_INTERVAL_S):
                    await done.wait()
                if latest:
                    await self._send({"progress": latest.pop()})

        def progress(state: dict[str, Any]) -> None:
            latest[:] = [state]  # a slow client misses some, the work never waits for it

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            nursery.start_soon(report)
            try:  # caught in here: the nursery would wrap it into a group
                outcome.append(await self._methods[method](params, progress, caller))
            except Exception as exc:
                failure.append(exc)
            done.set()
            watching.cancel()
        if failure:
            raise failure[0]
        if not outcome:
            raise trio.BrokenResourceError  # the client went away first
        return outcome[0]

    async def _send_error(self, error: CachefsError) -> None:
        await self._send({"error": {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}})

    async def _send(self, answer: dict[str, Any]) -> None:
        data = msgspec.json.encode(answer, enc_hook=str) + b"\n"
        with trio.move_on_after(SEND_DEADLINE_S + len(data) / 1e6) as deadline:
            await self._stream.send_all(data)
        if deadline.cancelled_caught:
            raise trio.BrokenResourceError


@contextlib.asynccontextmanager
async def _listening(path: Path) -> AsyncIterator[trio.SocketListener]:
    """A unix socket at `path`. The caller holds the state directory's lock: what lies there already is dead."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    try:
        await sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(CLIENTS_MAX)
        inode = path.stat().st_ino
        try:
            yield trio.SocketListener(sock)
        finally:
            # A server that was handed our place may have its own socket there by now.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:
                    path.unlink()
    finally:
        sock.close()


async def serve(
    runtime_dir: Path,
    methods: Mapping[str, Method],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled. The socket is there when `task_status` says started."""
    clients = 0
    server_uid = os.getuid()

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal clients
        client = _Client(stream, methods, server_uid)
        clients += 1
        try:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    if clients > CLIENTS_MAX:
                        await client._send_error(WorkFailed(f"{CLIENTS_MAX} requests are being worked on: try again"))
                    else:
                        await client.run()
        finally:
            clients -= 1

    async with _listening(runtime_dir / SOCKET_NAME) as listener, trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handle, [listener])
        task_status.started()
