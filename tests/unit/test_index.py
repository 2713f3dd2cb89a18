"""The index when its file or its disk is not as it should be."""

import os
from pathlib import Path

import pytest

from cachefs.errors import StateDamaged
from cachefs.index import RESERVE_BYTES, Index, Table, Write


def filled(directory: Path) -> Path:
    index = Index(directory)
    for batch in range(20):
        writes = [Write(Table.OBJECTS, b"%d-%d" % (batch, number), os.urandom(200)) for number in range(100)]
        index.apply(writes, durable=False)
    index.close()
    return directory / "data.mdb"


def test_room_is_reserved_for_names_on_a_full_disk(tmp_path: Path) -> None:
    data = filled(tmp_path / "index")
    assert data.stat().st_blocks * 512 >= RESERVE_BYTES
    index = Index(tmp_path / "index")
    assert len(list(index.scan(Table.OBJECTS))) == 2000
    index.close()


@pytest.mark.parametrize("damage", ["cut off", "overwritten", "no index at all"])
def test_a_damaged_index_is_told_and_not_believed(tmp_path: Path, damage: str) -> None:
    data = filled(tmp_path / "index")
    if damage == "cut off":
        os.truncate(data, 10 * 4096)  # the header's last page lies far behind the end
    else:
        with data.open("r+b") as file:
            file.seek(2 * 4096 if damage == "overwritten" else 0)
            file.write(b"\xff" * 100 * 4096)
    with pytest.raises(StateDamaged, match="move it away"):
        list(Index(tmp_path / "index").scan(Table.OBJECTS))
