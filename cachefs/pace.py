"""PURE. How many GETs a source is asked at a time for prefetch, from how long each of them took.

A link of which each connection gets only a part (object stores) wants many; on one that a few fill, more of them
only make a reader wait longer for the chunk that it needs now. Which of the two it is shows in the durations, as in
TCP Vegas: if they grow with the number in flight, the GETs wait for each other.
"""

LIMIT_MIN = 4.0
LIMIT_MAX = 24.0
"""192 MiB in flight."""

LIMIT_START = 22.0
"""512 MiB at 30 ms and 90 MB/s per connection are read at 1.06 GB/s (beginning with 16: 1.00), and readers that jump
about on a link of 250 MB/s get their 0.20 either way. With two more, a source's first READ beside a full window would
wait for a buffer (buffers.OWNER_SHARE) until one of that window ends."""

SPARE_START = 4.0
"""For what nobody waits for. 16 GETs that begin together share the link and end together: on one of 250 MB/s a model's
first chunk, which an engine asks for at its start, then takes 0.5 s instead of 0.15."""

SHORT_SECONDS = 0.15
"""A GET that takes no longer holds up nobody: 8 MiB at 30 ms and 90 MB/s are 0.12 s."""

WAITING_MIN = 2.0
WAITING_MAX = 5.0
"""Between them, the GETs that wait for others are enough to keep the link busy and few enough for a reader."""

STEP_DOWN = 0.5
BASE_GROWTH = 1.001
"""The shortest duration is forgotten by half in 700 GETs: links change. Until a reader starts anew, when few are in
flight, a link that is shared then looks more and more like one that is not, and gets as many as without a limit."""


class Pace:
    """`limit` is how many GETs may be in flight before prefetch adds no more."""

    def __init__(self, start: float = LIMIT_START) -> None:
        self.limit = start
        self._base_s = float("inf")

    def note(self, seconds: float, in_flight: int) -> None:
        """A GET of a whole chunk took `seconds`; when it started there were `in_flight`, itself included."""
        self._base_s = min(self._base_s * BASE_GROWTH, seconds)
        waiting = in_flight * (1 - self._base_s / seconds) if seconds > 0 else 0.0
        if seconds <= SHORT_SECONDS or waiting < WAITING_MIN:
            self.limit = min(LIMIT_MAX, self.limit + 1)
        elif waiting > WAITING_MAX:
            self.limit = max(LIMIT_MIN, self.limit - STEP_DOWN)
