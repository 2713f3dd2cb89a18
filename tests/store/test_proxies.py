"""Proxies that the environment names: which are used, with whose password, and what is said when they fail."""

import base64
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.errors import CachefsError, StoreUnavailable, UsageError
from cachefs.store import ObjectInfo, direct
from cachefs.store._dial import find_proxy
from tests.store.conftest import fetch, listing, open_with
from tests.support import raw
from tests.support.lying import LyingServer
from tests.support.raw import RawPeer
from tests.support.servers import free_ports

DATA = bytes(range(256)) * 2000
SECRET = "hunter2@:/%"
PAIR = base64.b64encode(f"me:{SECRET}".encode())


@pytest.fixture(autouse=True)
def no_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("cachefs.store._s3.LIST_BACKOFF_S", 0.01)
    monkeypatch.setattr(direct, "ATTEMPTS", 1)


@pytest.fixture
def origin(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingServer]:
    """With TLS."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    with LyingServer(tls=certificate) as server:
        server.put("bucket", "model", DATA)
        yield server


def with_password(url: str) -> str:
    return url.replace("http://", "http://me:hunter2%40%3A%2F%25@")


def test_tls_goes_through_a_proxy_with_its_password(origin: LyingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawPeer(raw.join) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", with_password(proxy.url))
        store = open_with("s3://bucket", endpoint_url=origin.endpoint_url)
        assert fetch(store, listing(store)[0]["model"]) == DATA
        store.close()
        assert len(proxy.heads) == 1
        head = proxy.heads[0]
        assert head.startswith(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\n".encode())
        assert b"Proxy-Authorization: Basic " + PAIR + b"\r\n" in head


def test_a_proxy_needs_no_password(origin: LyingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawPeer(raw.join) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.removeprefix("http://"))
        store = open_with("s3://bucket", endpoint_url=origin.endpoint_url)
        assert fetch(store, listing(store)[0]["model"]) == DATA
        store.close()
        assert b"authorization" not in proxy.heads[0].lower()


def test_without_tls_a_proxy_gets_whole_requests_and_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawPeer(lambda peer, connection, head: connection.sendall(raw.answer(raw.listing()))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", with_password(proxy.url))
        store = open_with("s3://bucket", endpoint_url="http://store.test:9000")
        store.probe()
        store.close()
        head = proxy.heads[0]
        assert head.startswith(b"GET http://store.test:9000/bucket?")
        assert b"proxy-authorization: Basic " + PAIR + b"\r\n" in head
        assert b"proxy-authorization" not in head.partition(b"SignedHeaders=")[2].partition(b"\r\n")[0]


def test_a_proxy_is_asked_for_an_ipv6_address_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 502 No\r\n\r\n")

    with RawPeer(refuse) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        store = open_with("s3://bucket", endpoint_url="https://[::1]:9000")
        with pytest.raises(StoreUnavailable, match=r"HTTPS_PROXY.*502"):
            store.probe()
        store.close()
        assert proxy.heads[0].startswith(b"CONNECT [::1]:9000 HTTP/1.1\r\nHost: [::1]:9000\r\n")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_another_password_is_what_is_said_to_fail(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    said = raw.answer(b"", status="407 \x1b[2J", headers="Proxy-Authenticate: Basic\r\n")
    with RawPeer(lambda peer, connection, head: connection.sendall(said)) as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", with_password(proxy.url))
        store = open_with("s3://bucket", endpoint_url=f"{scheme}://store.test")
        with pytest.raises(UsageError, match=rf"proxy 127.0.0.1:\d+ \({scheme.upper()}_PROXY\).*407") as caught:
            store.probe()
        assert "hunter2" not in str(caught.value)
        assert str(caught.value).isprintable()
        store.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("how", ["refuses", "is silent", "speaks no HTTP", "drips"])
def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, how: str) -> None:
    def say(peer: RawPeer, connection: socket.socket, head: bytes) -> None:
        if how == "speaks no HTTP":
            connection.sendall(b"SSH-2.0-\x1b[2J\r\n\r\n")
        elif how == "drips":
            peer.drip(connection, b"HTTP/1.1 200 OK\r\n")
        else:
            peer.end.wait(600)

    with contextlib.ExitStack() as stack:
        if how == "refuses":
            url = f"http://me:hunter2@127.0.0.1:{free_ports(1)[0]}"
        else:
            url = with_password(stack.enter_context(RawPeer(say)).url)
        monkeypatch.setenv(f"{scheme}_proxy", url)
        store = open_with("s3://bucket", endpoint_url=f"{scheme}://store.test", timeout_s=1.0)
        with pytest.raises(StoreUnavailable, match=f"{scheme.upper()}_PROXY") as caught:
            fetch(store, ObjectInfo("model", 10, "v", 0.0))
        assert "hunter2" not in str(caught.value)
        assert str(caught.value).isprintable()
        store.close()


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://me:hunter2@127.0.0.1:1080",
        "https://me:hunter2@127.0.0.1:3129",
        "http://me:hunter2@:3128",
        "http://me:hunter2@host:port",
        "http://me:hunter2@host:0",
        "http://me:hunter2@[::1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_with_one_line(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UsageError, match="HTTPS_PROXY") as caught:
        open_with("s3://bucket", endpoint_url="https://store.test")
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2
    # And it is nobody's business where it is not asked.
    monkeypatch.setenv("NO_PROXY", "store.test")
    open_with("s3://bucket", endpoint_url="https://store.test").close()


def test_a_proxy_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@[fe80::1]:3128")
    proxy = find_proxy("https", "store.test")
    assert repr(proxy) == "Proxy([fe80::1]:3128 (HTTPS_PROXY))"
    assert isinstance(proxy, tuple)
    assert str(proxy) == "[fe80::1]:3128 (HTTPS_PROXY)"


@pytest.mark.parametrize("endpoint", ["http://a..b:9000", f"http://{'a' * 64}.test", f"http://{'ü' * 60}.test"])
@pytest.mark.parametrize("library", ["auto", "obstore", "fsspec"])
def test_what_is_no_name_of_a_host_is_said_to_be_none(endpoint: str, library: str) -> None:
    with pytest.raises(UsageError, match="no name of a host") as caught:
        open_with("s3://bucket", endpoint_url=endpoint, store=library)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("region", ["a..b", "x" * 64])
def test_a_region_that_makes_no_name_of_a_host_is_said_to_make_none(region: str) -> None:
    store = open_with("s3://bucket", region=region)
    for ask in (store.probe, lambda: fetch(store, ObjectInfo("model", 10, "v", 0.0))):
        with pytest.raises(CachefsError, match=r"no name of a host.*--region") as caught:
            ask()
        assert caught.value.exit_code == 2
    store.close()
