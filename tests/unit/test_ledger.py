"""The ledger: what outlives a SIGKILL of the server."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from cachefs.ledger import LEDGER_BYTES_MIN, Ledger, Mode, OpenEntry

SIZE = 65536


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("ledger")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def counters() -> list[Counter]:
    registry = CollectorRegistry()
    return [
        Counter("cachefs_read_bytes", "Bytes.", ("tier", "result"), registry=registry),
        Counter("cachefs_store_bytes", "Bytes.", registry=registry),
    ]


def test_open_inodes_are_there_for_the_next_server(fd):
    first = Ledger(fd)
    first.record(7, Mode.CACHED, 2)
    first.record(2**32 - 1, Mode.PASSTHROUGH, 1)
    first.record(9, Mode.CACHED, 1)
    first.record(9, Mode.CACHED, 0)
    # no close(): a killed server closes nothing
    assert sorted(Ledger(fd).entries()) == [OpenEntry(7, Mode.CACHED, 2), OpenEntry(2**32 - 1, Mode.PASSTHROUGH, 1)]


def test_full_table_says_that_it_overflowed_and_keeps_what_it_has():
    fd = os.memfd_create("ledger")
    try:
        os.ftruncate(fd, LEDGER_BYTES_MIN)
        ledger = Ledger(fd)
        ledger.record(1, Mode.CACHED, 1)
        assert not ledger.overflowed
        ledger.record(2, Mode.CACHED, 1)
        assert Ledger(fd).overflowed
        assert Ledger(fd).entries() == [OpenEntry(1, Mode.CACHED, 1)]
    finally:
        os.close(fd)


def test_counters_go_on_where_the_last_server_was(fd):
    read_bytes, store_bytes = counters()
    read_bytes.labels("local", "hit").inc(5)
    read_bytes.labels("store", "miss").inc(8)
    store_bytes.inc(8)
    Ledger(fd).save([read_bytes, store_bytes])
    after = counters()
    Ledger(fd).restore(after)
    after[1].inc(1)
    Ledger(fd).save(after)
    last = counters()
    Ledger(fd).restore(last)
    assert [sample.value for metric in last[0].collect() for sample in metric.samples if "_total" in sample.name] == [
        5,
        8,
    ]
    assert [sample.value for metric in last[1].collect() for sample in metric.samples if "_total" in sample.name] == [9]


def test_torn_write_of_the_counters_leaves_the_last_good_copy(fd):
    values = counters()
    values[1].inc(3)
    ledger = Ledger(fd)
    ledger.save(values)
    with memoryview(ledger._map) as view:  # a kill in the middle of the next save: the other copy is garbage
        view[4096 : 4096 + 16384] = b"\xff" * 16384
    after = counters()
    Ledger(fd).restore(after)
    assert after[1].collect()[0].samples[0].value == 3
    ledger.close()


def test_passthrough_check_is_remembered(fd):
    assert not Ledger(fd).passthrough_checked
    Ledger(fd).note_passthrough_checked()
    assert Ledger(fd).passthrough_checked


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(Mode), st.integers(0, 3)), max_size=60))
def test_table_reads_back_as_it_was_written(steps):
    fd = os.memfd_create("ledger")
    try:
        os.ftruncate(fd, LEDGER_BYTES_MIN + 8 * 8)
        ledger = Ledger(fd)
        model: dict[int, OpenEntry] = {}
        for inode, mode, count in steps:
            ledger.record(inode, mode, count)
            model.pop(inode, None)
            if count:
                model[inode] = OpenEntry(inode, mode, count)
            assert sorted(ledger.entries()) == sorted(model.values())
        assert sorted(Ledger(fd).entries()) == sorted(model.values())
    finally:
        os.close(fd)
