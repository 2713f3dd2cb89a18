"""Names: the resolver that is silent, slow or wrong is not waited for longer than the rest of a GET."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cachefs.errors import StoreUnavailable
from cachefs.store import ObjectInfo, Store, _resolve, direct
from cachefs.store._resolve import NameServersSilent, Resolver
from tests.store.conftest import fetch, open_with
from tests.support.lying import LyingServer
from tests.support.servers import wait_until

NAME = "models.test"
DATA = bytes(range(256)) * 100
LONG_S = 60.0


class NameServer:
    """What the system's resolver says of NAME: silent while `answers` is clear, `error` instead of an address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.error: OSError | None = None
        self.address = ("127.0.0.1", 9)
        self.asked = 0
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME or options.get("flags"):
            return self._resolve(host, port, *rest, **options)
        self.asked += 1
        assert self.answers.wait(LONG_S)
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", self.address)]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer(monkeypatch)
    yield server
    server.answers.set()


def addresses(resolver: Resolver, wait_s: float = LONG_S) -> list[Any]:
    return [found[4] for found in resolver.resolve(NAME, 80, time.monotonic() + wait_s)]


def test_an_address_needs_no_name_server(name_server: NameServer) -> None:
    name_server.answers.clear()
    found = Resolver().resolve("127.0.0.1", 80, time.monotonic() + LONG_S)
    assert [one[4] for one in found] == [("127.0.0.1", 80)]
    assert name_server.asked == 0


def test_a_silent_name_server_is_given_up_in_time(name_server: NameServer) -> None:
    name_server.answers.clear()
    with pytest.raises(NameServersSilent):
        addresses(Resolver(), 0.2)


def test_all_who_want_a_name_share_one_question(name_server: NameServer) -> None:
    name_server.answers.clear()
    resolver = Resolver()
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(addresses, resolver) for _ in range(20)]
        wait_until(lambda: name_server.asked > 0, what="somebody asks")
        with pytest.raises(NameServersSilent):
            addresses(resolver, 0.1)
        name_server.answers.set()
        assert [one.result(LONG_S) for one in waiting] == [[name_server.address]] * 20
    before = name_server.asked
    assert addresses(resolver) == [name_server.address]
    assert name_server.asked == before + 1  # an answer is for those who asked: an address may change


def test_the_address_that_a_name_had_serves_while_name_servers_are_silent(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver()
    assert addresses(resolver) == [name_server.address]
    name_server.answers.clear()
    assert addresses(resolver) == [name_server.address]
    monkeypatch.setattr(_resolve, "KNOWN_SECONDS", -1.0)
    with pytest.raises(NameServersSilent):
        addresses(resolver, 0.1)
    name_server.address = ("127.0.0.2", 9)
    name_server.answers.set()
    wait_until(lambda: addresses(resolver) == [("127.0.0.2", 9)], what="the new address")


def test_name_servers_that_fail_for_now_are_passed_over_and_a_name_that_is_gone_is_not(name_server: NameServer) -> None:
    resolver = Resolver()
    failing = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    name_server.error = failing
    with pytest.raises(socket.gaierror):
        addresses(resolver)
    name_server.error = None
    assert addresses(resolver) == [name_server.address]
    name_server.error = failing
    assert addresses(resolver) == [name_server.address]
    name_server.error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with pytest.raises(socket.gaierror) as caught:
        addresses(resolver)
    assert caught.value.errno == socket.EAI_NONAME


def test_a_question_that_hangs_is_asked_anew_by_few_threads(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_resolve, "STUCK_SECONDS", -1.0)
    name_server.answers.clear()
    resolver = Resolver()
    for _ in range(3 * _resolve.STUCK_MAX):
        with pytest.raises(NameServersSilent):
            addresses(resolver, 0.01)
    wait_until(lambda: name_server.asked == 1 + _resolve.STUCK_MAX, what="the questions are asked")
    name_server.answers.set()
    assert addresses(resolver) == [name_server.address]
    wait_until(lambda: resolver._stuck == 0, what="the threads have come back")
    before = name_server.asked
    assert addresses(resolver) == [name_server.address]
    assert name_server.asked == before + 1


def test_no_thread_for_the_question_is_an_error_and_the_next_one_asks(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver()

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="no thread"):
            addresses(resolver)
    assert addresses(resolver) == [name_server.address]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert addresses(resolver) == [name_server.address]  # the one that it had


@contextlib.contextmanager
def opened(origin: LyingServer, *, timeout_s: float) -> Iterator[tuple[Store, ObjectInfo]]:
    info = ObjectInfo("model", len(DATA), origin.put("bucket", "model", DATA), 0.0)
    store = open_with("s3://bucket", endpoint_url=f"http://{NAME}", timeout_s=timeout_s)
    try:
        yield store, info
    finally:
        store.close()


def test_a_get_goes_on_with_the_known_address_and_fails_in_time_without_one(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(direct, "HEDGE_TOKENS", float("inf"))
    with LyingServer() as origin:
        name_server.address = ("127.0.0.1", origin.port)
        name_server.answers.clear()
        with opened(origin, timeout_s=0.5) as (store, info):
            begun_s = time.monotonic()
            with pytest.raises(StoreUnavailable, match=f"no name server tells the address of {NAME} in time"):
                fetch(store, info)
            assert time.monotonic() - begun_s < 20.0
        name_server.answers.set()
        with opened(origin, timeout_s=30.0) as (store, info):
            assert fetch(store, info) == DATA
            name_server.answers.clear()
            origin.hang_up()  # the next GET needs a connection of its own
            assert fetch(store, info) == DATA
            name_server.answers.set()
