"""Every metric: name, unit, labels, help. Nothing else in the package names a metric.

A test holds this list against the table of the README. Each server builds one `Metrics` with its own registry.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server. Counters start at the values that the ledger kept over a restart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.read_bytes = Counter(
            "cachefs_read_bytes",
            "Bytes given to readers, by tier (local, store) and result (hit, miss, uncached).",
            ("tier", "result"),
            registry=registry,
        )
        self.read_requests = Counter(
            "cachefs_read_requests",
            "READ requests that reached the server, by result (hit, miss, error).",
            ("result",),
            registry=registry,
        )
        self.store_requests = Counter(
            "cachefs_store_requests",
            "Requests to the store, by kind (get, list) and result (ok, retry, error).",
            ("kind", "result"),
            registry=registry,
        )
        self.store_bytes = Counter("cachefs_store_bytes", "Bytes fetched from the store.", registry=registry)
        self.fill_seconds = Histogram(
            "cachefs_fill_seconds",
            "From the start of a fill to its bytes in memory.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_byte_seconds = Histogram(
            "cachefs_first_byte_seconds",
            "From the start of a fill to its first bytes.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.fills_in_flight = Gauge("cachefs_fills_in_flight", "Chunks that are being fetched.", registry=registry)
        self.evicted_objects = Counter(
            "cachefs_evicted_objects", "Objects evicted from the local tier.", registry=registry
        )
        self.evicted_bytes = Counter("cachefs_evicted_bytes", "Bytes evicted from the local tier.", registry=registry)
        self.errors = Counter("cachefs_errors", "Errors answered or met, by class.", ("error",), registry=registry)
        self.tier_write_errors = Counter(
            "cachefs_tier_write_errors",
            "Chunks that could not be kept (disk full or failing).",
            registry=registry,
        )
        self.used_bytes = Gauge("cachefs_used_bytes", "Bytes that the local tier holds.", ("tier",), registry=registry)
        self.capacity_bytes = Gauge(
            "cachefs_capacity_bytes", "Bytes that the local tier may hold.", ("tier",), registry=registry
        )
        self.opens = Counter(
            "cachefs_opens", "Opens of files, by mode (passthrough, cached).", ("mode",), registry=registry
        )
        self.start_time_seconds = Gauge(
            "cachefs_server_start_time_seconds",
            "When this server started, seconds since 1970.",
            registry=registry,
        )
        self.start_time_seconds.set(time.time())
