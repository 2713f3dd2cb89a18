"""Real kernel mounts for tests: a keeper and its server on a state directory of the test's own."""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from cachefs import client
from cachefs.config import MIB, MountConfig, ServerConfig, VolumeConfig
from cachefs.kernel.mounts import read_mounts
from cachefs.launch import start_keeper

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0
MNT_DETACH = 2

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid() != 0, reason="needs /dev/fuse and root"
)


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition()`; AssertionError naming `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Whoever opens something below `directory` meanwhile cannot write; who has it open can."""
    other = directory.with_name(f"{directory.name}-read-only")
    other.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", directory, other], check=True)
    try:
        # Where nobody opens a file meanwhile: one that is open for writing would be EBUSY.
        subprocess.run(["mount", "-o", "remount,bind,ro", other], check=True)
        subprocess.run(["mount", "--bind", other, directory], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)
    finally:
        subprocess.run(["umount", "--lazy", other], check=True)


class Mounted:
    """One keeper, one server, some volumes. A context manager; `stop` and `start` again keep the state directory.

    The volumes are read below `path(name)`: the FUSE root of the server (as root), without bind mounts.
    """

    def __init__(self, directory: Path, volumes: Sequence[VolumeConfig], *, as_root: bool = True, **server: Any):
        self.directory = directory
        self.state_dir = directory / "state"
        # A socket's path has 108 bytes at most, pytest's directories are long.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="cachefs-test-"))
        self.volumes = tuple(volumes)
        self.as_root = as_root
        self.mountpoint = self.runtime_dir / "root" if as_root else directory / "mnt"
        self.options: dict[str, Any] = {
            "cache_bytes_max": 4096 * MIB,
            "allow_other": as_root,
            "bind_timeout_s": 3600.0,
            **server,
        }
        self.server_module = "cachefs.daemon"
        self.keeper_pid = 0
        self.first_server_pid = 0

    def config(self) -> MountConfig:
        server = ServerConfig(state_dir=self.state_dir, runtime_dir=self.runtime_dir, **self.options)
        return MountConfig(
            server=server,
            volumes=self.volumes,
            mountpoint=self.mountpoint,
            as_root=self.as_root,
            session=secrets.token_hex(8),
        )

    def path(self, name: str = "") -> Path:
        """Where a volume shows (the only one without a name)."""
        return self.mountpoint / (name or self.volumes[0].name) if self.as_root else self.mountpoint

    def start(self) -> None:
        os.environ["PYTHONPATH"] = os.fspath(REPOSITORY)
        if not self.as_root:
            self.mountpoint.mkdir(exist_ok=True)
        started = start_keeper(self.config(), server_module=self.server_module, timeout_s=DEADLINE_S)
        self.keeper_pid, self.first_server_pid = started.keeper_pid, started.server_pid

    def call(self, method: str, **params: Any) -> Any:
        """Ask the control socket; while a server is being restarted, wait for the next one."""
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                return client.call(self.runtime_dir, method, params)
            except client.ServerGone:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("status")
        return answer

    def server_pid(self) -> int:
        """Of the server that serves now."""
        return int(self.status()["server"]["pid"])

    def is_mounted(self) -> bool:
        return any(mount.mountpoint == os.fspath(self.mountpoint) for mount in read_mounts())

    def server_log(self) -> str:
        path = self.state_dir / "log" / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def keeper_log(self) -> str:
        path = self.state_dir / "log" / "keeper.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """SIGTERM to the keeper, which unmounts and ends both. What does not end is killed; then it asserts."""
        pids = {self.keeper_pid, *self._server_pids()}
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.keeper_pid, signal.SIGTERM)
        try:
            wait_for(lambda: not any(map(alive, pids)), "keeper and server end after SIGTERM", 30)
            assert not self.is_mounted()
            assert "Traceback" not in self.server_log(), self.server_log()
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while self.is_mounted():
                ctypes.CDLL(None).umount2(os.fspath(self.mountpoint).encode(), MNT_DETACH)

    def _server_pids(self) -> set[int]:
        pids = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(stat[1]) == self.keeper_pid:
                        pids.add(int(entry.name))
        return pids | {self.first_server_pid}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            print(f"--- the start failed; keeper.log and server.log ---\n{self.keeper_log()}\n{self.server_log()}")
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.keeper_pid:
                self.stop()
        finally:
            if error is not None:
                print(f"--- the end of the logs ---\n{self.keeper_log()[-3000:]}\n{self.server_log()[-6000:]}")
            shutil.rmtree(self.runtime_dir, ignore_errors=True)


def volume(name: str, source: str, endpoint_url: str | None = None, **options: Any) -> VolumeConfig:
    return VolumeConfig(name=name, source=source, endpoint_url=endpoint_url, region="us-east-1", **options)


@contextlib.contextmanager
def mounted(directory: Path, *volumes: VolumeConfig, **server: Any) -> Iterator[Mounted]:
    """One mount that answers, ended at the end."""
    with Mounted(directory, volumes, **server) as mount:
        yield mount
