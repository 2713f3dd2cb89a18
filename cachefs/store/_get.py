"""One attempt at a ranged GET, with a second GET for what is missing when the first one falls behind (a hedge).

Both are driven by the thread that wants the bytes: it waits on two sockets, and goes on with whichever gives a byte
first. Only that one writes into the buffer, so that no byte is written twice; the other connection is closed.
"""

import contextlib
import http.client
import math
import select
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from cachefs.chunk import MIB, ObjectId
from cachefs.errors import CachefsError, IntegrityError, StoreUnavailable
from cachefs.store._dial import until
from cachefs.store._http import Exchange, S3Client
from cachefs.store._s3 import check_range
from cachefs.store._straggler import CRAWL_SECONDS

FIRST_PIECE_BYTES = MIB // 8
"""A reader of a few KiB does not wait for more than this."""
PIECE_BYTES = MIB
"""A READ of the kernel's: a reader of a whole file wakes at once for each. Fewer wake-ups are less work."""

ASIDE_SECONDS = 1.0
"""How long the first GET is not looked at while a hedge connects, or while a head that has begun goes on."""
GLANCE_SECONDS = 0.001
"""A socket that can be read may hold less than a record of TLS: then nothing comes out of it."""


class Hedges(Protocol):
    """What the GETs of one store share: when to hedge, and how often."""

    @property
    def delay_s(self) -> float:
        """A GET that has waited so long for a byte may be hedged."""

    @property
    def crawl_bytes_per_s(self) -> float:
        """So may one whose body comes more slowly than this."""

    def start(self) -> bool:
        """Whether one hedge may be sent now; it counts as sent."""

    def won(self) -> None:
        """It was faster."""

    def note(self, wait_s: float) -> None:
        """A GET had to wait so long for a byte, at most."""

    def note_body(self, count: int, seconds: float) -> None:
        """After its first byte a body of `count` bytes took so long."""


def get_into(
    client: S3Client,
    buffer: memoryview,
    object_id: ObjectId,
    start: int,
    progress: Callable[[int], None],
    timeout_s: float,
    hedges: Hedges | None = None,
) -> None:
    """Fills `buffer` with the object's bytes from `start` on; see Store.fetch_into.

    `timeout_s` bounds the wait for the first byte, with connecting, and then each wait for another one, hedged or not.
    `hedges` None: there is never a second GET.
    """
    where = client.where(object_id.path)
    try:
        with _Get(client, object_id, start, start + len(buffer), timeout_s, hedges, where) as get:
            get.into(buffer, progress)
    except (OSError, http.client.HTTPException) as error:
        raise client.translate(error, where) from error
    progress(len(buffer))


class _Part(Exchange):
    """One GET of the bytes from `start` to the end of what is wanted."""

    def __init__(
        self, client: S3Client, object_id: ObjectId, start: int, stop: int, timeout_s: float, where: str
    ) -> None:
        headers = {"range": f"bytes={start}-{stop - 1}", "if-match": f'"{object_id.version}"'}
        super().__init__(client, object_id.path, {}, headers, timeout_s, where)
        self._object_id = object_id
        self._start = start
        self._stop = stop

    def accept(self) -> None:
        """Waits for the head if it is not there yet, and checks it before a byte of the body is believed."""
        if self.has_head:
            return
        self.read_head()
        self.raise_for_status(206, 200)
        check_range(
            self._object_id,
            self._start,
            self._stop,
            status=self.answer.status,
            content_range=self.answer.getheader("content-range", ""),
            length=self.answer.length,
            etag=self.answer.getheader("etag", ""),
        )
        self.answer.ear.end_s = math.inf
        # Only receive_into() can go on after a pause; to http.client it would be the end.
        self.answer.ear.patient = not self.answer.chunked


class _Get:
    """A context manager; `into` is called once. `_runner` is the GET whose bytes are taken."""

    def __init__(
        self,
        client: S3Client,
        object_id: ObjectId,
        start: int,
        stop: int,
        timeout_s: float,
        hedges: Hedges | None,
        where: str,
    ) -> None:
        self._client = client
        self._object_id = object_id
        self._stop = stop
        self._start = start
        self._timeout_s = timeout_s
        self._where = where
        self._hedges = hedges
        self._may_hedge = hedges is not None
        # A timeout that is short leaves the hedge half of it.
        self._delay_s = timeout_s if hedges is None else min(hedges.delay_s, timeout_s / 2)
        self._runner = self._part(start, timeout_s)
        self._end_s = self._runner.end_s
        """The first byte of the body is due by then (monotonic)."""
        self._second: _Part | None = None

    def _part(self, at: int, timeout_s: float) -> _Part:
        return _Part(self._client, self._object_id, at, self._stop, timeout_s, self._where)

    def __enter__(self) -> "_Get":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._runner.finish(error)
        if self._second is not None:
            self._second.finish(error)

    def into(self, buffer: memoryview, progress: Callable[[int], None]) -> None:
        """The bytes; `progress` is told of all but the last. Raises CachefsError, OSError, HTTPException."""
        waited_s = self._first_byte()
        began_s = heard_s = time.monotonic()
        self._runner.answer.ear.look_up_s = began_s + CRAWL_SECONDS if self._may_hedge else math.inf
        size, filled = len(buffer), 0
        while True:
            piece = PIECE_BYTES - filled % PIECE_BYTES if filled else FIRST_PIECE_BYTES
            answer = self._runner.answer
            got = answer.receive_into(buffer[filled : min(size, filled + piece)])
            filled += got
            now_s = time.monotonic()
            if got and filled == got:
                self._listen()
            if got:
                waited_s, heard_s = max(waited_s, now_s - heard_s), now_s
            elif not answer.ear.silent and not answer.ear.looked_up:
                raise StoreUnavailable(f"{self._where}: the answer was cut after {filled} of {size} bytes")
            if filled == size:
                break
            if got:
                progress(filled)
            if answer.ear.silent:
                self._silent(self._start + filled)
            elif answer.ear.looked_up:
                self._slow(self._start + filled, filled / (now_s - began_s))
        if self._hedges is not None:
            self._hedges.note(waited_s)
            if self._may_hedge:
                self._hedges.note_body(size, now_s - began_s)
        if self._runner.answer.has_more():
            raise IntegrityError(f"{self._where}: the store sent more than the {size} bytes of the part")

    def _first_byte(self) -> float:
        """Asks, waits for a head and checks it; returns after how many seconds it came."""
        asking = self._runner
        asking.ask()
        left_s = until(self._end_s)
        # Connecting may have taken most of the time: then too the hedge has half of what is left.
        self._runner.listen(min(self._delay_s, left_s / 2) if self._may_hedge else left_s)
        while not self._runner.has_head and not self._runner.heard():
            self._silent(self._start)
        waited_s = time.monotonic() - asking.asked_s
        self._runner.due(self._end_s)
        self._runner.accept()
        self._listen(until(self._end_s))
        return waited_s

    def _listen(self, most_s: float = math.inf) -> None:
        """How long the next bytes of the body may take: `most_s`, and no longer than that one may hedge or give up."""
        patient = self._may_hedge and not self._runner.answer.chunked
        self._runner.listen(min(most_s, self._delay_s if patient else self._timeout_s))

    # --- the second GET

    def _silent(self, at: int) -> None:
        """No byte came in time: from here on `_runner` is who gives the one at `at` first. Raises TimeoutError."""
        first = at == self._start
        end_s = self._end_s if first else time.monotonic() + self._timeout_s - self._delay_s
        if not self._may_hedge or time.monotonic() >= end_s:
            if self._hedges is not None:
                self._hedges.note(self._timeout_s)
            raise TimeoutError("no byte in time")
        second = self._hedge(at, end_s)
        if second is not None:
            self._runner.stay()
            self._go_on_with(self._race([self._runner, second], end_s))
        # Without a second one the store is slow as a whole, or there is no connection to be had.
        if second is None or first:
            self._runner.listen(until(end_s))

    def _slow(self, at: int, bytes_per_s: float) -> None:
        """The body is looked at: one that crawls is given up for a second GET, if that answers soon."""
        self._runner.answer.ear.look_up_s += CRAWL_SECONDS
        if self._hedges is None or not self._may_hedge or bytes_per_s >= self._hedges.crawl_bytes_per_s:
            return
        end_s = time.monotonic() + CRAWL_SECONDS
        second = self._hedge(at, end_s)
        if second is None:
            return
        winner = self._runner
        # Nobody looks at the first one meanwhile: its bytes wait in the socket.
        with contextlib.suppress(CachefsError, OSError, http.client.HTTPException):
            winner = self._race([second], end_s)
        self._go_on_with(winner)

    def _hedge(self, at: int, end_s: float) -> _Part | None:
        """A second GET, of the bytes from `at` on, as far as that it was sent; None when there may or can be none."""
        assert self._hedges is not None
        self._may_hedge = False
        self._runner.answer.ear.look_up_s = math.inf
        if not self._hedges.start():
            return None
        second = self._part(at, min(ASIDE_SECONDS, until(end_s)))
        self._runner.suspect()
        try:
            # When one idle connection died without a word, the others are likely to have died with it.
            second.ask(fresh=True)
        except (CachefsError, OSError, http.client.HTTPException):
            return None
        self._second = second
        return second

    def _race(self, runners: list[_Part], end_s: float) -> _Part:
        """Who gives a byte first, its head checked. Raises why none of them does (the first one's reason goes first).

        That the object is gone or changed counts only when the first one says so; then it is so.
        """
        failure: Exception | None = None
        while runners:
            ready = _readable(runners, end_s)
            if not ready:
                raise TimeoutError("no byte in time")
            for runner in ready:
                is_first = runner is self._runner
                try:
                    runner.listen(GLANCE_SECONDS)
                    if not runner.heard():
                        continue
                    runner.due(end_s if is_first else min(time.monotonic() + ASIDE_SECONDS, end_s))
                    runner.accept()
                    return runner
                except (CachefsError, OSError, http.client.HTTPException) as error:
                    if is_first and isinstance(error, CachefsError) and not isinstance(error, StoreUnavailable):
                        raise
                    if failure is None or is_first:
                        failure = error
                    runner.finish(error)
                    runners = [other for other in runners if other is not runner]
        assert failure is not None
        raise failure

    def _go_on_with(self, winner: _Part) -> None:
        """The other one's answer is not wanted any more: its connection is closed."""
        assert self._hedges is not None
        assert self._second is not None
        if winner is self._second:
            self._hedges.won()
            self._runner, self._second = self._second, self._runner
        self._second.finish(None)
        self._runner.listen(self._timeout_s)


def _readable(runners: list[_Part], end_s: float) -> list[_Part]:
    """Waits until one of them may have something to read; none when `end_s` (monotonic) comes before that."""
    connections = [runner.answer.ear.connection for runner in runners]
    # What TLS has taken in already, no poll tells.
    pending = [isinstance(connection, ssl.SSLSocket) and connection.pending() > 0 for connection in connections]
    if any(pending):
        return [runner for runner, has in zip(runners, pending, strict=True) if has]
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    ready = {number for number, _ in poll.poll(max(0.0, end_s - time.monotonic()) * 1000)}
    return [runner for runner, connection in zip(runners, connections, strict=True) if connection.fileno() in ready]
