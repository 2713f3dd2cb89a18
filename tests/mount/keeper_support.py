"""Mounts of the tiny server for the keeper's tests: start, command, kill, wait, and a clean end whatever happens."""

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cachefs.config import MountConfig, ServerConfig, VolumeConfig
from cachefs.kernel.mounts import find_mount, unmount_device
from cachefs.launch import start_keeper

DEADLINE_S = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], object], what: str = "") -> object:
    """The first true value of a condition. Raises AssertionError at the deadline."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"waited in vain for {what or condition}"
        time.sleep(0.01)


def run_on_mount(*command: str) -> str:
    """The output of a successful command that touches the mount.

    Never in the tests' own process, and never waited for without end: a call on a hung mount cannot be interrupted.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, command
    return output


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


class TinyMount:
    """One mount of the tiny server. A context manager; stop() is called at the end."""

    def __init__(self, directory: Path, **server_options: object) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.data = self.state / "data"  # below the state directory: they may become backing files
        self.data.mkdir(parents=True, exist_ok=True)
        self.mountpoint = directory / "mnt"
        server = ServerConfig(
            state_dir=self.state,
            runtime_dir=directory / "run",
            cache_bytes_max=1 << 30,
            allow_other=os.geteuid() == 0,
        )
        self.config = MountConfig(
            server=msgspec.structs.replace(server, **server_options),
            volumes=(VolumeConfig(name="v", source=f"file://{self.data}"),),
            mountpoint=self.mountpoint,
            as_root=os.geteuid() == 0,
            session=secrets.token_hex(8),
        )
        self.pids: set[int] = set()
        self.device = ""

    def __enter__(self) -> "TinyMount":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self, *, foreground: bool = False, timeout_s: float = DEADLINE_S) -> "TinyMount":
        """Mount; the first server is ready."""
        if not self.config.as_root:
            self.mountpoint.mkdir(exist_ok=True)
        old = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = ":".join([str(REPOSITORY), *([old] if old else [])])
        try:
            started = start_keeper(
                self.config, server_module="tests.mount.tiny_server", foreground=foreground, timeout_s=timeout_s
            )
        finally:
            if old is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = old
        self.process = started.process
        self.pids |= {started.keeper_pid, started.server_pid}
        mount = find_mount(self.mountpoint)
        assert mount is not None
        self.device = mount.major_minor
        wait_until(lambda: (self.state / "server.json").exists(), "the server's facts")
        return self

    def listing(self) -> list[str]:
        """The names in the root of the mount."""
        return run_on_mount("ls", "-U", str(self.mountpoint)).split()

    def switch(self, name: str, on: bool = True) -> None:
        """Change how the server behaves."""
        if on:
            (self.state / name).touch()
        else:
            (self.state / name).unlink(missing_ok=True)

    def facts(self) -> dict:
        """What the newest server that became ready wrote."""
        facts = json.loads((self.state / "server.json").read_text())
        self.pids |= {facts["pid"], facts["keeper_pid"]}
        return facts

    def live(self) -> dict:
        """Counters, and the keeper as the server knows it now."""
        live = json.loads((self.state / "live.json").read_text())
        self.pids.add(live["keeper_pid"])
        return live

    def keeper_pid(self) -> int:
        """The keeper that holds the lock now."""
        return self.live()["keeper_pid"]

    def command(self, *command: object) -> object:
        """Let the server do something, and return its answer."""
        answer = self.state / "answer"
        answer.unlink(missing_ok=True)
        part = self.state / "command.part"
        part.write_text(json.dumps(command))
        part.rename(self.state / "command")
        wait_until(answer.exists, f"the answer to {command}")
        return json.loads(answer.read_text())["answer"]

    def kill_server(self) -> dict:
        """SIGKILL the server; the facts of the next one, when it is ready."""
        before = self.facts()
        os.kill(before["pid"], signal.SIGKILL)
        wait_until(lambda: self.facts()["generation"] > before["generation"], "the next server")
        return self.facts()

    def kill_keeper(self) -> int:
        """SIGKILL the keeper; the pid of the next one, when it supervises."""
        before = self.keeper_pid()
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: self.keeper_pid() != before, "the next keeper")
        pid = self.keeper_pid()
        wait_until(lambda: f"keeper[{pid}] took over" in self.log(), "the takeover")
        return pid

    def log(self) -> str:
        """The keepers' log."""
        path = self.state / "log" / "keeper.log"
        return path.read_text() if path.exists() else ""

    def is_mounted(self) -> bool:
        """Whether anything is mounted at the mount point."""
        return find_mount(self.mountpoint) is not None

    def wait_for_end(self) -> None:
        """Mount and processes are gone."""
        wait_until(lambda: not self.is_mounted(), "the unmount")
        wait_until(lambda: not self.living(), f"the end of {self.pids}")

    def living(self) -> list[int]:
        """The processes of this mount that still run."""
        if (self.state / "server.json").exists():
            self.facts()
        if (self.state / "live.json").exists():
            self.live()
        return [pid for pid in self.pids if is_alive(pid)]

    def stop(self) -> None:
        """Unmount and end everything, also after a failure."""
        for name in ("hang", "hang_lookup", "slow", "never_ready", "die_at_start", "die_at_read"):
            self.switch(name, on=False)
        if self.living() and (self.state / "live.json").exists() and is_alive(self.keeper_pid()):
            os.kill(self.keeper_pid(), signal.SIGTERM)
        deadline_s = time.monotonic() + DEADLINE_S / 2
        while (self.living() or self.is_mounted()) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        if self.is_mounted() and self.device:
            unmount_device(self.device, as_root=os.geteuid() == 0)


def kill_both(tiny: TinyMount) -> None:
    """SIGKILL keeper and server, so that neither can start the other again."""
    keeper, server = tiny.keeper_pid(), tiny.facts()["pid"]
    os.kill(server, signal.SIGSTOP)  # or it would start a new keeper
    os.kill(keeper, signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(keeper) and not is_alive(server), "two deaths")


needs_root_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse for a real mount"
)
