"""Connections that are dead, slow to be made, or both: what a reader waits for, and that no GET is lost by it."""

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.errors import StoreUnavailable
from cachefs.store import ObjectInfo, Store, _connection, _straggler, direct
from cachefs.store._connection import Way, is_over
from cachefs.store._dial import ADDRESSES_MAX, Addresses
from cachefs.store._http import S3Client
from tests.store.conftest import fetch, listing, open_with
from tests.support.lying import Lie, LyingServer
from tests.support.servers import wait_until

DATA = bytes(range(256)) * 2000
NAME = "models.test"
TRIES = 5
QUICK_S = 4.0
"""A timeout; a connection or a head comes after LATE_S, and TOO_LONG_S is less than if the rest began anew."""
LATE_S = 3.6
TOO_LONG_S = 5.4


@pytest.fixture(params=["http", "https"])
def origin(
    request: pytest.FixtureRequest, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LyingServer]:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    monkeypatch.setenv("NO_PROXY", "*")
    with LyingServer(tls=certificate if request.param == "https" else None) as server:
        server.put("bucket", "model", DATA)
        yield server


http_only = pytest.mark.parametrize("origin", ["http"], indirect=True)
https_only = pytest.mark.parametrize("origin", ["https"], indirect=True)


@contextlib.contextmanager
def opened(origin: LyingServer, *, timeout_s: float = 60.0) -> Iterator[tuple[Store, ObjectInfo]]:
    """A store with one idle connection."""
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=timeout_s)
    try:
        yield store, listing(store)[0]["model"]
    finally:
        store.close()


@pytest.fixture
def no_hedges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "HEDGE_TOKENS", float("inf"))


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as an attempt that failed is the caller's error. A machine that is busy has time."""
    monkeypatch.setattr(direct, "ATTEMPTS", 1)
    monkeypatch.setattr(direct, "QUIET_SECONDS", 60.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[http.client.HTTPConnection]:
    """The connections that requests were sent on, in order."""
    connections: list[http.client.HTTPConnection] = []
    ask = S3Client.ask

    def noted(self: S3Client, connection: http.client.HTTPConnection, *request: Any) -> Any:
        connections.append(connection)
        return ask(self, connection, *request)

    monkeypatch.setattr(S3Client, "ask", noted)
    return connections


# --- idle connections


@pytest.mark.usefixtures("no_hedges", "one_attempt")
def test_an_idle_connection_that_the_store_closed_is_not_asked_on(
    origin: LyingServer, asked: list[http.client.HTTPConnection]
) -> None:
    with opened(origin) as (store, info):
        assert fetch(store, info) == DATA
        assert asked[0] is asked[1]
        origin.hang_up()
        wait_until(lambda: is_over(asked[1].sock), what="the end has come")
        assert fetch(store, info) == DATA
        assert len(asked) == 3
        assert asked[2] is not asked[1]
        # And one that is open is used.
        assert fetch(store, info) == DATA
        assert asked[3] is asked[2]


@pytest.mark.usefixtures("no_hedges", "one_attempt")
def test_a_connection_that_ends_with_the_request_is_replaced_and_no_attempt_is_lost(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one takes longer than a GET waits before it is hedged."""
    monkeypatch.setattr(_straggler, "DELAY_SECONDS_MAX", 0.25)
    with opened(origin) as (store, info):
        origin.lie("hang up", times=1)
        origin.handshake_s = 0.6
        assert fetch(store, info) == DATA
        assert origin.gets() == 2


@pytest.mark.usefixtures("no_hedges")
@http_only
def test_after_a_silence_other_idle_connections_are_not_waited_for(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(origin, timeout_s=30.0) as (store, info):
        monkeypatch.setattr(direct, "QUIET_SECONDS", 30.0)
        origin.lie("hang", times=4)
        with ThreadPoolExecutor(4) as pool:
            parts = [pool.submit(fetch, store, info) for _ in range(4)]
            origin.wait_waiting(4)
            origin.tell_the_truth()
            assert [part.result() for part in parts] == [DATA] * 4
        monkeypatch.setattr(direct, "QUIET_SECONDS", 0.5)
        origin.go_deaf()
        # The second attempt would wait in vain for all that is left of the 30 s.
        assert fetch(store, info) == DATA


# --- many addresses


@pytest.fixture
def dead_address() -> Iterator[tuple[str, int]]:
    """Where no SYN is answered: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(20):
            caller = stack.enter_context(socket.socket())
            caller.settimeout(0.5)
            try:
                caller.connect(listener.getsockname())
            except TimeoutError:
                break
        else:
            pytest.fail("the queue does not get full")
        yield listener.getsockname()


def resolves(monkeypatch: pytest.MonkeyPatch, addresses: list[tuple[str, int]]) -> None:
    """NAME has these addresses."""
    resolve = socket.getaddrinfo

    def answer(host: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME:
            return resolve(host, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def info_of(origin: LyingServer) -> ObjectInfo:
    return ObjectInfo("model", len(DATA), origin.put("bucket", "model", DATA), 0.0)


@http_only
def test_a_dead_address_does_not_take_the_time_of_the_next(
    origin: LyingServer, dead_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "CONNECT_SECONDS", (60.0,))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # refuses
        resolves(monkeypatch, [dead_address, closed.getsockname(), dead_address, ("127.0.0.1", origin.port)])
        store = open_with("s3://bucket", endpoint_url=f"http://{NAME}", timeout_s=30.0)
        start = time.monotonic()
        assert fetch(store, info_of(origin)) == DATA
        assert time.monotonic() - start < 30.0  # in turn they would take three times as long
        store.close()


@http_only
def test_all_addresses_of_a_name_share_the_timeout(
    origin: LyingServer, dead_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "CONNECT_SECONDS", (60.0,))
    resolves(monkeypatch, [dead_address] * 2 * ADDRESSES_MAX)
    store = open_with("s3://bucket", endpoint_url=f"http://{NAME}", timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        fetch(store, info_of(origin))
    assert time.monotonic() - start < 10.0  # in turn: 16 s
    store.close()


@http_only
def test_a_name_whose_addresses_all_refuse_is_said_to_refuse(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        resolves(monkeypatch, [closed.getsockname()] * 3)
        with pytest.raises(ConnectionRefusedError):
            _connection.connect(NAME, Way(Addresses()), time.monotonic() + 60.0)


@https_only
def test_a_handshake_over_a_far_link_is_not_thrown_away_with_its_connection(origin: LyingServer) -> None:
    info = info_of(origin)
    origin.handshake_s = 2 * _connection.CONNECT_SECONDS[0]
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=30.0)
    assert fetch(store, info) == DATA
    store.close()
    assert origin.connections_total == 1


# --- one deadline


@pytest.mark.usefixtures("no_hedges")
@pytest.mark.parametrize(("handshake_s", "latency_s", "lie"), [(LATE_S, 0.0, "hang"), (0.0, LATE_S, "hang after head")])
@https_only
def test_connection_and_first_byte_share_the_timeout(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch, handshake_s: float, latency_s: float, lie: Lie
) -> None:
    """On a machine that is busy all takes longer: one of a few tries is in time, and none would be without it."""
    monkeypatch.setattr(_connection, "CONNECT_SECONDS", (60.0,))
    info = info_of(origin)
    origin.handshake_s, origin.latency_s = handshake_s, latency_s
    origin.lie(lie)
    for _ in range(TRIES):
        store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=QUICK_S)
        gets_before, start = origin.gets(), time.monotonic()
        with pytest.raises(StoreUnavailable):
            fetch(store, info)
        took_s = time.monotonic() - start
        store.close()
        if took_s < TOO_LONG_S and origin.gets() == gets_before + 1:
            return
    pytest.fail(f"{took_s:.1f} s for a timeout of {QUICK_S} s")
