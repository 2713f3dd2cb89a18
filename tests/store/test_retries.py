"""How often a store is asked again."""

from cachefs.store.direct import RetryBudget


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
