"""Spans cover exactly what was asked for, in order, inside the object."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cachefs.chunk import CHUNK_BYTES, ObjectId, chunk_count, chunk_length, chunk_offset, chunk_spans


@given(
    size=st.integers(0, 5 * CHUNK_BYTES), offset=st.integers(0, 6 * CHUNK_BYTES), length=st.integers(0, 3 * CHUNK_BYTES)
)
def test_spans_cover_the_range_once_and_in_order(size: int, offset: int, length: int) -> None:
    covered = []
    for span in chunk_spans(size, offset, length):
        assert 0 <= span.start < span.stop <= chunk_length(size, span.index)
        covered.append((chunk_offset(span.index) + span.start, chunk_offset(span.index) + span.stop))
    expected = max(0, min(size, offset + length) - offset)
    assert sum(stop - start for start, stop in covered) == expected
    if covered:
        assert covered[0][0] == offset
        assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


@given(size=st.integers(1, 5 * CHUNK_BYTES))
def test_chunk_lengths_add_up_to_the_size(size: int) -> None:
    assert sum(chunk_length(size, index) for index in range(chunk_count(size))) == size


def test_an_object_key_tells_versions_apart() -> None:
    first = ObjectId("s3://b", "k", 1, "etag1")
    assert first.key == ObjectId("s3://b", "k", 1, "etag1").key
    assert len({first.key, ObjectId("s3://b", "k", 1, "etag2").key, ObjectId("s3://b", "k", 2, "etag1").key}) == 3
