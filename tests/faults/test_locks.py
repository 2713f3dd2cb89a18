"""Lock files are unlinked while others are about to lock them: one holder at a time, and nothing is left."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.kernel.locks import (
    KEEPER_LOCK,
    MOUNT_LOCK,
    SOCKET_NAME,
    STATE_LOCK,
    is_at,
    is_locked,
    lock_file,
    remove_runtime_dir,
    runtime_name,
    write_owner,
)
from tests.faults.locking_child import PROCESSES_MAX, ROWS
from tests.mount.harness import wait_for

PROCESSES = 6
ROUNDS = 80
DEADLINE_S = 100.0


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def runtime_dir(state_dir: Path) -> Iterator[Path]:
    """Where the command line would have it: short, for a socket's path is at most 107 bytes long."""
    with tempfile.TemporaryDirectory(prefix="cachefs-") as base:
        yield Path(base) / runtime_name(os.fspath(state_dir))


def test_many_processes_never_hold_a_lock_together_and_leave_nothing(
    state_dir: Path, runtime_dir: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    slots = tmp_path / "slots"
    slots.write_bytes(bytes(PROCESSES_MAX * len(ROWS)))
    command = [sys.executable, "-m", "tests.faults.locking_child", str(state_dir), str(runtime_dir), str(slots)]
    children = [
        subprocess.Popen(
            [*command, str(index), str(seed + index), str(ROUNDS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    done: Counter[str] = Counter()
    try:
        for child in children:
            output, error = child.communicate(timeout=DEADLINE_S)
            assert child.returncode == 0, error
            done.update(json.loads(output))
    finally:
        for child in children:
            child.kill()
            child.wait()
    print(dict(done))
    assert done["sessions"] > PROCESSES
    assert done["removals"] > 0
    assert not any(slots.read_bytes())
    remove_runtime_dir(runtime_dir)
    assert not runtime_dir.exists()


def test_who_waited_for_a_lock_that_was_removed_takes_the_new_one(runtime_dir: Path) -> None:
    path = runtime_dir / MOUNT_LOCK
    runtime_dir.mkdir(mode=0o700)
    first = lock_file(path, wait_s=0.0)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(lock_file(path, wait_s=60.0, make=runtime_dir.mkdir)))
    inode = os.fstat(first).st_ino
    waiting.start()
    wait_for(lambda: opened(inode) == 2, "the other one has opened the file")
    path.unlink()
    runtime_dir.rmdir()
    os.close(first)
    waiting.join(60.0)
    try:
        assert is_at(path, got[0])
        assert is_locked(path)
    finally:
        os.close(got[0])


def opened(inode: int) -> int:
    """How many descriptors of this process lead to the file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.stat(f"/proc/self/fd/{name}").st_ino == inode
        except FileNotFoundError:
            continue
    return count


def test_a_held_lock_keeps_the_directory(state_dir: Path, runtime_dir: Path) -> None:
    runtime_dir.mkdir(mode=0o700)
    for path in (runtime_dir / MOUNT_LOCK, runtime_dir / KEEPER_LOCK):
        descriptor = lock_file(path, wait_s=0.0)
        remove_runtime_dir(runtime_dir, ours=True)
        assert is_at(path, descriptor)
        os.close(descriptor)
    remove_runtime_dir(runtime_dir, ours=True)
    assert not runtime_dir.exists()


def test_a_server_whose_keeper_was_killed_keeps_the_directory(state_dir: Path, runtime_dir: Path) -> None:
    runtime_dir.mkdir(mode=0o700)
    keeper_fd = lock_file(runtime_dir / KEEPER_LOCK, wait_s=0.0)
    write_owner(keeper_fd, os.fspath(state_dir))
    os.close(keeper_fd)
    (runtime_dir / SOCKET_NAME).touch()
    state_fd = lock_file(state_dir / STATE_LOCK, wait_s=0.0)
    remove_runtime_dir(runtime_dir)
    assert (runtime_dir / SOCKET_NAME).exists()
    os.close(state_fd)
    remove_runtime_dir(runtime_dir)
    assert not runtime_dir.exists()


def test_a_directory_that_the_user_chose_is_emptied_and_stays(state_dir: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir(mode=0o700)
    keeper_fd = lock_file(chosen / KEEPER_LOCK, wait_s=0.0)
    write_owner(keeper_fd, os.fspath(state_dir))
    remove_runtime_dir(chosen, keeper_fd=keeper_fd)
    os.close(keeper_fd)
    assert list(chosen.iterdir()) == []


def test_nothing_is_made_in_a_directory_that_is_open_to_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    (shared / MOUNT_LOCK).symlink_to(tmp_path / "elsewhere")
    remove_runtime_dir(shared, ours=True)
    assert [path.name for path in shared.iterdir()] == [MOUNT_LOCK]
    assert not (tmp_path / "elsewhere").exists()
