"""A state machine over SpillingIndex and the inode numbers on top, against plain dicts: the disk fails and works again
under a server and between two, servers die at any step of spilling and carrying over, mounts end.

What must hold whatever happens: what was applied is there, batches are applied whole or not at all, and a number that
was told in a mount never means anything else in it.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cachefs.chunk import ObjectId
from cachefs.errors import IndexUnwritable, StateUnwritable
from cachefs.index import Table, Write
from cachefs.inodes import Inodes, NoMark, Wanted
from cachefs.kernel.locks import remove_flat
from tests.support.failing_disk import Disk, Killed, Mortal

VIEW = "v"
PATHS = st.sampled_from(("a", "b", "d/x", "d/y"))
DIRECTORIES = st.sampled_from(("d", "e"))
KEYS = st.sampled_from((b"a", b"ab", b"b"))
VALUES = st.none() | st.binary(max_size=3)
OURS = (Table.LISTINGS, Table.VOLUMES, Table.REMARKS)
OF_CHUNKS = (Table.OBJECTS, Table.CHUNKS, Table.PINS)
Rows = dict[tuple[Table, bytes], bytes]


class SpillMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.spill = self.directory / "run" / "spill"
        self.disk = Disk()
        self.mounts = 0
        self.on_disk: Rows = {}
        self.index: Mortal | None = None

    @initialize()
    def first_mount(self) -> None:
        self.begin_mount()

    def begin_mount(self) -> None:
        self.spill.parent.mkdir(exist_ok=True)
        self.mounts += 1
        self.mark = NoMark()
        self.told: dict[int, tuple[str, ObjectId | None]] = {}
        self.lost = False
        self.spilled: dict[tuple[Table, bytes], bytes | None] = {}
        self.start_server()

    def start_server(self, dies_at: str = "") -> None:
        """As recovery.open_index() does for a server that resumes."""
        if self.index is not None:
            self.index.close()
        self.index = None
        arguments = (self.directory / "state", self.spill, str(self.mounts), self.disk, dies_at)
        try:
            self.index = Mortal(*arguments)
        except (StateUnwritable, IndexUnwritable) as exc:
            self.index = Mortal(*arguments, read_only=str(exc))
        self.inodes = Inodes(self.index, self.mark)
        if not self.index.read_only and not self.has_spilled():
            self.carried()

    def carried(self) -> None:
        for place, value in self.spilled.items():
            self.put(self.on_disk, place, value)
        self.spilled.clear()

    @staticmethod
    def put(rows: Rows, place: tuple[Table, bytes], value: bytes | None) -> None:
        rows.pop(place, None)
        if value is not None:
            rows[place] = value

    def rows(self) -> Rows:
        found = dict(self.on_disk)
        for place, value in self.spilled.items():
            self.put(found, place, value)
        return found

    def teardown(self) -> None:
        if self.index is not None:
            self.index.close()
        shutil.rmtree(self.directory)

    # The disk and the servers

    @rule(writes=st.sampled_from((0, 0, 0, 1, 2, 3)))
    def the_disk_fails(self, writes: int) -> None:
        self.disk.writes_left = writes

    @rule()
    def the_disk_works(self) -> None:
        self.disk.writes_left = None

    @rule()
    def the_server_is_replaced(self) -> None:
        self.start_server()

    @rule(step=st.sampled_from(("begun", "carried", "removing")), path=PATHS)
    def servers_die_at(self, step: str, path: str) -> None:
        """One that carries over, or else one that begins a spill; the next one finds what that left."""
        try:
            self.start_server(step)
            self.assign_one(Wanted(path, ObjectId("s", path, 1, "killed"), 0.0))
        except Killed:
            if step != "begun":
                self.carried()
        self.start_server()

    @rule()
    def the_spill_is_lost(self) -> None:
        """Somebody tidies up the runtime directory between two servers."""
        assert self.index is not None
        self.lost = self.lost or self.has_spilled()
        self.index.close()
        self.index = None
        remove_flat(self.spill)
        self.spilled.clear()
        self.start_server()

    @rule(tidy=st.booleans())
    def another_mount(self, tidy: bool) -> None:
        """After a mount that ended, or whose keeper and server were killed. It needs a disk that works."""
        assert self.index is not None
        self.index.close()
        self.index = None
        if tidy:
            remove_flat(self.spill)
        self.disk.writes_left = None
        self.begin_mount()

    # What is written

    def apply(self, writes: list[Write]) -> None:
        assert self.index is not None
        is_name = writes[0].table in OURS
        spills = bool(self.spilled)
        try:
            self.index.apply(writes, durable=False)
        except IndexUnwritable:
            assert not is_name
            return
        assert is_name or not self.index.read_only
        spills = (spills or self.has_spilled()) and is_name
        for table, key, value in writes:
            if spills:
                self.spilled[table, key] = value
            else:
                self.put(self.on_disk, (table, key), value)

    def has_spilled(self) -> bool:
        """What the index says, not what the model has."""
        assert self.index is not None
        return "names are kept" in self.index.trouble

    @rule(rows=st.lists(st.tuples(st.sampled_from(OURS), KEYS, VALUES), min_size=1, max_size=3))
    def apply_names(self, rows: list[tuple[Table, bytes, bytes | None]]) -> None:
        self.apply([Write(*row) for row in rows])

    @rule(rows=st.lists(st.tuples(st.sampled_from(OF_CHUNKS), KEYS, VALUES), min_size=1, max_size=3))
    def apply_chunks(self, rows: list[tuple[Table, bytes, bytes | None]]) -> None:
        self.apply([Write(*row) for row in rows])

    def tell(self, number: int, path: str, object_id: ObjectId | None) -> None:
        assert self.told.setdefault(number, (path, object_id)) == (path, object_id), "a number means two things"

    def assign_one(self, wanted: Wanted, *gone: str) -> None:
        (number,) = self.inodes.assign(VIEW, [wanted], gone=gone)
        self.tell(number, wanted.path, wanted.object_id)

    @rule(path=PATHS, version=st.sampled_from("12"), gone=st.none() | PATHS)
    def assign_file(self, path: str, version: str, gone: str | None) -> None:
        wanted = Wanted(path, ObjectId("s", path, 1, version), 0.0)
        self.assign_one(wanted, *([gone] if gone and gone != path else []))

    @rule(path=DIRECTORIES)
    def assign_directory(self, path: str) -> None:
        self.assign_one(Wanted(path, None, 0.0))

    @rule(path=PATHS)
    def replace(self, path: str) -> None:
        number = self.inodes.number(VIEW, path, is_directory=False)
        if number is not None:
            record = self.inodes.record(number)
            assert record is not None
            new = self.inodes.replace(number)
            assert new not in self.told
            self.tell(new, path, record.object_id)

    # What must hold

    @invariant()
    def what_was_told_still_holds(self) -> None:
        for number, (path, object_id) in self.told.items():
            record = self.inodes.record(number)
            if record is None:
                assert self.lost
            else:
                assert (record.path, record.object_id) == (path, object_id)
        self.inodes.check_invariants()

    @invariant()
    def all_rows_are_there(self) -> None:
        assert self.index is not None
        rows = self.rows()
        for table in (*OURS, *OF_CHUNKS):
            wanted = sorted((key, value) for (of, key), value in rows.items() if of is table)
            assert list(self.index.scan(table)) == wanted
            for first in (b"\x00", b"a"):
                assert list(self.index.scan(table, first)) == [row for row in wanted if row[0].startswith(first)]
            assert all(self.index.get(table, key) == value for key, value in wanted)
        for table in (Table.INODES, Table.NAMES):
            scanned = list(self.index.scan(table))
            assert [key for key, _ in scanned] == sorted({key for key, _ in scanned})
            assert all(self.index.get(table, key) == value for key, value in scanned)


SpillMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSpill = pytest.mark.timeout(300)(SpillMachine.TestCase)
