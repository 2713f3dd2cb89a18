"""The references for cold reads, without FUSE and without a reader.

`python -m benchmarks.loop ENDPOINT_URL DIRECTORY PREFIX KIND`: prints JSON. KIND `loop`: GET, digest, store, commit,
as the cache does it; what is lost from here to a cold read through the mount is what serving costs. `gets`: only the
GETs: what the link gives. Before either, one direct GET of 4 KiB: the least that a first byte can take.
"""

import json
import os
import queue
import resource
import sys
import threading
import time
from pathlib import Path

import lmdb
import xxhash

from cachefs.buffers import Buffer
from cachefs.chunk import CHUNK_BYTES, ObjectId, chunk_count, chunk_length
from cachefs.config import VolumeConfig
from cachefs.pace import LIMIT_MAX
from cachefs.store import Store
from cachefs.store.open import open_store

from .harness import BUCKET

CONNECTIONS = int(LIMIT_MAX)
"""As many GETs at a time as the cache has: on a link that gives each its own rate, fewer would be an easy reference."""

COMMIT_CHUNKS = 16


class Loop:
    """Fetches one object into a sparse file with CONNECTIONS threads; commits every COMMIT_CHUNKS chunks."""

    def __init__(self, store: Store, object_id: ObjectId, work: Path, stores: bool = True) -> None:
        self._store = store
        self._object_id = object_id
        self._blob = work / "blob"
        self._stores = stores
        self._environment = lmdb.open(str(work / "index"), map_size=1 << 30, metasync=False)
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, bytes] | BaseException] = queue.SimpleQueue()
        # The cache's own, used again for every chunk; as there, one has its memory before the first use.
        buffers = [Buffer(CHUNK_BYTES) for _ in range(CONNECTIONS)]
        buffers[0].populate()
        self._buffers = [buffer.view for buffer in buffers]

    def run(self) -> None:
        count = chunk_count(self._object_id.size)
        with self._blob.open("wb") as file:
            file.truncate(self._object_id.size)
        for index in range(count):
            self._todo.put(index)
        threads = [threading.Thread(target=self._fetch, args=(buffer,), daemon=True) for buffer in self._buffers]
        for thread in threads:
            thread.start()
        self._commit(count)

    def _fetch(self, buffer: memoryview) -> None:
        direct = os.open(self._blob, os.O_WRONLY | os.O_DIRECT)
        buffered = os.open(self._blob, os.O_WRONLY)
        try:
            while True:
                index = self._todo.get_nowait()
                length = chunk_length(self._object_id.size, index)
                start = index * CHUNK_BYTES
                self._store.fetch_into(buffer[:length], self._object_id, start, start + length, lambda count: None)
                if not self._stores:
                    self._done.put((index, b""))
                    continue
                digest = xxhash.xxh3_128_digest(buffer[:length])
                aligned = length // 4096 * 4096
                os.pwrite(direct, buffer[:aligned], start)
                if aligned < length:
                    os.pwrite(buffered, buffer[aligned:length], start + aligned)
                self._done.put((index, digest))
        except queue.Empty:
            return
        except BaseException as exc:
            self._done.put(exc)

    def _commit(self, count: int) -> None:
        blob = os.open(self._blob, os.O_RDWR)
        batch: list[tuple[int, bytes]] = []
        for number in range(1, count + 1):
            done = self._done.get()
            if isinstance(done, BaseException):
                raise done
            batch.append(done)
            if not self._stores:
                continue
            if len(batch) == COMMIT_CHUNKS or number == count:
                os.fdatasync(blob)
                with self._environment.begin(write=True) as transaction:
                    for index, digest in batch:
                        transaction.put(index.to_bytes(8, "big"), digest)
                batch.clear()


def first_byte(store: Store, object_id: ObjectId) -> float:
    """Seconds of one GET of 4 KiB on a connection that is open."""
    buffer = memoryview(bytearray(4096))
    store.fetch_into(buffer, object_id, 4096, 8192, lambda count: None)
    started = time.perf_counter()
    store.fetch_into(buffer, object_id, 0, 4096, lambda count: None)
    return time.perf_counter() - started


def main(endpoint_url: str, work: Path, prefix: str, kind: str) -> dict[str, float]:
    volume = VolumeConfig(name="loop", source=f"s3://{BUCKET}/{prefix}", endpoint_url=endpoint_url, region="us-east-1")
    store = open_store(volume, get_timeout_s=30, list_timeout_s=30)
    info = max((info for page in store.list_directory("") for info in page.objects), key=lambda info: info.size)
    object_id = store.object_id(info)
    first_byte_seconds = first_byte(store, object_id)
    loop = Loop(store, object_id, work, stores=kind == "loop")
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    loop.run()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "bytes": info.size,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "rss_mib": after.ru_maxrss / 1024,
        "first_byte_seconds": first_byte_seconds,
    }


if __name__ == "__main__":
    json.dump(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]), sys.stdout)
