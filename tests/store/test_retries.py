"""How often a store is asked again."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import StoreUnavailable
from cachefs.store import _http, direct
from cachefs.store._s3 import retry_after_s
from cachefs.store.direct import RetryBudget
from tests.store.conftest import fetch, listing, open_with
from tests.support.lying import Lie, LyingServer


def test_a_store_that_is_down_is_soon_asked_only_once_per_request() -> None:
    budget = RetryBudget(tokens=10)
    assert sum(budget.take() for _ in range(100)) == 10


def test_a_store_that_fails_a_fifth_of_all_requests_never_runs_out() -> None:
    budget = RetryBudget(tokens=10)
    for _ in range(1000):
        for _ in range(4):
            budget.succeeded(0)
        assert budget.take()
        budget.succeeded(1)


def test_retries_that_help_are_given_back_and_never_more_than_that() -> None:
    budget = RetryBudget(tokens=2)
    assert budget.take()
    assert budget.take()
    budget.succeeded(2)
    budget.succeeded(0)
    assert sum(budget.take() for _ in range(5)) == 2


def test_hedges_are_few_and_leave_half_of_the_bucket_to_retries() -> None:
    budget = RetryBudget(tokens=60)
    assert sum(budget.take_hedge() for _ in range(100)) == 5
    gets = 1200
    hedges = 0
    for _ in range(gets):
        budget.succeeded(0)
        hedges += budget.take_hedge()
    assert 0 < hedges <= gets / 12
    assert sum(budget.take() for _ in range(100)) >= 30


@given(st.integers(0, direct.ATTEMPTS), st.none() | st.floats(0, 1e6), st.floats(0, 1, allow_subnormal=False))
def test_a_pause_is_what_the_store_asks_for_and_more_by_chance(
    attempt: int, retry_after_s: float | None, chance: float
) -> None:
    pause_s = direct.backoff_s(attempt, retry_after_s, chance)
    asked_s = retry_after_s or 0.0
    assert asked_s <= pause_s <= asked_s + direct.BACKOFF_SECONDS * 2**attempt
    assert chance == 0 or retry_after_s or pause_s > 0


def test_retry_after_is_seconds_or_a_date() -> None:
    now_s = 1_700_000_000.0
    for header, seconds in {
        "0": 0.0,
        " 120 ": 120.0,
        "Tue, 14 Nov 2023 22:13:50 GMT": 30.0,
        "Tue, 14 Nov 2023 22:00:00 GMT": 0.0,
        "soon": None,
        "-5": None,
        "": None,
        None: None,
    }.items():
        assert retry_after_s(header, now_s) == seconds, header


@pytest.mark.parametrize("lie", ["503", "429"])
def test_the_store_says_how_long_to_wait_before_it_is_asked_again(origin: LyingServer, lie: Lie) -> None:
    origin.put("bucket", "model", b"data")
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=60.0)
    info = listing(store)[0]["model"]
    origin.retry_after = "1"
    origin.lie(lie, times=1)
    start = time.monotonic()
    assert fetch(store, info) == b"data"
    assert time.monotonic() - start >= 1.0
    assert origin.gets() == 2
    store.close()


@pytest.mark.parametrize("lie", ["503", "429"])
def test_a_store_that_wants_longer_than_a_get_may_take_is_not_asked_again(origin: LyingServer, lie: Lie) -> None:
    origin.put("bucket", "model", b"data")
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=60.0)
    info = listing(store)[0]["model"]
    origin.retry_after = "3600"
    origin.lie(lie)
    with pytest.raises(StoreUnavailable) as caught:
        fetch(store, info)
    assert caught.value.retry_after_s == 3600
    assert origin.gets() == 1
    store.close()


@pytest.mark.parametrize("lie", ["503", "429"])
def test_a_page_that_is_refused_comes_after_the_time_that_the_store_asked_for(origin: LyingServer, lie: Lie) -> None:
    origin.put("bucket", "model", b"data")
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=60.0)
    origin.retry_after = "1"
    origin.lie(lie, operation="LIST", times=1)
    start = time.monotonic()
    assert listing(store)[0]["model"].size == 4
    assert time.monotonic() - start >= 1.0
    store.close()


def test_an_answer_that_is_silent_is_asked_for_again_long_before_the_timeout(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "QUIET_SECONDS", 0.5)
    data = bytes(range(256)) * 2000
    origin.put("bucket", "model", data)
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url, timeout_s=600.0)
    info = listing(store)[0]["model"]
    for lie in ("hang", "hang in body"):
        origin.lie(lie, times=1)
        start = time.monotonic()
        assert fetch(store, info) == data
        assert time.monotonic() - start < 300
        origin.tell_the_truth()
    store.close()


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "IDLE_SECONDS_MAX", 0.0)
    origin.put("bucket", "model", b"data")
    store = open_with("s3://bucket", endpoint_url=origin.endpoint_url)
    info = listing(store)[0]["model"]
    for _ in range(3):
        assert fetch(store, info) == b"data"
    store.close()
