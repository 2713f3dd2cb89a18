"""PURE. When a GET is so far behind the others of its store that it is worth a second one (a hedge).

As in "The Tail at Scale" (Dean and Barroso, CACM 2013): the second request is sent when the first has waited longer
than nearly all others did, so that few are sent and the slowest readers gain most.
"""

from collections import deque

SAMPLES_MAX = 128
SAMPLES_MIN = 16
"""Of fewer GETs nobody can say which of them is slow."""

DELAY_SECONDS_MIN = 0.25
"""A lost packet is sent again after 0.2 s (Linux's smallest RTO): that much is no sign of a bad server."""
DELAY_SECONDS_MAX = 3.0
"""Also the delay while little is known."""
QUANTILE = 0.9
TIMES_QUANTILE = 3.0
"""GETs that share a link wait for each other: three times what nine of ten waited at most is no longer that."""

CRAWL_SECONDS = 1.0
"""How long a body is watched before it is said to crawl; then it is looked at again after as long."""
CRAWL_PART = 1 / 8
"""Of the median. TCP connections that share a link differ by a factor of three or four."""
CRAWL_BYTES_MIN = 1024 * 1024
"""Smaller bodies say nothing about a rate: they come with the first packets."""


class Stragglers:
    """What the last GETs of one store were like. One thread at a time.

    `delay_s`: a GET that has waited so long for a byte is a straggler, DELAY_SECONDS_MIN to DELAY_SECONDS_MAX.
    `crawl_bytes_per_s`: so is a body that comes more slowly; 0 while that cannot be said.
    """

    def __init__(self) -> None:
        self._waits_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._rates: deque[float] = deque(maxlen=SAMPLES_MAX)
        self.delay_s = DELAY_SECONDS_MAX
        self.crawl_bytes_per_s = 0.0

    def note(self, wait_s: float) -> None:
        """A GET waited `wait_s` at most, for its first byte or for a piece of its body."""
        self._waits_s.append(wait_s)
        if len(self._waits_s) >= SAMPLES_MIN:
            usual_s = _quantile(self._waits_s, QUANTILE)
            self.delay_s = min(DELAY_SECONDS_MAX, max(DELAY_SECONDS_MIN, TIMES_QUANTILE * usual_s))

    def note_body(self, count: int, seconds: float) -> None:
        """After its first byte a body of `count` bytes took `seconds`."""
        if count < CRAWL_BYTES_MIN:
            return
        self._rates.append(count / max(seconds, 1e-6))
        if len(self._rates) >= SAMPLES_MIN:
            self.crawl_bytes_per_s = _quantile(self._rates, 0.5) * CRAWL_PART


def _quantile(values: deque[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[int(part * (len(ordered) - 1))]
