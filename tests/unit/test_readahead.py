"""The readahead window: what a handle will want next."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.chunk import CHUNK_BYTES, MIB, chunk_count
from cachefs.formats import Layout
from cachefs.readahead import STREAMS_MAX, WINDOWS, Readahead

GIB = 1024 * MIB
FULL = WINDOWS[-1]


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
    assert widths == [4, 8, FULL, FULL]
    assert list(readahead.wanted()) == list(range(1, 1 + FULL))


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
    assert wanted[4:] == list(range(1, 1 + FULL))


def test_going_back_to_an_earlier_stream_goes_on_with_its_window():
    readahead = Readahead()
    for number in range(8):
        readahead.advance(number * MIB, MIB, GIB)
    readahead.advance(64 * CHUNK_BYTES, 4096, GIB)
    readahead.advance(8 * MIB, MIB, GIB)
    assert list(readahead.wanted())[:FULL] == list(range(2, 2 + FULL))


def test_reads_that_overtake_each_other_stay_one_stream():
    readahead = Readahead()
    for number in (0, 2, 1, 4, 3, 6, 5, 8, 7):
        readahead.advance(number * MIB, MIB, GIB)
    assert list(readahead.wanted()) == list(range(2, 2 + FULL))


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


# -- with the layout of the file known

TENSORS = Layout([(CHUNK_BYTES * 10 * n + 1000, CHUNK_BYTES * 10 * (n + 1) + 1000) for n in range(12)])
"""12 tensors of ten chunks each, the first behind a header of 1000 bytes."""
SIZE = TENSORS.spans()[-1][1]


def test_jump_to_a_tensor_wants_all_of_it_at_once_and_nothing_behind_it():
    readahead = Readahead()
    readahead.advance(0, 4096, SIZE, TENSORS)
    start, stop = TENSORS.spans()[3]
    readahead.advance(start, 4096, SIZE, TENSORS)
    wanted = list(readahead.wanted())
    assert wanted[:10] == list(range(31, 41)) == list(range(chunk_count(start), chunk_count(stop)))
    assert wanted[10:] == [1, 2]  # of the start of the file


def test_page_fault_that_begins_in_the_tensor_before_is_for_the_one_behind_it():
    readahead = Readahead()
    start, _ = TENSORS.spans()[3]
    readahead.advance(start - 64 * 1024, 128 * 1024, SIZE, TENSORS)
    assert list(readahead.wanted()) == list(range(31, 41))


def test_huge_tensor_is_wanted_by_the_window():
    layout = Layout([(CHUNK_BYTES, 100 * CHUNK_BYTES), (100 * CHUNK_BYTES, 200 * CHUNK_BYTES)])
    readahead = Readahead()
    readahead.advance(100 * CHUNK_BYTES, 4096, 200 * CHUNK_BYTES, layout)
    assert list(readahead.wanted()) == list(range(101, 101 + FULL))


def test_jump_into_the_middle_of_a_tensor_has_to_prove_itself():
    readahead = Readahead()
    start, _ = TENSORS.spans()[3]
    readahead.advance(start + 3 * CHUNK_BYTES, 4096, SIZE, TENSORS)
    assert list(readahead.wanted()) == []


def test_tensor_read_to_its_end_opens_no_other_until_the_reader_gets_there():
    readahead = Readahead()
    start, stop = TENSORS.spans()[3]
    for offset in range(start, stop, MIB):
        readahead.advance(offset, min(MIB, stop - offset), SIZE, TENSORS)
    assert list(readahead.wanted()) == []
    for offset in range(stop, stop + 3 * MIB, MIB):
        readahead.advance(offset, MIB, SIZE, TENSORS)
    assert list(readahead.wanted()) == list(range(41, 41 + FULL))


def test_layout_changes_nothing_for_a_sequential_reader():
    plain, knowing = Readahead(), Readahead()
    for offset in range(0, SIZE, MIB):
        plain.advance(offset, MIB, SIZE)
        knowing.advance(offset, MIB, SIZE, TENSORS)
        assert plain.wanted() == knowing.wanted()
        assert plain.beyond() == knowing.beyond()
        assert knowing.spare(SIZE) is None


def test_layout_that_comes_after_the_jump_opens_its_window():
    readahead = Readahead()
    start, _ = TENSORS.spans()[3]
    readahead.advance(start, 4096, SIZE)
    assert list(readahead.wanted()) == []
    assert readahead.learned(SIZE, TENSORS)
    assert list(readahead.wanted()) == list(range(31, 41))
    assert not readahead.learned(SIZE, TENSORS)


def spares(readahead: Readahead, size: int = SIZE, most: int = 1000) -> list[int]:
    found: list[int] = []
    while len(found) < most and (index := readahead.spare(size)) is not None:
        found.append(index)
        readahead.spare_done(started=True)
    return found


def jump(readahead: Readahead, number: int, length: int = 4096) -> None:
    readahead.advance(TENSORS.spans()[number][0], length, SIZE, TENSORS)


def test_reader_of_one_tensor_has_no_use_for_the_rest():
    readahead = Readahead()
    readahead.advance(0, 4096, SIZE, TENSORS)
    jump(readahead, 3)
    jump(readahead, 3)
    assert spares(readahead) == []


def test_second_tensor_makes_a_load_and_the_rest_follows_in_file_order():
    readahead = Readahead()
    jump(readahead, 3)
    jump(readahead, 7)
    assert spares(readahead) == list(range(81, 81 + FULL))  # until more is read


def test_rest_is_never_more_than_what_was_read_and_a_window():
    readahead = Readahead()
    jump(readahead, 3)
    jump(readahead, 7, 5 * CHUNK_BYTES)
    assert len(spares(readahead)) == FULL + 5
    jump(readahead, 9, 2 * CHUNK_BYTES)
    assert len(spares(readahead)) == 2


def test_rest_goes_round_the_file_once_and_then_a_window_behind_its_end():
    readahead = Readahead()
    jump(readahead, 3)
    jump(readahead, 7, 10 * CHUNK_BYTES)
    for _ in range(40):
        jump(readahead, 7, 10 * CHUNK_BYTES)
    count = chunk_count(SIZE)
    assert spares(readahead) == [*range(81, count), *range(81), *range(count, count + FULL)]


def test_local_chunks_do_not_count():
    readahead = Readahead()
    jump(readahead, 3)
    jump(readahead, 7)
    for _ in range(30):
        assert readahead.spare(SIZE) is not None
        readahead.spare_done(started=False)
    assert len(spares(readahead)) == FULL


# -- behind the end of the file


def test_window_goes_on_behind_the_end_for_the_file_that_is_read_next():
    readahead = Readahead()
    size = 30 * CHUNK_BYTES
    for offset in range(0, size, MIB):
        readahead.advance(offset, MIB, size)
        assert len(readahead.wanted()) + readahead.beyond() == FULL or offset < 2 * MIB
    assert readahead.beyond() == FULL


def test_header_of_a_small_file_opens_nothing_behind_it():
    readahead = Readahead()
    readahead.advance(0, 1 * MIB, CHUNK_BYTES)
    assert readahead.beyond() == 0


@settings(deadline=None)
@given(
    tensors=st.lists(st.tuples(st.integers(0, CHUNK_BYTES), st.integers(1, 12 * CHUNK_BYTES)), max_size=12),
    reads=st.lists(st.tuples(st.integers(0, 64 * CHUNK_BYTES), st.integers(0, 2 * MIB)), max_size=40),
    known_from=st.integers(0, 40),
)
def test_any_layout_and_any_reads_want_what_exists_within_the_bounds(tensors, reads, known_from):
    spans, at = [], 8
    for gap, length in tensors:
        spans.append((at + gap, at + gap + length))
        at = spans[-1][1]
    layout, size = Layout(spans), at
    readahead = Readahead()
    taken = 0
    for number, (offset, length) in enumerate(reads):
        readahead.advance(offset, length, size, layout if number >= known_from else None)
        if number == known_from:
            readahead.learned(size, layout)
        wanted = list(readahead.wanted())
        assert len(wanted) == len(set(wanted)) <= STREAMS_MAX * FULL
        assert all(0 <= index < chunk_count(size) for index in wanted)
        assert 0 <= readahead.beyond() <= FULL
        found = spares(readahead, size)
        assert all(0 <= index < chunk_count(size) + FULL for index in found)
        taken += len(found)
    assert taken <= FULL + sum(length for _, length in reads) // CHUNK_BYTES


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
        assert len(wanted) == len(set(wanted)) <= STREAMS_MAX * FULL
        assert all(0 <= index < chunk_count(size) for index in wanted)
