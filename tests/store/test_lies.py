"""Stores against a server that lies, fails, hangs and goes away: never a wrong byte, never a short listing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cachefs.errors import (
    AccessDenied,
    CachefsError,
    IntegrityError,
    NotFound,
    ObjectChanged,
    StoreUnavailable,
    UsageError,
)
from cachefs.store import ObjectInfo, Store
from cachefs.store._s3 import PROBE_VALID_S
from tests.store.conftest import fetch, listing, open_with, walk
from tests.support.lying import OTHER_REGION, Lie, LyingServer

DATA = bytes(range(256)) * 12_000
TIMEOUT_S = 1.0
PATIENCE_S = 30.0
"""Far more than TIMEOUT_S: how long a machine that is busy may take over what should take TIMEOUT_S."""


Opener = Callable[..., Store]


@pytest.fixture
def opener(origin: LyingServer) -> Iterator[Opener]:
    """Opens stores on the lying server and closes them."""
    with contextlib.ExitStack() as stack:

        def open_it(source: str = "s3://bucket", **options: Any) -> Store:
            store = open_with(source, endpoint_url=origin.endpoint_url, **options)
            stack.callback(store.close)
            return store

        yield open_it


@pytest.fixture(params=["auto", "obstore", "fsspec"])
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(library: str, origin: LyingServer, opener: Opener) -> Store:
    """With patience."""
    origin.put("bucket", "model.bin", DATA)
    return opener(store=library)


@pytest.fixture
def hasty(library: str, opener: Opener) -> Store:
    """For calls that are to time out."""
    return opener(store=library, timeout_s=TIMEOUT_S)


@pytest.fixture
def info(store: Store) -> ObjectInfo:
    return listing(store)[0]["model.bin"]


def fetch_recorded(store: Store, info: ObjectInfo, start: int, stop: int) -> tuple[bytes, list[int]]:
    """The bytes, and what progress was told; what progress is told is checked also when the request fails."""
    buffer = bytearray(stop - start)
    told: list[int] = []

    def progress(count: int) -> None:
        assert bytes(buffer[:count]) == DATA[start : start + count], "a reader was woken for wrong bytes"
        told.append(count)

    try:
        store.fetch_into(memoryview(buffer), store.object_id(info), start, stop, progress)
    except CachefsError:
        assert stop - start not in told, "a failed request was reported as done"
        raise
    return bytes(buffer), told


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        ("short body", IntegrityError),
        ("long body", IntegrityError),
        ("wrong range", IntegrityError),
        ("no range", IntegrityError),
        ("whole object", IntegrityError),
        ("other etag", ObjectChanged),
        ("other size", ObjectChanged),
        ("cut", StoreUnavailable),
        ("503", StoreUnavailable),
        ("403", AccessDenied),
        ("301", UsageError),
        ("garbage", IntegrityError),
    ],
)
def test_a_lying_get_is_caught(
    store: Store, origin: LyingServer, info: ObjectInfo, lie: Lie, error: type[Exception]
) -> None:
    origin.lie(lie)
    ranges = ((0, len(DATA)), (1000, 2_000_000), (len(DATA) - 5, len(DATA)))
    # What passes is tried again with pauses: once is enough.
    for start, stop in ranges[: 1 if error is StoreUnavailable else 3]:
        with pytest.raises(error):
            fetch_recorded(store, info, start, stop)
    origin.tell_the_truth()
    assert fetch(store, info) == DATA


@pytest.mark.parametrize("lie", ["hang", "hang in body"])
def test_a_get_without_a_byte_ends_at_its_timeout(
    store: Store, hasty: Store, origin: LyingServer, info: ObjectInfo, lie: Lie
) -> None:
    origin.lie(lie)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        fetch_recorded(hasty, info, 0, len(DATA))
    assert time.monotonic() - start < PATIENCE_S
    origin.tell_the_truth()
    assert fetch(store, info) == DATA


@pytest.mark.parametrize("lie", ["503", "cut"])
@pytest.mark.parametrize("library", ["auto", "obstore"], indirect=True)
def test_a_failure_that_passes_is_not_noticed(store: Store, origin: LyingServer, lie: Lie) -> None:
    info = listing(store)[0]["model.bin"]
    origin.lie(lie, times=2)
    assert fetch_recorded(store, info, 100, len(DATA))[0] == DATA[100:]


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
@pytest.mark.parametrize("library", ["auto"], indirect=True)
def test_a_refusal_after_other_failures_is_no_success(store: Store, origin: LyingServer, failures: int) -> None:
    info = listing(store)[0]["model.bin"]
    origin.lie("503", times=failures)
    origin.lie("403")
    with pytest.raises(AccessDenied):
        fetch(store, info)


@pytest.mark.parametrize(
    ("lie", "skip", "error"),
    [
        ("cut", 1, StoreUnavailable),
        ("503", 1, StoreUnavailable),
        ("hang", 1, StoreUnavailable),
        ("garbage", 0, StoreUnavailable),
        ("truncated", 0, IntegrityError),
        ("same page", 0, IntegrityError),
        ("403", 1, AccessDenied),
        ("301", 0, UsageError),
    ],
)
def test_a_listing_that_fails_at_some_page_is_an_error_and_never_short(
    store: Store, hasty: Store, origin: LyingServer, lie: Lie, skip: int, error: type[Exception]
) -> None:
    origin.page_size = 4
    for number in range(10):
        origin.put("bucket", f"d/{number}", b"x")
    origin.lie(lie, operation="LIST", skip=skip)
    start = time.monotonic()
    with pytest.raises(error):
        listing(hasty if error is StoreUnavailable else store, "d")
    assert time.monotonic() - start < PATIENCE_S
    origin.tell_the_truth()
    assert len(listing(store, "d")[0]) == 10


@pytest.mark.parametrize("lie", ["cut", "503", "garbage"])
def test_a_page_that_fails_once_is_asked_for_again(store: Store, origin: LyingServer, lie: Lie) -> None:
    origin.page_size = 4
    for number in range(10):
        origin.put("bucket", f"d/{number}", b"x")
    origin.lie(lie, operation="LIST", skip=1, times=1)
    assert len(listing(store, "d")[0]) == 10


def test_a_redirect_names_the_region(store: Store, origin: LyingServer) -> None:
    origin.lie("301", operation="LIST")
    with pytest.raises(UsageError, match=f"--region {OTHER_REGION}"):
        store.probe()


def test_a_missing_bucket_says_what_to_check(opener: Opener) -> None:
    with pytest.raises(NotFound, match=r"no bucket 'nowhere'.*--endpoint-url"):
        opener("s3://nowhere").probe()


def test_keys_that_no_path_library_takes_survive(store: Store, origin: LyingServer, opener: Opener) -> None:
    keys = [
        "a//b",
        "/lead",
        "dir/../x",
        "dir/./y",
        "/",
        "//",
        "tail/x//y",
        "%2F",
        "a\\b",
        "new\nline",
        "tab\t",
        "x+y z",
    ]
    for key in keys:
        origin.put("bucket", key, key.encode() * 50)
    for key in keys:
        version = origin.put("bucket", key, key.encode() * 50)
        got = fetch(store, ObjectInfo(key, len(key) * 50, version, 0.0), 3, 40)
        assert got == (key.encode() * 50)[3:40]
        assert origin.requests[-1].key == key
    with pytest.raises(UsageError, match="is an object"):
        opener("s3://bucket//lead").probe()
    assert sorted(listing(store, "tail/x")[1]) == [""]
    assert "new\nline" in listing(store)[0]
    assert "x+y z" in listing(store)[0]


def test_an_empty_bucket_can_be_probed_and_is_empty(store: Store, origin: LyingServer) -> None:
    origin.delete("bucket", "model.bin")
    store.probe()
    assert listing(store) == ({}, [])


def test_a_small_root_is_listed_once_to_probe_and_look_at_and_then_anew(store: Store, origin: LyingServer) -> None:
    origin.forget_requests()
    start = time.monotonic()
    store.probe()
    assert list(walk(store))
    if time.monotonic() - start < PROBE_VALID_S:
        assert origin.lists() == 1
    origin.put("bucket", "new", b"x")
    assert "new" in listing(store)[0]
    assert origin.gets() == 0


def test_the_first_page_of_a_root_with_more_is_asked_for_again(store: Store, origin: LyingServer) -> None:
    origin.page_size = 4
    for number in range(10):
        origin.put("bucket", f"{number}", b"x")
    store.probe()
    assert len(listing(store)[0]) == 11
    assert origin.lists() == 1 + 3


def test_a_server_that_comes_back_is_used_again(
    store: Store, hasty: Store, origin: LyingServer, info: ObjectInfo
) -> None:
    assert fetch(store, info) == DATA
    origin.stop()
    with pytest.raises(StoreUnavailable):
        fetch(hasty, info)
    with pytest.raises(StoreUnavailable):
        listing(hasty)
    origin.start()
    assert fetch(store, info) == DATA
    assert listing(store)[0]
