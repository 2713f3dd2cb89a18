"""Peers that no HTTP library would be: they drip, have no end, lie about sizes. Raw sockets, the small client."""

import socket
import threading
import time
from collections.abc import Callable

import pytest

from cachefs.errors import CachefsError, IntegrityError, StoreUnavailable
from cachefs.store import ObjectInfo, Store, direct
from cachefs.store._s3 import LIST_ATTEMPTS, SIZE_MAX
from tests.store.conftest import fetch, listing, open_with
from tests.support import raw
from tests.support.raw import RawPeer

DATA = b"A" * 100
INFO = ObjectInfo("model", len(DATA), "v", 0.0)
PART = 'HTTP/1.1 206 Partial\r\nETag: "v"\r\nContent-Range: bytes 0-99/100\r\n'
CHUNKED = f"{PART}Transfer-Encoding: chunked\r\n\r\n".encode()
WHOLE = f"{PART}Content-Length: 100\r\n\r\n".encode() + DATA
TIMEOUT_S = 1.0
PATIENCE_S = 30.0
"""Far more than TIMEOUT_S, and no peer here ends by itself."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "ATTEMPTS", 1)


def in_time(work: Callable[[], object]) -> Exception | None:
    """What `work` raised, None if nothing; fails when it is not over after PATIENCE_S, which pytest's end would not
    tell so well."""
    result: list[Exception | None] = []

    def run() -> None:
        try:
            work()
            result.append(None)
        except CachefsError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert result, f"still at it after {PATIENCE_S} s"
    return result[0]


def opened(peer: RawPeer, *, timeout_s: float = 60.0) -> Store:
    return open_with("s3://bucket", endpoint_url=peer.url, timeout_s=timeout_s)


# --- one deadline, however the bytes come


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"HTTP/1.1 206 Partial\r\nx: ", b"a"),
        (b"HTTP/1.1 206 Partial\r\n", b"x: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\nx: "),
        (b"HTTP/1.1 503 No\r\nContent-Length: 60000\r\n\r\n", b" "),
        (CHUNKED + b"1;", b"e"),
    ],
    ids=["header", "headers", "interim answers", "error body", "line of a chunk"],
)
def test_a_get_that_drips_ends_at_its_timeout(start: bytes, drop: bytes) -> None:
    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        peer.drip(connection, drop)

    with RawPeer(say) as peer:
        store = opened(peer, timeout_s=TIMEOUT_S)
        assert isinstance(in_time(lambda: fetch(store, INFO)), StoreUnavailable)
        store.close()


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nx:", b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"], ids=["head", "body"]
)
def test_a_page_of_a_listing_that_drips_ends_at_its_timeout(start: bytes) -> None:
    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        peer.drip(connection, b" ")

    with RawPeer(say) as peer:
        store = opened(peer, timeout_s=TIMEOUT_S)
        assert isinstance(in_time(store.probe), StoreUnavailable)
        store.close()


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(("count", "taken"), [(2, True), (20, False)])
def test_a_few_interim_answers_are_passed_over_and_no_more(count: int, taken: bool) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"

    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(interim * count + WHOLE)

    with RawPeer(say) as peer:
        store = opened(peer)
        error = in_time(lambda: fetch(store, INFO))
        assert (error is None) == taken
        store.close()


def test_a_body_that_drips_is_still_a_body() -> None:
    """Each wait for a byte has `get_timeout_s`: a slow link is no dead one, in chunks or not."""

    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(CHUNKED)
        for at in range(0, len(DATA), 10):
            peer.end.wait(0.5)
            connection.sendall(b"a\r\n" + DATA[at : at + 10] + b"\r\n")
        connection.sendall(b"0\r\n\r\n")

    with RawPeer(say) as peer:
        store = opened(peer, timeout_s=4.0)
        assert fetch(store, INFO) == DATA  # 5 s
        store.close()


# --- no end


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (CHUNKED + b"64\r\n" + DATA + b"\r\n", b""),
        (CHUNKED + b"64\r\n" + DATA + b"\r\n0\r\n", b"x: y\r\n"),
        (f"{PART}Connection: close\r\n\r\n".encode() + DATA, b""),
    ],
    ids=["no last chunk", "endless trailer", "no length"],
)
def test_an_answer_with_all_its_bytes_needs_no_end(start: bytes, drop: bytes) -> None:
    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        peer.drip(connection, drop)

    with RawPeer(say) as peer:
        store = opened(peer, timeout_s=2 * PATIENCE_S)
        found: list[bytes] = []
        assert in_time(lambda: found.append(fetch(store, INFO))) is None
        assert in_time(lambda: found.append(fetch(store, INFO))) is None  # on another connection
        assert found == [DATA, DATA]
        assert len(peer.heads) == 2
        store.close()


# --- listings that lie


@pytest.mark.parametrize("size", [10**26, 1 << 63, SIZE_MAX + 1])
def test_a_size_that_no_file_has_is_said_to_be_one(size: int) -> None:
    body = raw.listing(raw.entry("model", size))
    with RawPeer(lambda peer, connection, head: connection.sendall(raw.answer(body))) as peer:
        store = opened(peer)
        with pytest.raises(IntegrityError, match=r"'model'.*bytes"):
            listing(store)
        store.close()


def test_the_greatest_size_is_taken() -> None:
    body = raw.listing(raw.entry("model", SIZE_MAX))
    with RawPeer(lambda peer, connection, head: connection.sendall(raw.answer(body))) as peer:
        store = opened(peer)
        assert listing(store)[0]["model"].size == SIZE_MAX
        store.close()


@pytest.mark.parametrize("encoding", ["foobar-9", "utf-7", "rot13"])
@pytest.mark.parametrize("status", ["200 OK", "503 No"])
def test_an_encoding_that_nobody_has_is_a_failure_of_the_store(
    monkeypatch: pytest.MonkeyPatch, encoding: str, status: str
) -> None:
    monkeypatch.setattr("cachefs.store._s3.LIST_BACKOFF_S", 0.01)
    body = raw.listing(declared=f'<?xml version="1.0" encoding="{encoding}"?>')
    with RawPeer(lambda peer, connection, head: connection.sendall(raw.answer(body, status=status))) as peer:
        store = opened(peer)
        with pytest.raises(StoreUnavailable):
            store.probe()
        assert len(peer.heads) == LIST_ATTEMPTS
        store.close()


def test_a_time_that_no_calendar_has_is_an_entry_that_cannot_be_read() -> None:
    body = raw.listing(raw.entry("model", 1).replace("2024-05-06T07:08:09Z", "0001-01-01T00:00:00"))
    with RawPeer(lambda peer, connection, head: connection.sendall(raw.answer(body))) as peer:
        store = opened(peer)
        with pytest.raises(IntegrityError, match="cannot be read") as caught:
            listing(store)
        assert str(caught.value).isprintable()
        store.close()


# --- what is printed


@pytest.mark.parametrize(
    "said",
    [
        raw.answer(b"", status="301 Moved", headers="x-amz-bucket-region: \x1b[2Jeu-west-1\r\n"),
        raw.answer(b"", status="403 No", headers=f"x-amz-bucket-region: {'x' * 64}\r\n"),
        b"HTTP/1.1 \x1b]0;mine\x07 OK\r\n\r\n",
        b"HTTP/1.1 2000 \x1b[31m\r\n\r\n",
        b"HTTP/9.\x1b[31m 200 OK\r\n\r\n",
        raw.answer(b"", headers="x: " + "y" * 70_000 + "\r\n"),
        raw.answer(b"<?xml version='1.0'?><x>\x1b[2J</x>"),
        raw.answer(raw.listing(raw.entry("model", 1).replace("<Size>1", "<Size>&#x9b;31m"))),
    ],
    ids=["region", "long region", "status", "big status", "version", "long header", "no XML", "size"],
)
def test_no_message_has_what_a_terminal_obeys(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr("cachefs.store._s3.LIST_BACKOFF_S", 0.01)
    with RawPeer(lambda peer, connection, head: connection.sendall(said)) as peer:
        store = opened(peer, timeout_s=10.0)
        error = in_time(store.probe)
        assert error is not None
        assert str(error).isprintable()
        assert "x" * 64 not in str(error)
        store.close()


def test_a_changed_etag_is_printed_harmlessly() -> None:
    said = WHOLE.replace(b'"v"', b'"\x1b[2J"')
    with RawPeer(lambda peer, connection, head: connection.sendall(said)) as peer:
        store = opened(peer)
        error = in_time(lambda: fetch(store, INFO))
        assert error is not None
        assert str(error).isprintable()
        store.close()


# --- many addresses


@pytest.mark.parametrize("operation", ["list", "get"])
@pytest.mark.parametrize("how", ["silent", "resets"])
def test_an_address_that_takes_connections_and_no_more_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, operation: str, how: str
) -> None:
    def refuse(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        if how == "silent":
            peer.end.wait(600)
        raise OSError

    def serve(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(raw.answer(raw.listing(raw.entry("model", 100))) if b"list-type" in head else WHOLE)

    with RawPeer(refuse) as bad, RawPeer(serve) as good:
        resolve = socket.getaddrinfo

        def two(host: str, *rest: object, **options: object) -> object:
            if host != "two.test":
                return resolve(host, *rest, **options)  # type: ignore[arg-type]
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", peer.address) for peer in (bad, good)]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        monkeypatch.setattr(direct, "QUIET_SECONDS", 1.0)
        monkeypatch.setattr(direct, "HEDGE_TOKENS", float("inf"))
        store = open_with(
            "s3://bucket", endpoint_url="http://two.test", timeout_s=10.0 if operation == "list" else 30.0
        )
        start = time.monotonic()
        assert in_time((lambda: fetch(store, INFO)) if operation == "get" else store.probe) is None
        assert in_time(lambda: fetch(store, INFO)) is None
        assert time.monotonic() - start < PATIENCE_S
        assert len(bad.heads) <= 1  # none where the machine was so busy that the other one was connected first
        store.close()
