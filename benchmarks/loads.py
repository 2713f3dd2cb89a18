"""Loading safetensors as engines do: through mmap, tensor by tensor. And the synthetic models that are loaded.

The digest of a load is that of its tensors' digests in file order, so that it is the same for every order of reading.
"""

import json
import mmap
import multiprocessing
import os
import random
import struct
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

MIB = 1024 * 1024
BLOCK = MIB
SHUFFLE_SEED = 1
# Megabytes of the tensors of one layer of a model of 7 to 8 * 10^9 parameters in a quarter of its width.
LAYER_MIB = (16, 4, 4, 16, 40, 40, 40)
NORM_BYTES = 16 * 1024
HEADER_STEP = 32 * 1024


class Span(NamedTuple):
    """Where a tensor's bytes lie in its file."""

    start: int
    stop: int


def tensor_sizes(total: int) -> list[int]:
    """Bytes of the tensors of a model of `total` bytes: layers of seven matrices and two norms, the last one cut.

    Below 256 MiB matrices of an eighth, so that a small model too has many.
    """
    scale = 1 if total >= 256 * MIB else 8
    layer = [NORM_BYTES, *(size * MIB // scale for size in LAYER_MIB), NORM_BYTES]
    sizes: list[int] = []
    left = total
    while left > 0:
        for size in layer:
            if left > 0:
                sizes.append(min(size, left))
                left -= sizes[-1]
    return sizes


def write_safetensors(path: Path, total: int, seed: int) -> None:
    """A valid safetensors file with `total` random bytes of U8 tensors; the same for the same seed."""
    import numpy as np  # takes 0.1 s: readers need it not

    header: dict[str, Any] = {}
    position = 0
    for number, size in enumerate(tensor_sizes(total)):
        header[f"layers.{number:05d}.weight"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header).encode()
    # Padded as the format allows: headers of models of billions of parameters have tens of KiB, and with less the last
    # 4 KiB of a file of whole chunks would lie in two chunks.
    encoded += b" " * (-(len(encoded) + 8) % HEADER_STEP)
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in range(0, total, 16 * MIB):
            file.write(generator.bytes(min(16 * MIB, total - start)))


def write_shards(directory: Path, count: int, total: int, seed: int) -> None:
    """`count` shards of `total` bytes together, config.json and model.safetensors.index.json."""
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_safetensors(directory / name, total // count, seed + number)
        weight_map |= {f"shard{number}.{i}": name for i in range(len(tensor_sizes(total // count)))}
    (directory / "config.json").write_text(json.dumps({"architectures": ["Synthetic"]}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def spans_of(view: memoryview) -> list[Span]:
    """The tensors of a safetensors file, in file order (format: 8 bytes of length, JSON, data)."""
    length = struct.unpack("<Q", view[:8])[0]
    header = json.loads(bytes(view[8 : 8 + length]))
    offsets = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    return [Span(8 + length + start, 8 + length + stop) for start, stop in offsets]


def copied(view: memoryview, span: Span, buffer: bytearray) -> str:
    """Copies a tensor's bytes out of the map, as an engine does on their way to the device; its digest."""
    digest = xxhash.xxh3_128()
    with memoryview(buffer) as target:
        for start in range(span.start, span.stop, BLOCK):
            stop = min(start + BLOCK, span.stop)
            target[: stop - start] = view[start:stop]
            digest.update(target[: stop - start])
    return digest.hexdigest()


def _load(path: str, order: random.Random | None) -> Iterator[tuple[int, str]]:
    """(number, digest) of each tensor as it is loaded."""
    buffer = bytearray(BLOCK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
            spans = spans_of(view)
            numbers = list(range(len(spans)))
            if order:
                order.shuffle(numbers)
            for number in numbers:
                yield number, copied(view, spans[number], buffer)
    finally:
        os.close(descriptor)


def _timed(paths: list[str], order: random.Random | None) -> dict[str, Any]:
    started = time.perf_counter()
    first_tensor_seconds: float | None = None
    digests: list[str] = []
    for path in paths:
        found: dict[int, str] = {}
        for number, digest in _load(path, order):
            found[number] = digest
            if first_tensor_seconds is None:
                first_tensor_seconds = time.perf_counter() - started
        digests += [found[number] for number in sorted(found)]
    return {
        "seconds": time.perf_counter() - started,
        "first_tensor_seconds": first_tensor_seconds,
        "bytes": sum(os.stat(path).st_size for path in paths),
        "digest": xxhash.xxh3_128_hexdigest("".join(digests).encode()),
    }


def ordered(path: str) -> dict[str, Any]:
    """One file through mmap, tensors in file order."""
    return _timed([path], None)


def shuffled(path: str) -> dict[str, Any]:
    """One file through mmap, tensors in an order that is the same for everybody and not the file's."""
    return _timed([path], random.Random(SHUFFLE_SEED))


def shards(directory: str) -> dict[str, Any]:
    """All shards of a model, one after the other, after its small files: what an engine's start does."""
    started = time.perf_counter()
    for name in ("config.json", "model.safetensors.index.json"):
        (Path(directory) / name).read_bytes()
    small_seconds = time.perf_counter() - started
    result = _timed([str(path) for path in sorted(Path(directory).glob("*.safetensors"))], None)
    result["seconds"] += small_seconds
    result["first_tensor_seconds"] += small_seconds
    return result


def _one_of_many(path: str, barrier: Barrier, answer: Connection) -> None:
    buffer, digest = bytearray(BLOCK), xxhash.xxh3_128()
    barrier.wait()
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    with memoryview(buffer) as view:
        while count := os.readv(descriptor, [view]):
            digest.update(view[:count])
    # CLOCK_MONOTONIC is one clock for all processes: starts and ends can be compared.
    answer.send((started, time.perf_counter(), digest.hexdigest()))


def parallel(directory: str) -> dict[str, Any]:
    """One process for each shard, all at once, each sequentially; from the first start to the last end."""
    paths = sorted(str(path) for path in Path(directory).glob("*.safetensors"))
    barrier = multiprocessing.Barrier(len(paths))
    pipes = [multiprocessing.Pipe(duplex=False) for _ in paths]
    processes = [
        multiprocessing.Process(target=_one_of_many, args=(path, barrier, pipe[1]), daemon=True)
        for path, pipe in zip(paths, pipes, strict=True)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        # A reader that dies is an EOFError in recv() and no wait for ever.
        pipe[1].close()
    answers = [pipe[0].recv() for pipe in pipes]
    for process in processes:
        process.join()
    return {
        "seconds": max(answer[1] for answer in answers) - min(answer[0] for answer in answers),
        "bytes": sum(os.stat(path).st_size for path in paths),
        "digest": xxhash.xxh3_128_hexdigest("".join(answer[2] for answer in answers).encode()),
    }
