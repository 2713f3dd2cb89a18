"""What `warm` promises: all of it is local and committed, or an error that says what is not."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs import chunk
from cachefs.chunk import CHUNK_BYTES
from cachefs.config import VolumeConfig
from cachefs.core import WARM_CHUNKS, WARM_CHUNKS_BESIDE, Core, open_core
from cachefs.errors import WorkFailed
from cachefs.metrics import Metrics
from cachefs.tier.local import LocalTier
from tests.support.caches import config_for, run

FILES = 3
SIZE = CHUNK_BYTES + 12345


@pytest.fixture
def source(tmp_path: Path) -> str:
    directory = tmp_path / "models"
    directory.mkdir()
    for number in range(FILES):
        (directory / f"{number}.bin").write_bytes(os.urandom(SIZE))
    return f"file://{directory}"


async def warmed(core: Core, url: str) -> dict[str, object]:
    steps: list[int] = []
    done = await core.warm(
        core.source(VolumeConfig(name="", source=url)),
        pin=False,
        progress=lambda step: steps.append(step["done_bytes"]),
    )
    assert steps == sorted(steps)
    assert steps[-1] == done["bytes_total"]
    return done


def test_all_is_committed_when_warm_ends(tmp_path: Path, source: str) -> None:
    async def scenario() -> None:
        async with open_core(config_for(tmp_path), Metrics(), session="one") as core:
            assert (await warmed(core, source))["fetched_bytes"] == FILES * SIZE
            core.cache.check_invariants()
            assert all(record.sealed for record in core.cache.objects())
            assert (await warmed(core, source))["fetched_bytes"] == 0

    run(scenario)


def test_warm_makes_room_for_who_reads_from_the_same_source(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes it again when he has gone."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4096)
    in_flight: list[int] = []
    reading = True

    async def scenario() -> None:
        async with open_core(config_for(tmp_path), Metrics(), session="one") as core:
            ensure = core.cache.ensure
            started = asked = 0

            async def noted(*args: Any, **options: Any) -> None:
                nonlocal started, asked, reading
                started += 1
                asked += 1
                reading = asked < 200
                in_flight.append(started)
                try:
                    await trio.sleep(0)
                    await ensure(*args, **options)
                finally:
                    started -= 1

            monkeypatch.setattr(core.cache, "ensure", noted)
            monkeypatch.setattr(core.cache, "has_readers", lambda source: reading)
            await warmed(core, source)

    run(scenario)
    assert max(in_flight[:199]) == WARM_CHUNKS_BESIDE
    assert max(in_flight[300:]) == WARM_CHUNKS


def test_bytes_whose_commit_fails_are_no_success(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "on purpose")

    async def scenario() -> None:
        async with open_core(config_for(tmp_path), Metrics(), session="one") as core:
            with monkeypatch.context() as patch:
                patch.setattr(LocalTier, "sync", failing)
                with pytest.raises(WorkFailed, match="were fetched and could not be kept"):
                    await warmed(core, source)
            assert (await warmed(core, source))["fetched_bytes"] == FILES * SIZE

    run(scenario)
