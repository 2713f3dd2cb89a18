"""Kills servers and keepers of a real mount at chosen moments of a read, measures the pauses, looks for leaks."""

import contextlib
import hashlib
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cachefs.config import MIB
from tests.mount.harness import Mounted, alive, wait_for

READERS_MAX = 64
TAG = "KILL_TEST_TAG"
"""In the environment of every process that a test starts: nothing of it may be left."""

LONG = "TEST_KILLS" in os.environ or "CACHEFS_TEST_SOAK" in os.environ
"""The long form: figures are wanted, and the machine is quiet enough for them."""


class Kill(NamedTuple):
    """`at_s`, `served_s`: CLOCK_MONOTONIC of the kill, and of the first sign of life of what took its place."""

    victim: str
    at_s: float
    served_s: float


class Killer:
    """SIGKILLs, each of which ends when the successor is up. What it does to the pids it tells the mount."""

    def __init__(self, mount: Mounted) -> None:
        self.mount = mount
        self.kills: list[Kill] = []

    def kill(self, victim: str) -> None:
        """ "server", "keeper" or "both" (by turns)."""
        if victim == "turns":
            victim = ("server", "keeper")[len(self.kills) % 2]
        if victim == "server":
            self.kill_server()
        else:
            self.kill_keeper()

    def kill_server(self, pid: int = 0) -> None:
        """`pid`: when the caller knows it already and has no time to ask."""
        pid = pid or int(self.mount.call("ping")["pid"])
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self._ping()["pid"] != pid, "the next server serves")
        self.kills.append(Kill("server", at_s, time.monotonic()))
        wait_for(lambda: not alive(pid), "the dead server is gone")

    def kill_keeper(self) -> None:
        pid = int(self.mount.call("ping")["keeper_pid"])
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self._ping()["keeper_pid"] != pid, "the server has started another keeper")
        # One that is killed before it has come up is a newborn: killing those for ever proves nothing.
        wait_for(lambda: f"keeper[{self._ping()['keeper_pid']}] took over" in keeper_log(self.mount), "the takeover")
        self.kills.append(Kill("keeper", at_s, time.monotonic()))

    def _ping(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.mount.call("ping")
        self.mount.keeper_pid, self.mount.first_server_pid = int(answer["keeper_pid"]), int(answer["pid"])
        return answer


def keeper_log(mount: Mounted) -> str:
    path = mount.state_dir / "log" / "keeper.log"
    return path.read_text(errors="replace") if path.exists() else ""


class Board:
    """Shared memory of the test and its readers: [0] objects whose kills are done, [2 + slot] bytes read so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8 * (2 + READERS_MAX)))
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def done_with_object(self) -> None:
        self._words[0] += 1

    def progress_bytes(self) -> int:
        """Of the reader that is ahead."""
        return max(self._words[2:])


class Readers:
    """Child processes that read the same objects. A context manager; whatever still runs at its end is killed."""

    def __init__(self, paths: Sequence[Path], board: Board, *, how: str = "read", count: int = 1) -> None:
        tasks = [
            {"paths": [os.fspath(path) for path in paths], "how": how, "board": os.fspath(board.path), "slot": slot}
            for slot in range(count)
        ]
        script = os.fspath(Path(__file__).with_name("reader_child.py"))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", script, json.dumps(task)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for task in tasks
        ]

    def failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.processes)

    def results(self, deadline_s: float) -> list[dict[str, Any]]:
        """Of all readers; AssertionError with what one said when it failed."""
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=deadline_s)
            assert process.returncode == 0, f"reader ended with {process.returncode}: {err.decode()}"
            found.append(json.loads(out))
        return found

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def make_object(path: Path, seed: int, size: int) -> str:
    """A file of seeded random bytes that repeat nowhere; its sha256."""
    generator = random.Random(seed)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while size:
            piece = generator.randbytes(min(size, 16 * MIB))
            digest.update(piece)
            file.write(piece)
            size -= len(piece)
    return digest.hexdigest()


def pauses_s(kills: Sequence[Kill], results: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each kill the longest read, of any reader, that was under way between it and the successor's first answer."""
    reads = [read for result in results for read in result["reads"]]
    return [
        max((end - start for start, end in reads if start <= kill.served_s and end >= kill.at_s), default=0.0)
        for kill in kills
    ]


def report(name: str, kills: Sequence[Kill], pauses: Sequence[float], **more: object) -> None:
    """Print the figures, and keep them in the directory TEST_FIGURES."""
    figures = {
        "name": name,
        "kills": len(kills),
        "victims": sorted({kill.victim for kill in kills}),
        "pause_median_s": round(statistics.median(pauses), 3) if pauses else None,
        "pause_max_s": round(max(pauses), 3) if pauses else None,
        "pauses_s": [round(pause, 3) for pause in pauses],
        "successor_s": [round(kill.served_s - kill.at_s, 3) for kill in kills],
        **more,
    }
    print(json.dumps(figures))
    if directory := os.environ.get("TEST_FIGURES"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


# Leaks


def descriptors(pid: int) -> list[str]:
    """What a process has open, without its network connections (a pool of them is no leak)."""
    network = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    }
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if not (target.startswith("socket:[") and target[8:-1] in network):
                found.append(target)
    return sorted(found)


def notifiers(pid: int) -> int:
    """How many notifier processes a server has; each holds two of its descriptors."""
    return sum(b"notify_worker.py" in command for parent, command in _processes() if parent == pid)


def _processes() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                yield parent, (entry / "cmdline").read_bytes()


def tagged_processes(tag: str) -> list[str]:
    """Living processes with this tag in their environment, this one excepted."""
    found = []
    wanted = f"{TAG}={tag}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                    found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return found


def dead_index_readers(mount: Mounted) -> list[int]:
    """Pids in the reader table of the index that belong to no living process."""
    code = (
        "import lmdb, sys; environment = lmdb.open(sys.argv[1], readonly=True, max_dbs=32, create=False)\n"
        "print(environment.readers())"
    )
    text = subprocess.run(
        [sys.executable, "-c", code, os.fspath(mount.state_dir / "index")],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    pids = [int(line.split()[0]) for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    return [pid for pid in pids if not alive(pid)]


def assert_state_is_whole(mount: Mounted) -> None:
    """Every record has its bytes and every blob its record."""
    found = mount.call("gc", dry_run=True)
    assert (found["blobs"], found["objects"]) == (0, 0), found
    checked = mount.call("verify")
    assert checked["bad"] == [], checked


@contextlib.contextmanager
def tagged(monkeypatch: Any) -> Iterator[str]:
    """All processes started inside carry a tag; none is left at the end."""
    tag = os.urandom(8).hex()
    monkeypatch.setenv(TAG, tag)
    yield tag
    monkeypatch.delenv(TAG)
    wait_for(lambda: not tagged_processes(tag), f"all processes are gone: {tagged_processes(tag)}")


def wait_while(condition: Callable[[], bool], readers: Readers, deadline_s: float = 300.0) -> None:
    """Poll finely while the condition holds, no reader has failed and none hangs."""
    end = time.monotonic() + deadline_s
    while condition() and not readers.failed():
        assert time.monotonic() < end, "the readers do not get on"
        time.sleep(0.0005)
