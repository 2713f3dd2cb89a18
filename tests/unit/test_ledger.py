"""The ledger: what outlives a SIGKILL of the server."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.ledger import COUNTERS, LEDGER_BYTES_MIN, Ledger, Mode, OpenEntry

SIZE = 65536


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("ledger")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def test_open_inodes_are_there_for_the_next_server(fd):
    first = Ledger(fd)
    first.record(OpenEntry(7, Mode.CACHED, 2))
    first.record(OpenEntry(2**32 - 1, Mode.PASSTHROUGH, 1))
    first.record(OpenEntry(9, Mode.CACHED, 1))
    first.record(OpenEntry(9, Mode.CACHED, 0))
    # no close(): a killed server closes nothing
    assert sorted(Ledger(fd).entries()) == [OpenEntry(7, Mode.CACHED, 2), OpenEntry(2**32 - 1, Mode.PASSTHROUGH, 1)]


def test_full_table_says_that_it_overflowed_and_keeps_what_it_has():
    fd = os.memfd_create("ledger")
    try:
        os.ftruncate(fd, LEDGER_BYTES_MIN)
        ledger = Ledger(fd)
        ledger.record(OpenEntry(1, Mode.CACHED, 1))
        assert not ledger.overflowed
        ledger.record(OpenEntry(2, Mode.CACHED, 1))
        assert Ledger(fd).overflowed
        assert Ledger(fd).entries() == [OpenEntry(1, Mode.CACHED, 1)]
    finally:
        os.close(fd)


def test_counters_go_on_where_the_last_server_was(fd):
    first = Ledger(fd)
    assert set(first.counters) == {0.0}
    first.counters[3] += 5.5
    first.record(OpenEntry(1, Mode.CACHED, 1))
    second = Ledger(fd)
    second.counters[3] += 1
    assert first.counters[3] == 6.5
    assert len(second.counters) == COUNTERS
    second.close()


def test_the_mark_of_inode_numbers_only_rises(fd):
    assert Ledger(fd).next_inode == 0
    Ledger(fd).next_inode = 2**32
    assert Ledger(fd).next_inode == 2**32
    assert Ledger(fd).entries() == []
    with pytest.raises(AssertionError):
        Ledger(fd).next_inode = 7


def test_passthrough_check_is_remembered(fd):
    assert not Ledger(fd).passthrough_checked
    Ledger(fd).note_passthrough_checked()
    assert Ledger(fd).passthrough_checked


def test_end_of_a_passthrough_check_that_failed_is_remembered(fd):
    assert not Ledger(fd).passthrough_check_ended
    Ledger(fd).note_passthrough_check_ended()
    assert Ledger(fd).passthrough_check_ended
    assert not Ledger(fd).passthrough_checked


@pytest.mark.parametrize(("flags", "ended"), [(0, False), (1, True), (2, False), (3, True)])
def test_ledger_of_a_version_that_noted_no_ends_of_checks_is_read_right(fd, flags, ended):
    """Bit 0: a check succeeded; bit 1: the table overflowed."""
    Ledger(fd)
    os.pwrite(fd, flags.to_bytes(8, sys.byteorder), 8)
    ledger = Ledger(fd)
    assert (ledger.passthrough_checked, ledger.overflowed) == (bool(flags & 1), bool(flags & 2))
    assert ledger.passthrough_check_ended == ended
    ledger.note_passthrough_check_ended()
    # An older version looks at its two bits only, and sets bits without touching others.
    word = int.from_bytes(os.pread(fd, 8, 8), sys.byteorder)
    assert word & 3 == flags
    os.pwrite(fd, (word | 1).to_bytes(8, sys.byteorder), 8)
    assert Ledger(fd).passthrough_check_ended


@settings(deadline=None)
@given(
    st.lists(
        st.builds(OpenEntry, st.integers(1, 6), st.sampled_from(Mode), st.integers(0, 3), st.booleans()), max_size=60
    )
)
def test_table_reads_back_as_it_was_written(steps):
    fd = os.memfd_create("ledger")
    try:
        os.ftruncate(fd, LEDGER_BYTES_MIN + 8 * 8)
        ledger = Ledger(fd)
        model: dict[int, OpenEntry] = {}
        for entry in steps:
            ledger.record(entry)
            model.pop(entry.inode, None)
            if entry.opens or entry.uncertain:
                model[entry.inode] = entry
            assert ledger.last_inode == entry.inode
            assert sorted(ledger.entries()) == sorted(model.values())
        assert sorted(Ledger(fd).entries()) == sorted(model.values())
    finally:
        os.close(fd)
