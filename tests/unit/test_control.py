"""The control socket: answers, errors, bounds, and clients that misbehave."""

import contextlib
import functools
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs import client, control
from cachefs.client import RemoteError, ServerGone
from cachefs.control import Caller, Method, Params, Progress
from cachefs.errors import NotFound

DEADLINE_S = 60


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="cachefs-c-") as directory:
        yield Path(directory) / "run"


async def echo(params: Params, progress: Progress, caller: Caller) -> Any:
    return {"params": dict(params), "uid": caller.uid, "pid": caller.pid}


def serving(runtime_dir: Path, test: Callable[[], Awaitable[None]], **methods: Method) -> None:
    """Run `test` beside a control server that knows `methods` and echo."""

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(functools.partial(control.serve, runtime_dir, {"echo": echo, **methods}))
                await test()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def call(runtime_dir: Path, method: str, params: dict[str, Any] | None = None, **more: Any) -> Any:
    return await trio.to_thread.run_sync(functools.partial(client.call, runtime_dir, method, params, **more))


async def raw(runtime_dir: Path, data: bytes) -> bytes:
    """Everything that the server answers to these bytes."""
    async with await trio.open_unix_socket(str(runtime_dir / "control.sock")) as stream:
        with contextlib.suppress(trio.BrokenResourceError):  # it answers and hangs up before it has read all
            await stream.send_all(data)
        answer = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async for part in stream:
                answer += part
        return answer


def test_a_request_is_answered_and_the_kernel_says_who_asks(runtime_dir: Path) -> None:
    async def test() -> None:
        answer = await call(runtime_dir, "echo", {"a": [1, "ü"]})
        assert answer == {"params": {"a": [1, "ü"]}, "uid": os.getuid(), "pid": os.getpid()}
        assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700

    serving(runtime_dir, test)
    assert not (runtime_dir / "control.sock").exists()
    with pytest.raises(ServerGone):
        client.call(runtime_dir, "echo")


def test_progress_comes_before_the_result(runtime_dir: Path) -> None:
    async def work(params: Params, progress: Progress, caller: Caller) -> Any:
        for number in range(100):
            progress({"done_bytes": number, "total_bytes": 100})
            await trio.lowlevel.checkpoint()
        return "done"

    async def test() -> None:
        seen: list[dict[str, Any]] = []
        assert await call(runtime_dir, "work", on_progress=seen.append) == "done"
        assert seen[-1] == {"done_bytes": 99, "total_bytes": 100}

    serving(runtime_dir, test, work=work)


def test_an_error_keeps_its_class_message_and_exit_code(runtime_dir: Path) -> None:
    async def fail(params: Params, progress: Progress, caller: Caller) -> Any:
        raise NotFound("no such thing")

    async def test() -> None:
        with pytest.raises(RemoteError, match="no such thing") as caught:
            await call(runtime_dir, "fail")
        assert (caught.value.kind, caught.value.exit_code) == ("NotFound", 1)

    serving(runtime_dir, test, fail=fail)


def test_a_bug_in_a_request_does_not_end_the_server(runtime_dir: Path) -> None:
    async def bug(params: Params, progress: Progress, caller: Caller) -> Any:
        raise ZeroDivisionError

    async def test() -> None:
        with pytest.raises(RemoteError, match="ZeroDivisionError") as caught:
            await call(runtime_dir, "bug")
        assert caught.value.exit_code == 1
        await call(runtime_dir, "echo")

    serving(runtime_dir, test, bug=bug)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\n",
        b"[]\n",
        b'{"method": 5}\n',
        b'{"method": ["echo"]}\n',
        b'{"method": "unknown"}\n',
        b'{"method": "echo", "params": []}\n',
        b'{"params": {}}\n',
        b"\xff\xfe\n",
        b'{"method": "echo", "params": {"x": "' + b"y" * control.REQUEST_BYTES_MAX + b'"}}\n',
        b"x" * (2 * control.REQUEST_BYTES_MAX),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_request_is_refused_and_the_server_lives(runtime_dir: Path, data: bytes) -> None:
    async def test() -> None:
        answer = await raw(runtime_dir, data)
        # With more unread than the socket holds, the answer may be lost with the connection.
        assert answer == b"" or b'"exit_code":2' in answer
        assert answer or len(data) > control.REQUEST_BYTES_MAX
        await call(runtime_dir, "echo")

    serving(runtime_dir, test)


def test_a_client_that_goes_away_cancels_its_request(runtime_dir: Path) -> None:
    started, cancelled = trio.Event(), trio.Event()

    async def wait(params: Params, progress: Progress, caller: Caller) -> Any:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async def test() -> None:
        async with await trio.open_unix_socket(str(runtime_dir / "control.sock")) as stream:
            await stream.send_all(b'{"method": "wait"}\n')
            await started.wait()
        await cancelled.wait()
        await call(runtime_dir, "echo")

    serving(runtime_dir, test, wait=wait)


def test_clients_that_say_or_take_nothing_hold_nobody_up(runtime_dir: Path) -> None:
    asked = trio.Event()

    async def much(params: Params, progress: Progress, caller: Caller) -> Any:
        asked.set()
        return "x" * 50_000_000

    async def test() -> None:
        path = str(runtime_dir / "control.sock")
        silent = [await trio.open_unix_socket(path) for _ in range(20)]
        lazy = await trio.open_unix_socket(path)
        await lazy.send_all(b'{"method": "much"}\n')
        await asked.wait()
        with trio.fail_after(20):
            await call(runtime_dir, "echo")
        for stream in (*silent, lazy):
            await stream.aclose()

    serving(runtime_dir, test, much=much)


def test_more_clients_than_the_bound_are_told(runtime_dir: Path) -> None:
    async def test() -> None:
        path = str(runtime_dir / "control.sock")
        streams = [await trio.open_unix_socket(path) for _ in range(control.CLIENTS_MAX)]
        answer = await raw(runtime_dir, b"")
        assert b"try again" in answer
        for stream in streams:
            await stream.aclose()
        while b"try again" in await raw(runtime_dir, b'{"method": "echo"}\n'):
            await trio.sleep(0.01)

    serving(runtime_dir, test)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_is_refused(runtime_dir: Path) -> None:
    script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(4096))"

    async def test() -> None:
        path = runtime_dir / "control.sock"
        for each in (runtime_dir.parent, runtime_dir):
            each.chmod(0o755)
        path.chmod(0o777)
        command = [sys.executable, "-I", "-S", "-c", script, str(path)]
        done = await trio.run_process(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command], capture_stdout=True
        )
        assert b"root and of its own user" in done.stdout

    if subprocess.run(["setpriv", "--reuid=65534", sys.executable, "-c", ""], check=False).returncode:
        pytest.skip("user 65534 may not run this interpreter")
    serving(runtime_dir, test)


def test_a_socket_of_a_dead_server_is_replaced(runtime_dir: Path) -> None:
    runtime_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime_dir / "control.sock"))

    async def test() -> None:
        await call(runtime_dir, "echo")

    serving(runtime_dir, test)
