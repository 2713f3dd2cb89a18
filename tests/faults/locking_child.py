"""Run by test_locks.py: begins and ends sessions on a state directory that others use at the same time.

    python -m tests.faults.locking_child STATE RUNTIME SLOTS INDEX SEED ROUNDS

Each lock has a row of bytes in SLOTS (shared memory), a byte per process: a process sets its own while it holds the
lock. AssertionError when another one is set, or when anything vanished under a live session. At the end: a line of
JSON that counts what was done.
"""

import contextlib
import json
import mmap
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cachefs.kernel.locks import (
    KEEPER_LOCK,
    MOUNT_LOCK,
    ROOT_NAME,
    SOCKET_NAME,
    STATE_LOCK,
    is_at,
    is_locked,
    lock_file,
    remove_runtime_dir,
    write_owner,
)

PROCESSES_MAX = 64
ROWS = (MOUNT_LOCK, KEEPER_LOCK, STATE_LOCK)
WAIT_S = 60.0


class Child:
    def __init__(self, state_dir: Path, runtime_dir: Path, slots: mmap.mmap, index: int, seed: int) -> None:
        self.state_dir = state_dir
        self.runtime_dir = runtime_dir
        self.slots = slots
        self.index = index
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()

    def make(self) -> None:
        self.done["made"] += 1
        with contextlib.suppress(FileExistsError):
            self.runtime_dir.mkdir(0o700)

    def enter(self, name: str, wait_s: float) -> int:
        """Hold the lock, and be its only holder. Raises BlockingIOError."""
        directory = self.state_dir if name == STATE_LOCK else self.runtime_dir
        descriptor = lock_file(directory / name, wait_s=wait_s, make=self.make)
        row = ROWS.index(name) * PROCESSES_MAX
        self.slots[row + self.index] = 1
        others = [other for other in range(PROCESSES_MAX) if self.slots[row + other] and other != self.index]
        assert not others, f"{name} is held by {self.index} and by {others}"
        assert is_at(directory / name, descriptor)
        return descriptor

    def leave(self, name: str) -> None:
        self.slots[ROWS.index(name) * PROCESSES_MAX + self.index] = 0

    def session(self, end: Callable[[int], None]) -> None:
        """As mount, keeper and server do; `end` gets the descriptor of keeper.lock."""
        self.make()
        mount_fd = self.enter(MOUNT_LOCK, WAIT_S)
        try:
            keeper_fd = self.enter(KEEPER_LOCK, WAIT_S)
        except BlockingIOError as exc:
            raise AssertionError("a keeper does not end") from exc
        write_owner(keeper_fd, os.fspath(self.state_dir))
        try:
            state_fd = self.enter(STATE_LOCK, 0.0)
        except BlockingIOError:  # the server of a session that is without a keeper for the moment
            self.done["refused"] += 1
            self.leave(KEEPER_LOCK)
            os.close(keeper_fd)
            self.leave(MOUNT_LOCK)
            os.close(mount_fd)
            remove_runtime_dir(self.runtime_dir)
            time.sleep(self.random.random() * 0.03)  # who waits for keeper.lock looks every 0.02 s
            return
        with contextlib.suppress(FileExistsError):
            (self.runtime_dir / ROOT_NAME).mkdir()
        self.leave(MOUNT_LOCK)
        os.close(mount_fd)
        keeper_fd = self.serve(keeper_fd)
        if self.random.random() < 0.3:  # a server dies, and the keeper starts the next one
            self.leave(STATE_LOCK)
            os.close(state_fd)
            time.sleep(self.random.random() * 0.003)
            state_fd = self.enter(STATE_LOCK, WAIT_S)
            keeper_fd = self.serve(keeper_fd)
            self.done["restarts"] += 1
        self.done["sessions"] += 1
        self.leave(STATE_LOCK)
        self.leave(KEEPER_LOCK)
        os.close(state_fd)
        end(keeper_fd)
        os.close(keeper_fd)

    def serve(self, keeper_fd: int) -> int:
        """With a socket, which must stay; gives keeper.lock's descriptor, maybe of a new keeper."""
        assert is_at(self.runtime_dir / KEEPER_LOCK, keeper_fd), "the lock of a live keeper was removed"
        path = self.runtime_dir / SOCKET_NAME
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
            inode = path.stat().st_ino
            if self.random.random() < 0.3:  # a keeper dies, or executes its next version
                self.leave(KEEPER_LOCK)
                os.close(keeper_fd)
                time.sleep(self.random.random() * 0.003)
                keeper_fd = self.enter(KEEPER_LOCK, WAIT_S)
                write_owner(keeper_fd, os.fspath(self.state_dir))
                self.done["takeovers"] += 1
            time.sleep(self.random.random() * 0.003)
            assert path.stat().st_ino == inode, "the socket of a live server was removed"
            assert is_at(self.runtime_dir / KEEPER_LOCK, keeper_fd), "the lock of a live keeper was removed"
        return keeper_fd

    def end_well(self, keeper_fd: int) -> None:
        remove_runtime_dir(self.runtime_dir, keeper_fd=keeper_fd)

    def end_killed(self, keeper_fd: int) -> None:
        """All that the session had stays, its socket too."""

    def step(self) -> None:
        what = self.random.random()
        if what < 0.45:
            self.session(self.end_well)
        elif what < 0.6:
            self.session(self.end_killed)
        elif what < 0.85:
            remove_runtime_dir(self.runtime_dir)
            self.done["removals"] += not self.runtime_dir.exists()
        else:
            is_locked(self.runtime_dir / KEEPER_LOCK)


def main(arguments: list[str]) -> None:
    state_dir, runtime_dir, slots_path = map(Path, arguments[:3])
    index, seed, rounds = map(int, arguments[3:])
    with slots_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as slots:
        child = Child(state_dir, runtime_dir, slots, index, seed)
        for _ in range(rounds):
            child.step()
        print(json.dumps(child.done))


if __name__ == "__main__":
    main(sys.argv[1:])
