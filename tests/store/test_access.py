"""Who may read: keys, profiles, anonymous access, certificates, endpoints that do not answer."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.errors import AccessDenied, CachefsError, StoreUnavailable, UsageError
from cachefs.store import ObjectInfo
from tests.store.conftest import TREE, TREE_BUCKET, fetch, listing, open_with, walk
from tests.support.lying import LyingServer
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, HadroServer
from tests.support.servers import free_ports

LIBRARIES = ("auto", "obstore", "fsspec")


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HadroServer]:
    with HadroServer(tmp_path_factory.mktemp("anonymous"), anonymous=True) as server:
        server.put("public-bucket", "x", b"for all")
        yield server


def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_denied(
    hadro_tree: HadroServer, monkeypatch: pytest.MonkeyPatch, library: str, name: str
) -> None:
    good = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url, store=library)
    info = listing(good)[0]["plain.txt"]
    monkeypatch.setenv(name, "wrong")
    store = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url, store=library)
    with pytest.raises(AccessDenied, match="credentials"):
        store.probe()
    with pytest.raises(AccessDenied, match="credentials"):
        fetch(store, info)
    good.close()
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_keys_at_all_says_how_to_give_them(
    hadro_tree: HadroServer, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    without_keys(monkeypatch)
    store = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url, store=library)
    with pytest.raises(AccessDenied, match=r"AWS_ACCESS_KEY_ID.*--anonymous"):
        store.probe()
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_anonymous_access_needs_no_keys_and_sends_none(
    open_to_all: HadroServer, hadro_tree: HadroServer, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    denied = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url, store=library, anonymous=True)
    with pytest.raises(AccessDenied):
        denied.probe()
    without_keys(monkeypatch)
    store = open_with("s3://public-bucket", endpoint_url=open_to_all.endpoint_url, store=library, anonymous=True)
    store.probe()
    assert [fetch(store, info) for info in walk(store)] == [b"for all"]
    denied.close()
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("anonymous", [True, False])
def test_every_request_is_signed_or_none(origin: LyingServer, library: str, anonymous: bool) -> None:
    for key in ("plain", "odd//key"):
        version = origin.put("bucket", key, b"data")
        store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, store=library, anonymous=anonymous)
        store.probe()
        assert fetch(store, ObjectInfo(key, 4, version, 0.0)) == b"data"
        store.close()
    assert {request.signed for request in origin.requests} == {not anonymous}
    assert all(request.if_match for request in origin.requests if request.key)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("how", ["asked for", "AWS_PROFILE", "default"])
def test_profiles_give_keys_and_one_that_is_asked_for_goes_before_the_environment(
    hadro_tree: HadroServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, how: str
) -> None:
    name = "default" if how == "default" else "models"
    file = tmp_path / "credentials"
    file.write_text(f"[{name}]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    if how == "asked for":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    else:
        without_keys(monkeypatch)
    if how == "AWS_PROFILE":
        monkeypatch.setenv("AWS_PROFILE", "models")
    profile = "models" if how == "asked for" else None
    store = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url, store=library, profile=profile)
    store.probe()
    assert fetch(store, listing(store)[0]["plain.txt"]) == b"plain"
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_profile_that_is_not_there_is_named(library: str) -> None:
    with pytest.raises(UsageError, match=r"nobody.*--profile"):
        open_with("s3://bucket", endpoint_url="http://127.0.0.1:9", store=library, profile="nobody")


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_endpoint_that_nobody_listens_on_is_unavailable_within_the_timeouts(library: str) -> None:
    port = free_ports(1)[0]
    store = open_with("s3://bucket", endpoint_url=f"http://127.0.0.1:{port}", store=library, timeout_s=2.0)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match="bucket"):
        store.probe()
    assert time.monotonic() - start < 30
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_endpoint_from_the_environment_is_used_and_part_of_the_identity(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    origin.put("bucket", "x", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", origin.endpoint_url + "/")
    store = open_with("s3://bucket", store=library)
    assert [fetch(store, info) for info in walk(store)] == [b"x"]
    assert store.identity == f"s3://bucket@{origin.endpoint_url}"
    # The one that is asked for goes before all of the environment.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    asked = open_with("s3://bucket", store=library, endpoint_url=origin.endpoint_url)
    assert [fetch(asked, info) for info in walk(asked)] == [b"x"]
    store.close()
    asked.close()


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]) -> Iterator[HadroServer]:
    with HadroServer(tmp_path_factory.mktemp("tls-hadro"), tls=certificate) as server:
        server.put("tls-bucket", "model", TREE["big.bin"])
        yield server


@pytest.mark.parametrize("library", LIBRARIES)
def test_certificates_are_checked(over_tls: HadroServer, library: str) -> None:
    store = open_with("s3://tls-bucket", endpoint_url=over_tls.endpoint_url, store=library, timeout_s=5.0)
    with pytest.raises(UsageError, match="AWS_CA_BUNDLE"):
        store.probe()
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_authority_is_trusted_when_it_is_named(
    over_tls: HadroServer,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, str(certificate[0]))
    store = open_with("s3://tls-bucket", endpoint_url=over_tls.endpoint_url, store=library)
    store.probe()
    assert [fetch(store, info) for info in walk(store)] == [TREE["big.bin"]]
    store.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_store_that_fails_now_and_then_gives_right_bytes(tmp_path: Path, library: str) -> None:
    with HadroServer(tmp_path, error_rate=0.2, seed=7, latency_ms=2, jitter_ms=5) as server:
        for number in range(8):
            server.put("flaky-bucket", f"d/{number}", bytes([number]) * 100_000)
        store = open_with("s3://flaky-bucket", endpoint_url=server.endpoint_url, store=library)
        found = sorted(walk(store), key=lambda info: info.path)
        assert len(found) == 8
        for number, info in enumerate(found):
            while True:
                try:
                    assert fetch(store, info) == bytes([number]) * 100_000
                except StoreUnavailable:
                    continue
                break
        store.close()


def test_no_message_has_a_secret_in_it(hadro_tree: HadroServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open")
    store = open_with(f"s3://{TREE_BUCKET}", endpoint_url=hadro_tree.endpoint_url)
    with pytest.raises(CachefsError) as caught:
        store.probe()
    assert "sesame-open" not in str(caught.value)
    assert "\n" not in str(caught.value)
    store.close()
