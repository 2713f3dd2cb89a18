"""Every metric: name, unit, labels, help. Nothing else in the package names a metric.

A test holds this list against the table of the README. Each server builds one `Metrics` with its own registry.
Counters and histograms live in an array of doubles that the server maps from the keeper's ledger, so they go
on counting, exactly, when a server is killed and the next one starts.
"""

import functools
import itertools
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import trio

from cachefs import errors
from cachefs.errors import UsageError

if TYPE_CHECKING:
    # Loaded with the first scrape: it brings an HTTP server, 25 ms that no start of a server needs.
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ERROR_CLASSES = (
    *sorted(
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.CachefsError)
    ),
    "other",
)

SLOTS = 256
"""Doubles that `Metrics` needs; the first one says by which layout the others are read."""


class MetricInfo(msgspec.Struct, frozen=True):
    """One line of the README's table."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


class Doubles(Protocol):
    """A list of floats, or shared memory as a memoryview."""

    def __len__(self) -> int: ...
    def __getitem__(self, slot: int, /) -> float: ...
    def __setitem__(self, slot: int, value: float, /) -> None: ...


class _MappedCell:
    """One label combination of a counter: one double of the array."""

    def __init__(self, values: Doubles, slot: int) -> None:
        self._values = values
        self._slot = slot

    def inc(self, amount: float = 1.0) -> None:
        self._values[self._slot] += amount

    def get(self) -> float:
        return self._values[self._slot]


class MappedCounter:
    """A counter whose values outlive the process. Every label combination has its place from the start."""

    def __init__(
        self,
        name: str,
        help: str,
        labels: Mapping[str, Sequence[str]],
        values: Doubles,
        first_slot: int,
    ) -> None:
        self.name = name
        self.help = help
        self.label_names = tuple(labels)
        self._cells = {
            combination: _MappedCell(values, first_slot + number)
            for number, combination in enumerate(itertools.product(*labels.values()))
        }
        self._spill = [0.0]
        self._values = values

    @property
    def slots(self) -> int:
        return len(self._cells)

    def labels(self, *positional: str, **named: str) -> _MappedCell:
        """The cell of one combination; one that nobody declared is counted, but not over a restart."""
        combination = positional or tuple(named[name] for name in self.label_names)
        cell = self._cells.get(combination)
        if cell is None:
            assert len(combination) == len(self.label_names), (self.name, combination)
            self._spill.append(0.0)
            cell = self._cells[combination] = _MappedCell(self._spill, len(self._spill) - 1)
        return cell

    def inc(self, amount: float = 1.0) -> None:
        self._cells[()].inc(amount)

    def total(self, **match: str) -> float:
        """The sum over all combinations that have these label values."""
        wanted = [(self.label_names.index(name), value) for name, value in match.items()]
        return sum(
            cell.get()
            for combination, cell in self._cells.items()
            if all(combination[at] == value for at, value in wanted)
        )

    def collect(self) -> Iterator["Metric"]:
        """The values now, for a scrape."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(self.name, self.help, labels=self.label_names)
        for combination, cell in self._cells.items():
            family.add_metric(combination, cell.get())
        yield family


class MappedHistogram:
    """A histogram of seconds whose values outlive the process: one count per bucket, one over all, the sum."""

    slots = len(SECONDS) + 2

    def __init__(self, name: str, help: str, values: Doubles, first_slot: int) -> None:
        self.name = name
        self.help = help
        self.label_names: tuple[str, ...] = ()
        self._values = values
        self._first = first_slot

    def observe(self, seconds: float) -> None:
        bucket = next((number for number, bound in enumerate(SECONDS) if seconds <= bound), len(SECONDS))
        self._values[self._first + bucket] += 1
        self._values[self._first + len(SECONDS) + 1] += seconds

    def collect(self) -> Iterator["Metric"]:
        """The values now, for a scrape."""
        from prometheus_client.core import HistogramMetricFamily

        counts = [self._values[self._first + number] for number in range(len(SECONDS) + 1)]
        bounds = [*(str(bound) for bound in SECONDS), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
        yield HistogramMetricFamily(
            self.name, self.help, buckets=buckets, sum_value=self._values[self._first + len(SECONDS) + 1]
        )


class _Level:
    """One label combination of a gauge."""

    def __init__(self) -> None:
        self._value = 0.0
        self._function: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        self._value = value
        self._function = None

    def set_function(self, function: Callable[[], float]) -> None:
        """Ask it at each scrape, until the next set()."""
        self._function = function

    def inc(self, amount: float = 1.0) -> None:
        self._value += amount

    def get(self) -> float:
        return self._value if self._function is None else self._function()


class Gauge:
    """What goes up and down, of this server only. With labels, a combination is there once it was asked for."""

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name = name
        self.help = help
        self.label_names = labels
        self._levels: dict[tuple[str, ...], _Level] = {} if labels else {(): _Level()}

    def labels(self, *values: str) -> _Level:
        """The level of one combination."""
        assert len(values) == len(self.label_names), (self.name, values)
        return self._levels.setdefault(values, _Level())

    def set(self, value: float) -> None:
        self._levels[()].set(value)

    def inc(self, amount: float = 1.0) -> None:
        self._levels[()].inc(amount)

    def dec(self, amount: float = 1.0) -> None:
        self._levels[()].inc(-amount)

    def collect(self) -> Iterator["Metric"]:
        """The values now, for a scrape."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(self.name, self.help, labels=self.label_names)
        for combination, level in self._levels.items():
            family.add_metric(combination, level.get())
        yield family


_Mapped = TypeVar("_Mapped", MappedCounter, MappedHistogram)


class Metrics:
    """The metrics of one server. `values`: at least SLOTS writable doubles (from the ledger), else private ones."""

    def __init__(self, values: Doubles | None = None) -> None:
        self._values: Doubles = [0.0] * SLOTS if values is None else values
        assert len(self._values) >= SLOTS, len(self._values)
        self._next_slot = 1
        self._mapped: list[MappedCounter | MappedHistogram] = []
        self._gauges: list[Gauge] = []
        self._define_counters()
        self._define_gauges()
        assert self._next_slot <= SLOTS, self._next_slot
        self._adopt_layout()

    @functools.cached_property
    def registry(self) -> "CollectorRegistry":
        """What a scrape is made from."""
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        for metric in (*self._gauges, *self._mapped):
            registry.register(metric)
        return registry

    def _define_counters(self) -> None:
        self.read_bytes = self._counter(
            "cachefs_read_bytes",
            "Bytes given to readers, by tier (local, store) and result (hit, miss, uncached).",
            {"tier": ("local", "store"), "result": ("hit", "miss", "uncached")},
        )
        self.read_requests = self._counter(
            "cachefs_read_requests",
            "READ requests that reached the server, by result (hit, miss, error).",
            {"result": ("hit", "miss", "error")},
        )
        self.store_requests = self._counter(
            "cachefs_store_requests",
            "Requests to the store, by kind (get, list) and result (ok, retry, error).",
            {"kind": ("get", "list"), "result": ("ok", "retry", "error")},
        )
        self.store_hedges = self._counter(
            "cachefs_store_hedges",
            "Second GETs for bytes that were late, by result (started, won: they came before the first one's).",
            {"result": ("started", "won")},
        )
        self.store_bytes = self._counter("cachefs_store_bytes", "Bytes fetched from the store.", {})
        self.evicted_objects = self._counter("cachefs_evicted_objects", "Objects evicted from the local tier.", {})
        self.evicted_bytes = self._counter("cachefs_evicted_bytes", "Bytes evicted from the local tier.", {})
        self.errors = self._counter("cachefs_errors", "Errors answered or met, by class.", {"error": ERROR_CLASSES})
        self.tier_write_errors = self._counter(
            "cachefs_tier_write_errors", "Chunks that could not be kept (disk full or failing).", {}
        )
        self.tier_unlink_errors = self._counter(
            "cachefs_tier_unlink_errors", "Blobs that could not be deleted; they take room and are not used.", {}
        )
        self.opens = self._counter(
            "cachefs_opens", "Opens of files, by mode (passthrough, cached).", {"mode": ("passthrough", "cached")}
        )
        self.fill_seconds = self._histogram("cachefs_fill_seconds", "From the start of a fill to its bytes in memory.")
        self.first_byte_seconds = self._histogram(
            "cachefs_first_byte_seconds", "From the start of a fill to its first bytes."
        )

    def _define_gauges(self) -> None:
        self.fills_in_flight = self._gauge("cachefs_fills_in_flight", "Chunks that are being fetched.")
        self.used_bytes = self._gauge("cachefs_used_bytes", "Bytes that the local tier holds.", "tier")
        self.capacity_bytes = self._gauge("cachefs_capacity_bytes", "Bytes that the local tier may hold.", "tier")
        self.start_time_seconds = self._gauge(
            "cachefs_server_start_time_seconds", "When this server started, seconds since 1970."
        )
        self.start_time_seconds.set(time.time())

    def _counter(self, name: str, help: str, labels: Mapping[str, Sequence[str]]) -> MappedCounter:
        return self._keep(MappedCounter(name, help, labels, self._values, self._next_slot))

    def _histogram(self, name: str, help: str) -> MappedHistogram:
        return self._keep(MappedHistogram(name, help, self._values, self._next_slot))

    def _keep(self, metric: _Mapped) -> _Mapped:
        self._next_slot += metric.slots
        self._mapped.append(metric)
        return metric

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        self._gauges.append(Gauge(name, help, *labels))
        return self._gauges[-1]

    def _adopt_layout(self) -> None:
        """Values of another layout (an upgrade that changed the list) would be read as something else: start at 0."""
        layout = repr([(metric.name, metric.slots) for metric in self._mapped])
        fingerprint = float(zlib.crc32(layout.encode()) or 1)
        if self._values[0] != fingerprint:
            for slot in range(1, SLOTS):
                self._values[slot] = 0.0
            self._values[0] = fingerprint

    def table(self) -> list[MetricInfo]:
        """Every metric under the name that a scrape shows, sorted."""
        rows = [MetricInfo(gauge.name, "gauge", gauge.label_names, gauge.help) for gauge in self._gauges]
        for metric in self._mapped:
            if isinstance(metric, MappedCounter):
                rows.append(MetricInfo(f"{metric.name}_total", "counter", metric.label_names, metric.help))
            else:
                rows.append(MetricInfo(metric.name, "histogram", metric.label_names, metric.help))
        return sorted(rows, key=lambda row: row.name)

    def count_error(self, error: BaseException) -> None:
        """Count one error under the name of its class."""
        name = type(error).__name__
        self.errors.labels(name if name in ERROR_CLASSES else "other").inc()

    def exposition(self) -> bytes:
        """What a scrape is answered with (Prometheus text format)."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


REQUEST_BYTES_MAX = 8192
REQUEST_DEADLINE_S = 10.0
SCRAPES_MAX = 16


async def serve_metrics(
    exposition: Callable[[], bytes],
    host: str,
    port: int,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer GET /metrics until cancelled. Reports the port. Raises UsageError when the address cannot be had."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        raise UsageError(
            f"--metrics {host}:{port} cannot be listened on ({exc.strerror or exc}): choose another address"
        ) from exc
    scrapes = trio.CapacityLimiter(SCRAPES_MAX)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream, scrapes:
            with trio.move_on_after(REQUEST_DEADLINE_S):
                try:
                    await _answer_scrape(stream, exposition)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, answer, listeners)
        task_status.started(int(listeners[0].socket.getsockname()[1]))


async def _answer_scrape(stream: trio.SocketStream, exposition: Callable[[], bytes]) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        part = await stream.receive_some(REQUEST_BYTES_MAX)
        request += part
        if not part or len(request) > REQUEST_BYTES_MAX:
            return
    words = request.split(b"\r\n", 1)[0].split()
    wanted = len(words) >= 2 and words[0] == b"GET" and words[1].split(b"?")[0] in (b"/metrics", b"/")
    status, body = b"404 Not Found", b"GET /metrics\n"
    if wanted:
        try:
            status, body = b"200 OK", exposition()
        except Exception as exc:  # prometheus_client while its files are replaced, or our own bug: the server lives
            log.warning("a scrape of the metrics failed: %s: %s", type(exc).__name__, exc)
            status, body = b"503 Service Unavailable", b"no metrics for now: see the server's log\n"
    await stream.send_all(
        b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
