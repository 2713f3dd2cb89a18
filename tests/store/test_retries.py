"""How often a store is asked again."""

import time

import pytest

from cachefs.store import _http, direct
from cachefs.store.direct import RetryBudget
from tests.store.conftest import fetch, listing, open_with
from tests.support.lying import LyingServer


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


def test_an_answer_that_is_silent_is_asked_for_again_long_before_the_timeout(
    origin: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "QUIET_SECONDS", (0.5,))
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
