"""One way of reading one file, in a process of its own: `python -m benchmarks.workloads KIND PATH` prints JSON.

Interpreter start and imports are outside the clock (`began` in the answer: its start, by perf_counter()). Kinds:
`sequential` (also digests: for cold reads, where all bytes must be compared), `plain` (sequential, nothing but
reading), `mmap`, `four` (four processes, each the whole file), `random` (4 KiB reads at seeded offsets), `last` (the
last 4 KiB). Those of benchmarks/loads.py: `ordered`, `shuffled`, `parallel`, `shards`; `minilm`; `gguf`,
`gguf-large`.
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import xxhash

from . import gguf, load, loads

MIB = 1024 * 1024
BLOCK = MIB
RANDOM_READS = 65536
READERS = 4


def sequential(path: str) -> dict[str, Any]:
    """1 MiB reads from start to end; digest, time of the first 4 KiB."""
    buffer, digest, total = bytearray(BLOCK), xxhash.xxh3_128(), 0
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    first = os.preadv(descriptor, [memoryview(buffer)[:4096]], 0)
    first_byte_seconds = time.perf_counter() - started
    assert first > 0
    with memoryview(buffer) as view:
        while count := os.readv(descriptor, [view]):
            digest.update(view[:count])
            total += count
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return {"seconds": seconds, "bytes": total, "first_byte_seconds": first_byte_seconds, "digest": digest.hexdigest()}


def last(path: str) -> dict[str, Any]:
    """Open, and the last 4 KiB of an object that nobody has read."""
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    data = os.pread(descriptor, 4096, os.fstat(descriptor).st_size - 4096)
    seconds = time.perf_counter() - started
    os.close(descriptor)
    digest = xxhash.xxh3_128_hexdigest(data)
    return {"seconds": seconds, "bytes": len(data), "first_byte_seconds": seconds, "digest": digest}


def plain(path: str) -> dict[str, Any]:
    buffer, total = bytearray(BLOCK), 0
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    while count := os.readv(descriptor, [buffer]):
        total += count
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return {"seconds": seconds, "bytes": total}


def mapped(path: str) -> dict[str, Any]:
    """Copies the file out of a map, 1 MiB at a time, in file order: every page is touched."""
    buffer = bytearray(BLOCK)
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            buffer[: stop - start] = view[start:stop]
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return {"seconds": seconds, "bytes": size}


def scattered(path: str) -> dict[str, Any]:
    """4 KiB at page-aligned offsets in an order that is the same for everybody."""
    generator = random.Random(0)
    size = os.stat(path).st_size
    offsets = [generator.randrange(size // 4096) * 4096 for _ in range(RANDOM_READS)]
    buffer = [bytearray(4096)]
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    for offset in offsets:
        os.preadv(descriptor, buffer, offset)
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return {"seconds": seconds, "bytes": RANDOM_READS * 4096}


def _one_of_four(path: str, barrier: Barrier, answer: Connection) -> None:
    barrier.wait()
    started = time.perf_counter()
    plain(path)
    # CLOCK_MONOTONIC is one clock for all processes: starts and ends can be compared.
    answer.send((started, time.perf_counter()))


def four(path: str) -> dict[str, Any]:
    """Four readers at once; the time from the first start to the last end."""
    barrier = multiprocessing.Barrier(READERS)
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(READERS)]
    processes = [multiprocessing.Process(target=_one_of_four, args=(path, barrier, pipe[1])) for pipe in pipes]
    for process in processes:
        process.start()
    times = [pipe[0].recv() for pipe in pipes]
    for process in processes:
        process.join()
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    return {"seconds": seconds, "bytes": READERS * os.stat(path).st_size}


def minilm(directory: str) -> dict[str, Any]:
    """The model's directory as benchmarks/load.py loads it."""
    result = load.load(Path(directory))
    digest = hashlib.sha256(json.dumps(result["digests"], sort_keys=True).encode()).hexdigest()
    names = ("first_byte_seconds", "first_tensor_seconds", "bytes")
    return {name: result[name] for name in names} | {"seconds": result["load_seconds"], "digest": digest}


KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "sequential": sequential,
    "plain": plain,
    "mmap": mapped,
    "four": four,
    "random": scattered,
    "last": last,
    "ordered": loads.ordered,
    "shuffled": loads.shuffled,
    "parallel": loads.parallel,
    "shards": loads.shards,
    "minilm": minilm,
    "gguf": gguf.serve,
    "gguf-large": gguf.serve,
}


def run(kind: str, path: str, timeout_s: float = 900.0) -> dict[str, Any]:
    """In a fresh process."""
    command = [sys.executable, "-m", "benchmarks.workloads", kind, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} of {path}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    began = time.perf_counter()
    json.dump(KINDS[sys.argv[1]](sys.argv[2]) | {"began": began}, sys.stdout)
