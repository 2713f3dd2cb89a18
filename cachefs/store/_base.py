"""What all stores do alike at the beginning of a fetch."""

from collections.abc import Callable

from cachefs.chunk import ObjectId


class RangeStore:
    """A store that fetches ranges which are not empty and fit their buffer."""

    def fetch_into(
        self,
        buffer: memoryview,
        object_id: ObjectId,
        start: int,
        stop: int,
        progress: Callable[[int], None],
    ) -> None:
        """See Store."""
        assert 0 <= start <= stop <= object_id.size, (start, stop, object_id)
        assert len(buffer) >= stop - start, (len(buffer), start, stop)
        if start == stop:
            progress(0)
            return
        self._fetch_range(buffer[: stop - start], object_id, start, progress)

    def _fetch_range(
        self, buffer: memoryview, object_id: ObjectId, start: int, progress: Callable[[int], None]
    ) -> None:
        """As fetch_into; what is asked for is at least one byte and just as long as the buffer."""
        raise NotImplementedError
