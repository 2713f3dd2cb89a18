"""The readahead window: what a handle will want next."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.chunk import CHUNK_BYTES, MIB, chunk_count
from cachefs.readahead import STREAMS_MAX, WINDOWS, Readahead

GIB = 1024 * MIB


def test_first_read_at_the_start_wants_the_next_two_chunks():
    readahead = Readahead()
    assert readahead.advance(0, 4096, GIB)
    assert list(readahead.wanted()) == [1, 2]


def test_sequential_reader_reaches_the_full_window_within_two_mebibytes():
    readahead = Readahead()
    widths = []
    for number in range(4):
        readahead.advance(number * MIB // 2, MIB // 2, GIB)
        widths.append(len(readahead.wanted()))
    assert widths == [4, 8, 24, 24]
    assert list(readahead.wanted()) == list(range(1, 25))


def test_random_small_reads_want_nothing():
    readahead = Readahead()
    for chunk in (90, 3, 57, 20, 71, 11, 101, 40):
        readahead.advance(chunk * CHUNK_BYTES + 12345, 4096, GIB)
        assert list(readahead.wanted()) == []


def test_far_seek_keeps_the_earlier_window():
    readahead = Readahead()
    for number in range(8):
        readahead.advance(number * MIB, MIB, GIB)
    readahead.advance(64 * CHUNK_BYTES, MIB, GIB)
    wanted = list(readahead.wanted())
    assert wanted[:4] == [65, 66, 67, 68]  # the stream in use comes first
    assert wanted[4:] == list(range(1, 25))


def test_going_back_to_an_earlier_stream_goes_on_with_its_window():
    readahead = Readahead()
    for number in range(8):
        readahead.advance(number * MIB, MIB, GIB)
    readahead.advance(64 * CHUNK_BYTES, 4096, GIB)
    readahead.advance(8 * MIB, MIB, GIB)
    assert list(readahead.wanted())[:24] == list(range(2, 26))


def test_reads_that_overtake_each_other_stay_one_stream():
    readahead = Readahead()
    for number in (0, 2, 1, 4, 3, 6, 5, 8, 7):
        readahead.advance(number * MIB, MIB, GIB)
    assert list(readahead.wanted()) == list(range(2, 26))


def test_window_ends_with_the_object():
    readahead = Readahead()
    size = 3 * CHUNK_BYTES + 1
    for number in range(4):
        readahead.advance(number * MIB, MIB, size)
    assert list(readahead.wanted()) == [1, 2, 3]
    assert not readahead.advance(size, MIB, size)


def test_repeated_read_of_the_same_bytes_changes_nothing():
    readahead = Readahead()
    readahead.advance(0, 4096, GIB)
    assert not readahead.advance(0, 4096, GIB)


@settings(deadline=None)
@given(
    size=st.integers(0, 64 * CHUNK_BYTES),
    reads=st.lists(st.tuples(st.integers(0, 64 * CHUNK_BYTES), st.integers(0, 2 * MIB)), max_size=40),
)
def test_wanted_chunks_exist_are_unique_and_bounded(size, reads):
    readahead = Readahead()
    for offset, length in reads:
        readahead.advance(offset, length, size)
        wanted = list(readahead.wanted())
        assert len(wanted) == len(set(wanted)) <= STREAMS_MAX * WINDOWS[-1]
        assert all(0 <= index < chunk_count(size) for index in wanted)
