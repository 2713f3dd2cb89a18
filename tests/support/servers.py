"""Server processes for tests: free loopback ports, a log that is shown on failure, death with the test run.

Start servers from the main thread: the kernel kills them (PR_SET_PDEATHSIG) when the *thread* that started
them ends, which is what makes them die with a killed pytest.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 10.0
POLL_S = 0.02

# Runs before the server in its own process, so the pid stays the server's. A parent that is already gone sends no
# signal any more: hence the look at getppid() afterwards.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that were free on 127.0.0.1 a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(condition: Callable[[], bool], *, what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Polls until `condition()` holds; AssertionError naming `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(POLL_S)


def http_status(port: int, path: str = "/", *, timeout_s: float = 5.0) -> int | None:
    """The status that 127.0.0.1:`port` answers to GET `path` with; None when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class ServerProcess:
    """One child process as a context manager; `ready()` is polled at the start, the log is shown on failure."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def launch(
        self, command: Sequence[str | Path], *, ready: Callable[[], bool], env: dict[str, str], cwd: Path
    ) -> None:
        """Starts `command` and returns when it is ready; AssertionError with the log's end when it is not."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        guarded = [sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid()), *map(str, command)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                guarded, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=cwd
            )
        try:
            end = time.monotonic() + START_DEADLINE_S
            while not ready():
                assert self._process.poll() is None, f"{command[0]} ended: {self._process.returncode}\n{self.tail()}"
                assert time.monotonic() < end, f"{command[0]} not ready in {START_DEADLINE_S} s\n{self.tail()}"
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise

    def tail(self, characters: int = 4000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: ends pause()."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ends the process by its pid: SIGTERM, then SIGKILL. Twice is fine."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def start(self) -> None:
        """Starts (again) on the same port."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None and not isinstance(error, GeneratorExit):
            print(f"--- the end of {self.log} ---\n{self.tail()}", file=sys.stderr)
