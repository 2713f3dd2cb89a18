"""A store in memory that keeps to the Store protocol, counts requests, fails when told to and holds requests at a gate.

    store = MemoryStore({"a.bin": b"abc"})
    store.put("a.bin", b"abcd")                     # a new version
    store.list_errors.append(StoreUnavailable("503"))  # the next LIST raises it; None lets one through
    store.get_errors.append(IntegrityError("short"))
    with store.lists.held():                        # LISTs wait here, `store.lists.waiting` counts them
        ...

Thread-safe: the server calls it from many threads.
"""

import contextlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping

from cachefs.chunk import ObjectId
from cachefs.errors import CachefsError, NotFound, ObjectChanged, StoreUnavailable
from cachefs.store import ListPage, ObjectInfo

PROGRESS_BYTES = 1024 * 1024
HOLD_S_MAX = 60.0
"""A request that is held for longer fails: a broken test ends instead of hanging."""


class Gate:
    """Open at first. While it is closed, requests wait in pass_through()."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self.waiting = 0

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.close()
        try:
            yield
        finally:
            self.open()

    def pass_through(self) -> None:
        if self._open.is_set():
            return
        with self._lock:
            self.waiting += 1
        try:
            if not self._open.wait(HOLD_S_MAX):
                raise StoreUnavailable("held at the gate for too long")
        finally:
            with self._lock:
                self.waiting -= 1


class MemoryStore:
    """Objects by path (relative to the prefix): bytes and a version. `page_keys` keys or prefixes per LIST page."""

    def __init__(
        self,
        objects: Mapping[str, bytes] | None = None,
        *,
        page_keys: int = 1000,
        prefix: str = "prefix",
        bucket: str = "memory",
    ) -> None:
        self.identity = f"memory://{bucket}"
        self.url = f"memory://{bucket}/{prefix}"
        self.page_keys = page_keys
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._versions = itertools.count(1)
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.modified_s: dict[str, float] = {}
        self.lists = Gate()
        self.gets = Gate()
        self.list_errors: deque[CachefsError | None] = deque()
        """Popped by each LIST request (page): raised unless None."""
        self.get_errors: deque[CachefsError | None] = deque()
        """Popped by each GET before its first byte: raised unless None."""
        self.get_cuts: deque[int | None] = deque()
        """Popped by each GET: after so many bytes it raises StoreUnavailable; None: the whole body."""
        self.unavailable = False
        """Every request raises StoreUnavailable."""
        self.list_count = 0
        self.probe_count = 0
        self.get_count = 0
        self.bytes_sent = 0
        self.list_counts: Counter[str] = Counter()
        """LIST requests by directory."""
        self.get_counts: Counter[tuple[str, int, int]] = Counter()
        """Successful GETs by (path, start, stop)."""
        self.closed = False
        for path, data in (objects or {}).items():
            self.put(path, data)

    def put(self, path: str, data: bytes) -> str:
        """Write an object (a new version each time, even of equal bytes); returns the version."""
        with self._lock:
            version = f'"v{next(self._versions)}"'
            self.objects[path] = (data, version)
            self.modified_s[path] = 1_700_000_000.0 + len(self.modified_s)
            return version

    def put_many(self, paths: Iterator[str] | list[str], data: bytes = b"") -> None:
        """Many objects with the same bytes (one bytes object, so a million keys cost little)."""
        for path in paths:
            self.put(path, data)

    def delete(self, path: str) -> None:
        with self._lock:
            del self.objects[path]

    def probe(self) -> None:
        with self._lock:
            self.probe_count += 1
        if self.unavailable:
            raise StoreUnavailable(f"{self.url} does not answer")
        if not self.objects:
            raise NotFound(f"{self.url} has no object")

    def list_directory(self, directory: str) -> Iterator[ListPage]:
        base = f"{directory}/" if directory else ""
        with self._lock:
            names = self._names(base)
        for start in range(0, max(1, len(names)), self.page_keys):
            self._begin_list(directory)
            page = names[start : start + self.page_keys]
            yield ListPage(
                objects=tuple(item for item in page if isinstance(item, ObjectInfo)),
                prefixes=tuple(item for item in page if isinstance(item, str)),
            )

    def _names(self, base: str) -> list[ObjectInfo | str]:
        """Objects and prefixes under `base`, prefixes as str, in the order of their first key's writing."""
        found: dict[str, ObjectInfo | str] = {}
        for path, (data, version) in self.objects.items():
            if not path.startswith(base):
                continue
            name, slash, _ = path[len(base) :].partition("/")
            if slash:
                found[name + "/"] = name
            elif name:
                found[name] = ObjectInfo(path, len(data), version, self.modified_s[path])
        return list(found.values())

    def _begin_list(self, directory: str) -> None:
        with self._lock:
            self.list_count += 1
            self.list_counts[directory] += 1
        self.lists.pass_through()
        with self._lock:
            error = self.list_errors.popleft() if self.list_errors else None
        if self.unavailable:
            raise StoreUnavailable(f"{self.url} does not answer")
        if error is not None:
            raise error

    def object_id(self, info: ObjectInfo) -> ObjectId:
        return ObjectId(self.identity, self._prefix + info.path, info.size, info.version)

    def id_of(self, path: str) -> ObjectId:
        """The ObjectId of the object as it is now."""
        data, version = self.objects[path]
        return self.object_id(ObjectInfo(path, len(data), version, self.modified_s[path]))

    def fetch_into(
        self,
        buffer: memoryview,
        object_id: ObjectId,
        start: int,
        stop: int,
        progress: Callable[[int], None],
    ) -> None:
        with self._lock:
            self.get_count += 1
        self.gets.pass_through()
        with self._lock:
            error = self.get_errors.popleft() if self.get_errors else None
            cut = self.get_cuts.popleft() if self.get_cuts else None
            found = self.objects.get(object_id.path.removeprefix(self._prefix))
        if self.unavailable:
            raise StoreUnavailable(f"{self.url} does not answer")
        if error is not None:
            raise error
        if found is None:
            raise NotFound(f"{object_id.path} is gone")
        data, version = found
        if version != object_id.version or len(data) != object_id.size:
            raise ObjectChanged(f"{object_id.path} is now {version}")
        assert 0 <= start < stop <= len(data), (start, stop, len(data))
        done = 0
        while done < stop - start:
            if cut is not None and done >= cut:
                raise StoreUnavailable("the body was cut")
            step = min(PROGRESS_BYTES, stop - start - done)
            if cut is not None:
                step = min(step, max(1, cut - done))
            buffer[done : done + step] = data[start + done : start + done + step]
            done += step
            with self._lock:
                self.bytes_sent += step
            if done < stop - start:
                progress(done)
        with self._lock:
            self.get_counts[object_id.path.removeprefix(self._prefix), start, stop] += 1
        progress(done)

    def close(self) -> None:
        self.closed = True
