"""Runs the real command line against a state directory of the test's own, and cleans up whatever happens."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs import client
from cachefs.kernel.mounts import MNT_DETACH, read_mounts
from tests.mount.harness import REPOSITORY, alive, wait_for

Done = subprocess.CompletedProcess[str]


class Cli:
    """`cachefs` with --state-dir and a short runtime directory. Call `close` at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="cachefs-cli-"))
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(directory),
            "CACHEFS_STATE_DIR": str(self.state_dir),
            "CACHEFS_RUNTIME_DIR": str(self.runtime_dir),
        }
        self._pids: set[int] = set()

    def place(self, name: str = "mnt") -> Path:
        """An empty directory to mount on."""
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def run(self, *arguments: object, code: int | None = 0) -> Done:
        """One command; AssertionError with what it said when it ends with another code (None: any)."""
        command = [sys.executable, "-P", "-m", "cachefs.cli", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=150, cwd=self.directory, check=False
        )
        assert code is None or done.returncode == code, f"{arguments}: {done.returncode}\n{done.stderr}\n{self.log()}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: object) -> Any:
        found = json.loads(self.run(*arguments, "--json").stdout)
        if arguments[0] == "mount":
            self._pids |= {found["server_pid"], found["keeper_pid"]}
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json("status")
        if found["server"]:
            self._pids |= {found["server"]["pid"], found["keeper"]["pid"]}
        return found

    def answers(self) -> bool:
        """Whether a server answers."""
        with contextlib.suppress(client.ServerGone):
            return bool(client.call(self.runtime_dir, "ping", timeout_s=10.0)["pid"])
        return False

    def log(self, name: str = "server.log") -> str:
        """The end of a log."""
        path = self.state_dir / "log" / name
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def mounts(self) -> list[str]:
        """What is mounted under this test's directories."""
        places = [mount.mountpoint for mount in read_mounts()]
        ours = (str(self.directory) + "/", str(self.runtime_dir) + "/")
        return [place for place in places if place.startswith(ours)]

    def watch(self, *pids: int) -> None:
        """Of a mount that was not made by json(): close() ends them."""
        self._pids |= set(pids)

    def wait_gone(self, *pids: int) -> None:
        wait_for(lambda: not any(map(alive, pids)), f"processes {pids} end")

    def close(self) -> None:
        """Unmount all, kill what is left, and assert that nothing was. The logs show when a test fails."""
        print(self.log("keeper.log"), self.log(), sep="\n")
        try:
            done = self.run("umount", "--all", "--lazy", code=None)
            print(done.returncode, done.stdout, done.stderr)
            # --lazy returns after 3 s; on a loaded machine the end takes longer.
            wait_for(lambda: not self.mounts(), "all that was mounted is gone")
        finally:
            import ctypes

            for pid in self._pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            for place in reversed(self.mounts()):
                ctypes.CDLL(None).umount2(os.fsencode(place), MNT_DETACH)
            shutil.rmtree(self.runtime_dir, ignore_errors=True)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    found = Cli(tmp_path)
    yield found
    found.close()
