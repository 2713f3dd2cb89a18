"""A GET that falls behind gets a second one for what is missing: the right bytes, once, and few of them."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import NotFound, ObjectChanged
from cachefs.store import ObjectInfo, Store, direct
from cachefs.store._straggler import (
    CRAWL_BYTES_MIN,
    DELAY_SECONDS_MAX,
    DELAY_SECONDS_MIN,
    SAMPLES_MAX,
    SAMPLES_MIN,
    Stragglers,
)
from cachefs.store.open import open_store
from tests.store.conftest import fetch, listing, volume
from tests.support.lying import Lie, LyingServer
from tests.support.servers import wait_until

DATA = bytes(range(256)) * 12_000
HALF = len(DATA) // 2
WHOLE = f"bytes=0-{len(DATA) - 1}"
SECOND_HALF = f"bytes={HALF}-{len(DATA) - 1}"
TRIES = 5


class WrongBytes(Exception):
    """Never to be seen, however busy the machine is."""


class Behind:
    """A store that has seen enough GETs to know a straggler after 0.25 s (on a quiet machine)."""

    def __init__(self, origin: LyingServer, stack: contextlib.ExitStack) -> None:
        self.origin = origin
        self.hedges: Counter[str] = Counter()
        self._lock = threading.Lock()
        origin.put("bucket", "model", DATA)
        self.store: Store = open_store(
            volume("s3://bucket", endpoint_url=origin.endpoint_url),
            get_timeout_s=600.0,
            list_timeout_s=600.0,
            count_hedge=self._count,
        )
        stack.callback(self.store.close)
        self.info: ObjectInfo = listing(self.store)[0]["model"]
        for _ in range(SAMPLES_MIN):
            assert fetch(self.store, self.info) == DATA
        self.hedges.clear()
        origin.forget_requests()

    def _count(self, result: str) -> None:
        with self._lock:
            self.hedges[result] += 1

    def fetch(self) -> None:
        """The whole object. Raises WrongBytes for a byte that is wrong, was not told of, or comes twice."""
        buffer = bytearray(len(DATA))
        told = [0]

        def progress(count: int) -> None:
            before = told[-1]
            if count <= before or buffer[before:count] != DATA[before:count]:
                raise WrongBytes(f"{before} to {count}")
            buffer[before:count] = bytes(count - before)  # who writes there again is seen at the end
            told.append(count)

        self.store.fetch_into(memoryview(buffer), self.store.object_id(self.info), 0, len(DATA), progress)
        if told[-1] != len(DATA) or any(buffer):
            raise WrongBytes(str(told[-1]))

    def ranges(self) -> list[str]:
        """What was asked for, in order."""
        return [request.range for request in self.origin.requests if request.key]


@contextlib.contextmanager
def then(wait: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Beside the block: `act` as soon as `wait` is true."""
    with ThreadPoolExecutor(1) as pool:

        def run() -> None:
            wait_until(wait, what="the requests have come")
            act()

        done = pool.submit(run)
        yield
        done.result(60)


Scenario = Callable[[Behind], None]
Play = Callable[[Scenario], None]


@pytest.fixture(params=["http", "https"])
def play(request: pytest.FixtureRequest, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Play:
    """Plays a scenario on a server of its own.

    On a machine that is busy a GET that nobody lies to can be a straggler too, and then other requests are made than
    those that the scenario waits for: it is played again. Wrong bytes are a failure at once.
    """
    # A hedge comes long before it.
    monkeypatch.setattr(direct, "QUIET_SECONDS", 15.0)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    tls = certificate if request.param == "https" else None

    def play_it(scenario: Scenario) -> None:
        for number in range(1, TRIES + 1):
            with LyingServer(tls=tls) as origin, contextlib.ExitStack() as stack:
                try:
                    scenario(Behind(origin, stack))
                except AssertionError:
                    if number == TRIES:
                        raise
                else:
                    return

    return play_it


http_only = pytest.mark.parametrize("play", ["http"], indirect=True)


def test_an_answer_that_does_not_begin_is_overtaken(play: Play) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie("hang", times=1)
        behind.fetch()
        assert behind.ranges() == [WHOLE, WHOLE]
        assert behind.hedges == {"started": 1, "won": 1}
        # The loser's connection is not used again, the winner's is.
        behind.origin.tell_the_truth()
        behind.fetch()
        assert behind.hedges == {"started": 1, "won": 1}

    play(scenario)


def test_an_answer_that_stops_in_the_middle_is_overtaken_from_there(play: Play) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie("hang in body", times=1)
        behind.fetch()
        assert behind.ranges() == [WHOLE, SECOND_HALF]
        assert behind.hedges == {"started": 1, "won": 1}

    play(scenario)


def test_an_answer_that_crawls_is_overtaken_from_where_it_is(play: Play) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie("crawl", times=1)
        behind.fetch()
        first, second = behind.ranges()
        assert first == WHOLE
        assert int(second.removeprefix("bytes=").partition("-")[0]) >= len(DATA) // 4
        assert behind.hedges == {"started": 1, "won": 1}

    play(scenario)


def overtaken_in_vain(play: Play, first: Lie, lie: Lie) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie(first, times=1)
        behind.origin.lie(lie, times=1)
        with then(lambda: behind.origin.lies_left == 0, behind.origin.tell_the_truth):
            behind.fetch()
        # A hedge that is cut in its body had won; what is missing then is asked for by a third GET.
        assert behind.hedges["won"] == 0 or lie == "cut"
        assert len(behind.ranges()) == 2 + behind.hedges["won"]

    play(scenario)


@pytest.mark.parametrize("lie", ["503", "404", "412", "403", "other etag", "wrong range", "cut", "whole object"])
@http_only
def test_a_hedge_that_gets_no_good_answer_changes_nothing(play: Play, lie: Lie) -> None:
    overtaken_in_vain(play, "hang", lie)


@pytest.mark.parametrize("lie", ["503", "other etag"])
def test_nor_does_it_in_the_middle_of_a_body(play: Play, lie: Lie) -> None:
    overtaken_in_vain(play, "hang in body", lie)


@pytest.mark.parametrize(("lie", "error"), [("404", NotFound), ("412", ObjectChanged)])
@http_only
def test_an_object_that_is_gone_is_gone_also_when_it_took_long(play: Play, lie: Lie, error: type[Exception]) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie("hang", times=2)

        def go() -> None:
            behind.origin.delete("bucket", "model")
            if lie == "412":
                behind.origin.put("bucket", "model", b"another version")
            behind.origin.tell_the_truth()

        with then(lambda: behind.origin.waiting == 2, go), pytest.raises(error):
            behind.fetch()

    play(scenario)


def test_a_connection_that_ends_leaves_the_hedge_to_go_on(play: Play) -> None:
    def scenario(behind: Behind) -> None:
        behind.origin.lie("hang, then cut", times=1)
        behind.origin.lie("hang", times=1)
        with then(lambda: behind.origin.waiting == 2, behind.origin.tell_the_truth):
            behind.fetch()
        assert behind.ranges() == [WHOLE, WHOLE]
        assert behind.hedges == {"started": 1, "won": 1}

    play(scenario)


def test_what_neither_gives_is_asked_for_again_from_where_it_broke_off(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "QUIET_SECONDS", 1.0)

    def scenario(behind: Behind) -> None:
        behind.origin.lie("hang in body", times=1)
        behind.origin.lie("hang", times=1)
        behind.fetch()
        assert behind.ranges() == [WHOLE, SECOND_HALF, SECOND_HALF]
        assert behind.hedges == {"started": 1}

    play(scenario)


@http_only
def test_a_store_that_is_slow_for_all_is_not_asked_twice_as_much(play: Play) -> None:
    gets = 48

    def scenario(behind: Behind) -> None:
        behind.origin.latency_s = 0.5
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda number: fetch(behind.store, behind.info, number, number + 100), range(gets)))
        assert parts == [DATA[number : number + 100] for number in range(gets)]
        assert 1 <= behind.hedges["started"] <= 5 + gets / 12
        assert len(behind.ranges()) == gets + behind.hedges["started"]

    play(scenario)


# --- the policy

waits = st.lists(st.floats(0, 1000), max_size=3 * SAMPLES_MAX)


@given(waits)
def test_the_delay_is_bounded_and_the_longest_while_little_is_known(waits_s: list[float]) -> None:
    stragglers = Stragglers()
    for wait_s in waits_s:
        stragglers.note(wait_s)
        assert DELAY_SECONDS_MIN <= stragglers.delay_s <= DELAY_SECONDS_MAX
    if len(waits_s) < SAMPLES_MIN:
        assert stragglers.delay_s == DELAY_SECONDS_MAX


@given(waits)
def test_few_of_the_gets_that_are_known_are_stragglers(waits_s: list[float]) -> None:
    stragglers = Stragglers()
    for wait_s in waits_s:
        stragglers.note(wait_s)
    last = waits_s[-SAMPLES_MAX:]
    if len(last) >= SAMPLES_MIN and stragglers.delay_s < DELAY_SECONDS_MAX:
        assert sum(wait_s > stragglers.delay_s for wait_s in last) <= 0.1 * len(last) + 1


@given(waits)
def test_what_was_long_ago_is_forgotten(waits_s: list[float]) -> None:
    stragglers = Stragglers()
    for wait_s in [*waits_s, *[0.2] * SAMPLES_MAX]:
        stragglers.note(wait_s)
    assert stragglers.delay_s == pytest.approx(0.6)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 100)), max_size=2 * SAMPLES_MAX))
def test_nothing_crawls_that_is_as_fast_as_half_of_the_others(bodies: list[tuple[int, float]]) -> None:
    stragglers = Stragglers()
    for count, seconds in bodies:
        stragglers.note_body(count, seconds)
    rates = [count / max(seconds, 1e-6) for count, seconds in bodies if count >= CRAWL_BYTES_MIN][-SAMPLES_MAX:]
    if len(rates) < SAMPLES_MIN:
        assert stragglers.crawl_bytes_per_s == 0
    else:
        assert sum(rate < stragglers.crawl_bytes_per_s for rate in rates) <= len(rates) / 2
