"""Metrics: they count on where a killed server stopped, and a scrape shows them."""

import mmap
import struct
import sys

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from cachefs.errors import Offline
from cachefs.metrics import SECONDS, SLOTS, Metrics, serve_metrics


def shown(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_counters_go_on_where_the_last_server_was_killed() -> None:
    with mmap.mmap(-1, SLOTS * 8) as memory, memoryview(memory) as raw, raw.cast("d") as values:
        first = Metrics(values)
        first.read_bytes.labels("local", "hit").inc(10)
        first.read_bytes.labels(tier="store", result="miss").inc(5)
        first.store_bytes.inc(7)
        first.fill_seconds.observe(0.3)
        second = Metrics(values)  # nothing was saved or closed in between
        second.read_bytes.labels("local", "hit").inc(1)
        found = shown(second)
        assert found["cachefs_read_bytes_total", ("hit", "local")] == 11
        assert found["cachefs_store_bytes_total", ()] == 7
        assert found["cachefs_fill_seconds_count", ()] == 1
        assert second.read_bytes.total(result="hit") == 11
        assert second.read_bytes.total() == 16
        del first, second


def test_values_of_another_layout_are_not_believed() -> None:
    values = [float(number) for number in range(SLOTS)]
    assert Metrics(values).store_bytes.total() == 0


def test_histograms_are_cumulative() -> None:
    metrics = Metrics()
    for seconds in (0.0005, SECONDS[0], 0.02, 1000.0):
        metrics.first_byte_seconds.observe(seconds)
    found = shown(metrics)
    assert found["cachefs_first_byte_seconds_bucket", (str(SECONDS[0]),)] == 2
    assert found["cachefs_first_byte_seconds_bucket", ("0.025",)] == 3
    assert found["cachefs_first_byte_seconds_bucket", ("+Inf",)] == 4
    assert found["cachefs_first_byte_seconds_sum", ()] == sum((0.0005, SECONDS[0], 0.02, 1000.0))


def test_errors_count_by_class_and_unknown_ones_as_other() -> None:
    metrics = Metrics()
    metrics.count_error(Offline("x"))
    metrics.count_error(struct.error("x"))
    metrics.errors.labels("NeverDeclared").inc()
    found = shown(metrics)
    assert found["cachefs_errors_total", ("Offline",)] == 1
    assert found["cachefs_errors_total", ("other",)] == 1
    assert found["cachefs_errors_total", ("NeverDeclared",)] == 1


async def request(port: int, path: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        async for part in stream:
            answer += part
    return answer


def test_a_scrape_over_http_shows_them() -> None:
    async def main() -> None:
        metrics = Metrics()
        metrics.opens.labels("cached").inc()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(serve_metrics, metrics.exposition, "127.0.0.1", 0)
            silent = await trio.open_tcp_stream("127.0.0.1", port)  # does not hold up the others
            with trio.fail_after(30):
                answer = await request(port, b"/metrics")
                assert (await request(port, b"/secret")).startswith(b"HTTP/1.1 404")
            assert answer.startswith(b"HTTP/1.1 200")
            assert b'cachefs_opens_total{mode="cached"} 1.0' in answer
            await silent.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_scrape_that_fails_is_503_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As while the packages are replaced in place, before the first scrape has loaded prometheus_client."""

    async def main() -> None:
        metrics = Metrics()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(serve_metrics, metrics.exposition, "127.0.0.1", 0)
            with trio.fail_after(30):
                with monkeypatch.context() as patch:
                    patch.setitem(sys.modules, "prometheus_client", None)
                    assert (await request(port, b"/metrics")).startswith(b"HTTP/1.1 503")
                assert (await request(port, b"/metrics")).startswith(b"HTTP/1.1 200")
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert [record.levelname for record in caplog.records if record.name == "cachefs.metrics"] == ["WARNING"]
    assert "prometheus_client" in caplog.text
