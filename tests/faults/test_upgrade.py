"""`cachefs upgrade` while readers are at work: no error, a short pause; a broken new version is rolled back."""

import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.config import MIB
from tests.faults.killing import LONG, Board, Kill, Readers, make_object, pauses_s, report, tagged, wait_while
from tests.mount.cli_support import Cli
from tests.mount.harness import alive, needs_fuse, wait_for
from tests.support.lying import LyingServer

pytestmark = [needs_fuse, pytest.mark.timeout(600), *([pytest.mark.soak] if LONG else [])]

OBJECTS = 20 if LONG else 3
OBJECT_BYTES = 64 * MIB
PAUSE_MEDIAN_S_MAX = 1.0 if LONG else 15.0

BROKEN = {
    "ends at once": "exit 1",
    "serves nothing": "exec sleep 600",
    "dies in the middle": f'exec "{sys.executable}" -P -c "import cachefs.daemon, os; os.abort()"',
}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    with tagged(monkeypatch):
        found = Cli(tmp_path)
        yield found
        found.close()


@pytest.fixture
def objects(tmp_path: Path, origin: LyingServer) -> dict[str, str]:
    """Names and sha256 of what is under s3://models/m, behind a slow link."""
    found = {}
    for number in range(OBJECTS):
        file = tmp_path / f"object-{number}"
        found[file.name] = make_object(file, 300 + number, OBJECT_BYTES)
        origin.put("models", f"m/{file.name}", file)
    origin.latency_s = 0.2
    return found


def mount(cli: Cli, origin: LyingServer) -> Path:
    place = cli.place()
    where = ("--endpoint-url", origin.endpoint_url, "--region", "us-east-1")
    cli.json("mount", "s3://models/m", place, *where, "--prefetch-bytes", "16MiB", "--cache-size", "4GiB")
    return place


def program(path: Path, line: str) -> Path:
    """What stands where the new version's interpreter should be."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_upgrade_under_load_is_a_short_pause(cli: Cli, origin: LyingServer, objects: dict[str, str]) -> None:
    place = mount(cli, origin)
    board = Board(cli.directory / "board")
    upgrades = []
    with Readers([place / name for name in objects], board, count=2) as readers:
        for number in range(len(objects)):
            wait_while(lambda number=number: board.progress_bytes() < (number + 0.3) * OBJECT_BYTES, readers)
            before = cli.status()["server"]["pid"]
            start_s = time.monotonic()
            done = cli.json("upgrade", place)
            upgrades.append(Kill("upgrade", start_s, time.monotonic()))
            assert done["pid"] != before
            assert not alive(before)
            board.done_with_object()
        results = readers.results(300.0)
    pauses = pauses_s(upgrades, results)
    report("upgrade-under-load", upgrades, pauses)
    for result in results:
        assert result["sums"] == list(objects.values())
    assert statistics.median(pauses) < PAUSE_MEDIAN_S_MAX
    assert cli.status()["server"]["upgrade_result"] == "ok"


@pytest.mark.parametrize("how", BROKEN)
def test_broken_new_version_is_rolled_back(cli: Cli, origin: LyingServer, objects: dict[str, str], how: str) -> None:
    place = mount(cli, origin)
    board = Board(cli.directory / "board")
    name, digest = next(iter(objects.items()))
    broken = program(cli.directory / "broken-python", BROKEN[how])
    with Readers([place / name], board, count=2) as readers:
        wait_while(lambda: board.progress_bytes() < 0.2 * OBJECT_BYTES, readers)
        start_s = time.monotonic()
        done = cli.run("upgrade", place, "--python", broken, code=1)
        rollback = Kill("rollback", start_s, time.monotonic())
        assert "rolled back" in done.stderr
        board.done_with_object()
        results = readers.results(300.0)
    report(f"rollback-{how.replace(' ', '-')}", [rollback], pauses_s([rollback], results))
    assert [result["sums"] for result in results] == [[digest], [digest]]
    assert cli.status()["server"]["upgrade_result"].startswith("rolled back")
    assert cli.json("upgrade", place)["upgrade_result"] == "ok"  # a good one afterwards


def test_new_version_whose_keeper_is_broken_gets_another_keeper(
    cli: Cli, origin: LyingServer, objects: dict[str, str]
) -> None:
    place = mount(cli, origin)
    line = f'case "$*" in *cachefs.keeper*) exit 1;; esac\nexec "{sys.executable}" "$@"'
    new = program(cli.directory / "new-python", line)
    before = cli.status()
    assert cli.json("upgrade", place, "--python", new)["upgrade_result"] == "ok"
    wait_for(lambda: cli.status()["keeper"]["pid"] != before["keeper"]["pid"], "the server has started a keeper")
    name = next(iter(objects))
    assert len((place / name).read_bytes()) == OBJECT_BYTES
    pid = cli.status()["server"]["pid"]
    os.kill(pid, 9)
    wait_for(lambda: cli.status()["server"] and cli.status()["server"]["pid"] != pid, "the next server serves")
