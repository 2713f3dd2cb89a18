"""Single flight: one task per key does the work, whoever asks for it meanwhile waits for that task.

The tasks belong to this object's own nursery: cancelling a waiter never cancels the work of the others. A
failure reaches every waiter, and the next one who asks tries again.
"""

import copy
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from cachefs.errors import StoreUnavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    def __init__(self) -> None:
        self.done = trio.Event()
        self.values: list[V] = []  # empty: failed
        self.error: Exception | None = None


class Flights(Generic[K, V]):
    """Run `run` in a nursery before the first join()."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the nursery until cancelled; what is in flight then fails with StoreUnavailable."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def join(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The value of the flight for `key`, which is started if there is none."""
        flight = self._flights.get(key)
        if flight is None:
            if self._nursery is None:
                raise StoreUnavailable("the server is not running, or shutting down")
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._fly, key, flight, work)
        await flight.done.wait()
        if flight.error is not None:
            raise copy.copy(flight.error) from flight.error  # a copy: each waiter grows a traceback of its own
        return flight.values[0]

    async def join_later(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """As join(), but never a flight that started before this call."""
        earlier = self._flights.get(key)
        if earlier is not None:
            await earlier.done.wait()
        return await self.join(key, work)

    async def _fly(self, key: K, flight: _Flight[V], work: Callable[[], Awaitable[V]]) -> None:
        try:
            flight.values.append(await work())
        except Exception as exc:
            flight.error = exc
        finally:
            if not flight.values and flight.error is None:  # cancelled
                flight.error = StoreUnavailable("the server is shutting down")
            assert self._flights.pop(key) is flight
            flight.done.set()

    def check_invariants(self) -> None:
        # INVARIANT: what can be joined is not done.
        assert not any(flight.done.is_set() for flight in self._flights.values())
