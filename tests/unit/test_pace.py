"""How many GETs prefetch has in flight, on links that are simulated."""

import random
from collections.abc import Callable

import pytest

from cachefs.chunk import CHUNK_BYTES
from cachefs.pace import LIMIT_MAX, LIMIT_MIN, LIMIT_START, SPARE_START, Pace

RTT_S = 0.03


def run(duration: Callable[[int], float], gets: int = 400, start: float = LIMIT_START) -> list[int]:
    """The limit each time that a GET ends: a reader's ramp, then always as many as the limit allows, and his own."""
    pace = Pace(start)
    seen = []
    ramp = [1, 3, 3, 5, 9]
    for number in range(gets):
        in_flight = ramp[number] if number < len(ramp) else int(pace.limit) + 1
        pace.note(duration(in_flight), in_flight)
        seen.append(int(pace.limit))
    return seen


def shared(bytes_per_s: float) -> Callable[[int], float]:
    """A link that all connections share."""
    return lambda in_flight: RTT_S + in_flight * CHUNK_BYTES / bytes_per_s


def each(bytes_per_s: float) -> Callable[[int], float]:
    """A link that gives each connection the same, however many there are."""
    return lambda in_flight: RTT_S + CHUNK_BYTES / bytes_per_s


@pytest.mark.parametrize("bytes_per_s", [10e6, 90e6, 250e6])
def test_connections_that_do_not_share_get_all_that_there_are(bytes_per_s: float) -> None:
    assert run(each(bytes_per_s))[-1] == LIMIT_MAX


@pytest.mark.parametrize("bytes_per_s", [25e6, 100e6, 250e6, 500e6])
def test_a_link_that_a_few_fill_is_kept_full_and_no_more(bytes_per_s: float) -> None:
    settled = run(shared(bytes_per_s))[50:300]
    assert max(settled) <= 14
    # As many as the link holds in a round trip are enough to keep it busy.
    assert min(settled) * CHUNK_BYTES >= bytes_per_s * RTT_S


def test_a_link_that_is_faster_than_anybody_waits_has_no_limit() -> None:
    assert run(shared(3e9))[-1] == LIMIT_MAX


def test_durations_that_vary_by_half_do_not_starve_a_link() -> None:
    chance = random.Random(1)
    settled = run(lambda in_flight: each(40e6)(in_flight) * chance.uniform(1, 1.5))[200:]
    assert min(settled) >= 12


def test_a_link_that_changed_is_found_out() -> None:
    pace = Pace()
    for duration in (shared(100e6), each(40e6)):
        for _ in range(2000):
            pace.note(duration(int(pace.limit) + 1), int(pace.limit) + 1)
    assert pace.limit == LIMIT_MAX


def test_the_limit_starts_and_stays_within_its_bounds() -> None:
    assert LIMIT_MIN <= LIMIT_START <= LIMIT_MAX
    chance = random.Random(2)
    assert all(LIMIT_MIN <= limit <= LIMIT_MAX for limit in run(lambda in_flight: chance.uniform(0, 3)))


def test_what_nobody_waits_for_begins_with_few_and_finds_the_same_limits() -> None:
    assert run(each(90e6), gets=10, start=SPARE_START)[0] < 8
    assert run(each(90e6), gets=60, start=SPARE_START)[-1] == LIMIT_MAX
    settled = run(shared(250e6), start=SPARE_START)
    assert max(settled) <= 14
    assert min(settled) * CHUNK_BYTES >= 250e6 * RTT_S
