"""A hostile server asks the keeper to let the kernel read files that are not its own."""

import os
from pathlib import Path

import pytest

from tests.mount.keeper_support import TinyMount, needs_root_mount, wait_until

pytestmark = needs_root_mount

REFUSALS = {
    "path": "O_PATH",
    "outside": "not below the state directory",
    "writable": "read-only descriptor",
    "directory": "not a regular file",
    "other_owner": "owned by uid 1234",
    "deleted": "a deleted file",
    "socket": "read-only descriptor",
    "memory": "read-only descriptor",
}


@pytest.fixture
def tiny(tmp_path: Path):
    with TinyMount(tmp_path) as mount:
        yield mount


def test_descriptor_that_is_not_the_servers_own_blob_is_refused(tiny: TinyMount) -> None:
    tiny.start()
    for kind, words in REFUSALS.items():
        answer = tiny.command("hostile", kind)
        assert isinstance(answer, str), kind
        assert words in answer
    assert tiny.log().count("refused a backing file") == len(REFUSALS)
    assert isinstance(tiny.command("hostile", "good"), int)


def test_second_file_for_one_inode_is_refused_and_the_same_again_is_the_same_id(tiny: TinyMount) -> None:
    tiny.start()
    first = tiny.command("hostile", "good")
    assert tiny.command("hostile", "same") == first
    assert "has another backing file" in str(tiny.command("hostile", "good"))
    tiny.command("close_backing", first)
    assert isinstance(tiny.command("hostile", "good"), int)


def test_nonsense_from_a_server_does_not_end_the_keeper(tiny: TinyMount) -> None:
    tiny.start()
    keeper = tiny.keeper_pid()
    tiny.command("close_backing", 0)  # answered by the keeper: it is done with the start
    before = len(os.listdir(f"/proc/{keeper}/fd"))
    for _ in range(3):
        tiny.command("nonsense")
    assert isinstance(tiny.command("hostile", "good"), int)
    assert tiny.keeper_pid() == keeper
    assert "sent nonsense" in tiny.log()
    assert "not a server's to say" in tiny.log()
    # It answers before it closes what it was sent.
    wait_until(lambda: len(os.listdir(f"/proc/{keeper}/fd")) == before, "closed descriptors")
