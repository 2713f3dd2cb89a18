"""The client of the control socket: blocking, standard library and msgspec only.

One request per connection: a line of JSON `{"method", "params"}`; answers are lines `{"progress": ...}` (any
number) and then `{"result": ...}` or `{"error": {"type", "message", "exit_code"}}`.
"""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cachefs.errors import CachefsError
from cachefs.kernel.locks import SOCKET_NAME

ANSWER_BYTES_MAX = 256 * 1024 * 1024
"""A listing of 1,000,000 objects is about 150 MB of JSON."""


class ServerGone(CachefsError):
    """Nothing answers on the control socket, or the server went away in the middle of an answer."""


class RemoteError(CachefsError):
    """The server's own error, with its class name and exit code."""

    def __init__(self, message: str, kind: str, exit_code: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.exit_code = exit_code


def call(
    runtime_dir: Path,
    method: str,
    params: Mapping[str, Any] | None = None,
    *,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    timeout_s: float | None = 60.0,
) -> Any:
    """Ask the server of `runtime_dir`. `timeout_s`: most time between two lines of the answer, None: no bound.

    Raises ServerGone when there is no server, RemoteError with what the server said.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(runtime_dir / SOCKET_NAME))
            sock.sendall(msgspec.json.encode({"method": method, "params": dict(params or {})}) + b"\n")
            with sock.makefile("rb") as lines:
                while line := lines.readline(ANSWER_BYTES_MAX):
                    answer = msgspec.json.decode(line)
                    if "progress" in answer:
                        if on_progress is not None:
                            on_progress(answer["progress"])
                        continue
                    if "error" in answer:
                        error = answer["error"]
                        raise RemoteError(error["message"], error["type"], error["exit_code"])
                    return answer["result"]
        except TimeoutError as exc:
            raise ServerGone(f"the server of {runtime_dir} does not answer within {timeout_s:.0f} s") from exc
        except (OSError, msgspec.DecodeError) as exc:
            raise ServerGone(f"no server answers at {runtime_dir / SOCKET_NAME} ({exc})") from exc
    raise ServerGone(f"the server of {runtime_dir} went away before it answered")
