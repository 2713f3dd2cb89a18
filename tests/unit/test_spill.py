"""Names go to the runtime directory when the disk of the index fails, and back when it works: what each step leaves."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs import index as index_module
from cachefs.chunk import ObjectId
from cachefs.errors import IndexFull, IndexUnwritable, NoSpace, StateDamaged, StateUnwritable
from cachefs.index import Index, Table, Write
from cachefs.inodes import Inodes, NoMark, Wanted
from cachefs.kernel.locks import remove_flat
from tests.support.failing_disk import Disk, Killed, Mortal


class Mount:
    """Servers of one mount, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state, self.spill = directory / "state", directory / "run" / "spill"
        self.spill.parent.mkdir()
        self.disk = Disk()
        self.session = "1"
        self.mark = NoMark()
        self.index: Mortal | None = None
        self.start()

    def start(self, *, read_only: str = "", dies_at: str = "") -> Mortal:
        self.end()
        self.index = Mortal(self.state, self.spill, self.session, self.disk, dies_at, read_only)
        self.inodes = Inodes(self.index, self.mark)
        return self.index

    def end(self) -> None:
        if self.index is not None:
            self.index.close()
        self.index = None

    def number(self, path: str) -> int:
        wanted = Wanted(path, ObjectId("s", path, 1, "v"), 0.0)
        (number,) = self.inodes.assign("view", [wanted])
        return number

    def listing(self, value: bytes | None) -> None:
        assert self.index is not None
        self.index.apply([Write(Table.LISTINGS, b"d", value)], durable=False)

    def shown(self) -> bytes | None:
        assert self.index is not None
        assert dict(self.index.scan(Table.LISTINGS)).get(b"d") == self.index.get(Table.LISTINGS, b"d")
        return self.index.get(Table.LISTINGS, b"d")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    found = Mount(tmp_path)
    yield found
    found.end()


def test_names_are_given_numbers_on_a_failed_disk_and_go_back_when_it_works(mount: Mount) -> None:
    first = mount.number("a")
    mount.listing(b"old")
    mount.disk.writes_left = 0
    second = mount.number("b")
    mount.listing(None)
    assert "names are kept" in mount.start(read_only="the disk is gone").trouble
    assert [mount.number(path) for path in "abc"] == [first, second, second + 1]
    assert mount.shown() is None
    mount.disk.writes_left = None
    assert mount.start().trouble == ""
    assert not mount.spill.exists()
    assert [mount.number(path) for path in "abcd"] == [first, second, second + 1, second + 2]
    assert mount.shown() is None
    mount.end()
    plain = Index(mount.state)
    assert plain.get(Table.LISTINGS, b"d") is None
    assert Inodes(plain).next_number() == second + 3
    plain.close()


def test_a_disk_that_works_again_takes_no_names_while_there_is_a_spill(mount: Mount) -> None:
    mount.number("a")
    mount.disk.writes_left = 0
    second = mount.number("b")
    mount.disk.writes_left = None
    assert mount.number("c") == second + 1
    assert mount.index is not None
    mount.index.apply([Write(Table.CHUNKS, b"x", b"digest")], durable=True)
    assert mount.index.get(Table.CHUNKS, b"x") == b"digest"
    mount.end()
    plain = Index(mount.state)
    assert plain.get(Table.CHUNKS, b"x") == b"digest"
    assert Inodes(plain).next_number() == second
    plain.close()


def test_a_full_disk_is_waited_for_and_begins_no_spill(mount: Mount) -> None:
    first = mount.number("a")
    mount.disk.errno, mount.disk.writes_left = errno.ENOSPC, 0
    with pytest.raises(IndexFull):
        mount.number("b")
    assert not mount.spill.exists()
    assert mount.index is not None
    assert mount.index.trouble == ""
    mount.disk.writes_left = None
    assert mount.number("b") == first + 1


def test_an_index_that_lost_its_last_commit_takes_the_spill_and_gives_no_number_twice(mount: Mount) -> None:
    first = mount.number("a")
    lost = mount.number("b")
    mount.disk.writes_left = 0
    spilled = mount.number("c")
    mount.end()
    mount.disk.writes_left = None
    plain = Index(mount.state)
    names = [key for key, value in plain.scan(Table.NAMES) if int.from_bytes(value, "big") == lost]
    number = lost.to_bytes(4, "big")
    plain.apply([Write(Table.NAMES, names[0], None), Write(Table.INODES, number, None)], durable=True)
    plain.apply([Write(Table.META, b"next_inode", str(lost).encode())], durable=True)
    plain.close()
    mount.start()
    assert not mount.spill.exists()
    assert [mount.number(path) for path in "acbd"] == [first, spilled, spilled + 1, spilled + 2]


def test_records_of_chunks_are_never_spilled(mount: Mount) -> None:
    mount.disk.writes_left = 0
    assert mount.index is not None
    for batch in (
        [Write(Table.OBJECTS, b"x", b"y")],
        [Write(Table.META, b"epoch", b"1")],
        [Write(Table.LISTINGS, b"d", b"new"), Write(Table.PINS, b"x", b"y")],
    ):
        with pytest.raises(IndexUnwritable):
            mount.index.apply(batch, durable=True)
    assert mount.shown() is None
    assert not mount.spill.exists()


@pytest.mark.parametrize("step", ["carried", "removing"])
def test_a_spill_that_was_carried_over_counts_no_more(mount: Mount, step: str) -> None:
    mount.disk.writes_left = 0
    first = mount.number("a")
    mount.listing(b"1")
    mount.disk.writes_left = None
    with pytest.raises(Killed):
        mount.start(dies_at=step)
    mount.start()
    assert not mount.spill.exists()
    mount.listing(b"2")
    assert mount.number("b") == first + 1
    mount.disk.writes_left = 0
    assert mount.number("c") == first + 2
    mount.disk.writes_left = None
    mount.start()
    assert mount.shown() == b"2"
    assert [mount.number(path) for path in "abcd"] == [first + number for number in range(4)]


def test_a_spill_that_had_not_begun_is_none(mount: Mount) -> None:
    mount.disk.writes_left = 0
    mount.start(read_only="the disk is gone", dies_at="begun")
    with pytest.raises(Killed):
        mount.number("a")
    mount.start(read_only="the disk is gone")
    first = mount.number("a")
    mount.disk.writes_left = None
    mount.start()
    assert mount.number("b") == first + 1


def test_what_cannot_be_carried_over_stays_where_it_is(mount: Mount) -> None:
    mount.disk.writes_left = 0
    first = mount.number("a")
    mount.disk.writes_left = 1  # the tables are opened, and no more
    index = mount.start()
    assert not index.read_only
    assert "names are kept" in index.trouble
    mount.disk.writes_left = None
    assert [mount.number(path) for path in "ab"] == [first, first + 1]
    index.apply([Write(Table.CHUNKS, b"x", b"digest")], durable=True)
    mount.start()
    assert not mount.spill.exists()
    assert [mount.number(path) for path in "abc"] == [first, first + 1, first + 2]
    mount.disk.writes_left = 0
    with pytest.raises(StateUnwritable):
        mount.start()


def test_a_spill_that_can_only_be_read_is_read(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    mount.disk.writes_left = 0
    first = mount.number("a")
    allocate = index_module._allocate

    def refused(path: Path, length: int, allocated: int) -> None:
        if path.parent == mount.spill:
            raise OSError(errno.EROFS, "Read-only file system")
        allocate(path, length, allocated)

    monkeypatch.setattr(index_module, "_allocate", refused)
    mount.start(read_only="the disk is gone")
    assert mount.number("a") == first
    with pytest.raises(IndexUnwritable):
        mount.number("b")
    mount.disk.writes_left = None
    mount.start()
    assert [mount.number(path) for path in "ab"] == [first, first + 1]


def test_another_mount_does_not_see_it(mount: Mount) -> None:
    mount.disk.writes_left = 0
    mount.listing(b"1")
    mount.disk.writes_left = None
    mount.session, mount.mark = "2", NoMark()
    mount.start()
    assert mount.shown() is None
    assert not mount.spill.exists()


def test_a_number_of_a_spill_that_somebody_deleted_is_not_given_out_again(mount: Mount) -> None:
    mount.disk.writes_left = 0
    told = mount.number("a")
    mount.end()
    remove_flat(mount.spill)
    mount.start(read_only="the disk is gone")
    assert mount.inodes.record(told) is None
    assert mount.number("b") == told + 1


def test_no_server_starts_where_another_mount_has_given_out_the_same_numbers(mount: Mount) -> None:
    mount.disk.writes_left = 0
    mount.number("a")
    mount.end()
    other = Index(mount.state)
    Inodes(other).assign("view", [Wanted("b", None, 0.0)])
    other.close()
    mount.disk.writes_left = None
    for read_only in ("", "the disk is gone again"):
        with pytest.raises(StateDamaged, match="another mount"):
            mount.start(read_only=read_only)


def test_without_room_in_the_runtime_directory_it_is_the_error_that_it_was(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    first = mount.number("a")
    mount.spill.write_text("no directory can be made here")
    mount.disk.writes_left = 0
    for _ in range(2):
        with pytest.raises(NoSpace, match="Read-only file system"):
            mount.number("b")
    assert len(caplog.records) == 1
    assert mount.number("a") == first
    mount.spill.unlink()
    assert mount.number("b") == first + 1
