"""A reader for the kill tests: reads objects in order and says what it read and how long each read took.

argv: one JSON object: `paths`, `how` ("read", "mmap", "safetensors"), `board` (see killing.Board), `slot`.
Prints one JSON object: `sums` (sha256 of each path) and `reads` (start and end, CLOCK_MONOTONIC seconds, of each
read that took longer than SLOW_S). It waits at the end of each object until that object's kills are done.
"""

import hashlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator

PIECE_BYTES = 1024 * 1024
SLOW_S = 0.01


def pieces_by_read(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def pieces_by_mmap(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for offset in range(0, len(view), PIECE_BYTES):  # after the close, as safetensors does
        yield view[offset : offset + PIECE_BYTES]


def pieces_by_safetensors(path: str) -> Iterator[bytes]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            yield file.get_tensor(name).tobytes()


def main() -> None:
    task = json.loads(sys.argv[1])
    how: Callable[[str], Iterator[bytes]] = {
        "read": pieces_by_read,
        "mmap": pieces_by_mmap,
        "safetensors": pieces_by_safetensors,
    }[task["how"]]
    with open(task["board"], "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    sums, reads = [], []
    total = 0
    for number, path in enumerate(task["paths"]):
        digest = hashlib.sha256()
        start_s = time.monotonic()
        for piece in how(path):
            end_s = time.monotonic()
            if end_s - start_s > SLOW_S:
                reads.append((start_s, end_s))
            digest.update(piece)
            total += len(piece)
            words[2 + task["slot"]] = total
            start_s = time.monotonic()
        sums.append(digest.hexdigest())
        while words[0] <= number:
            if os.getppid() == 1:
                sys.exit("the test is gone")
            time.sleep(0.002)
    print(json.dumps({"sums": sums, "reads": reads}))


if __name__ == "__main__":
    main()
