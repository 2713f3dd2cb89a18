"""A node for tests: a keeper as root, a server as uid 65534 under its supervisor, and what the CSI driver asks."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cachefs.kernel.mounts import Mount, abort, find_mount, read_mounts, unmount
from tests.mount.harness import REPOSITORY, alive, wait_for
from tests.support.s3 import LOUD_VARIABLES, QUIET_ENVIRONMENT

SERVER_UID = 65534
DEADLINE_S = 60.0
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class Refused(Exception):
    """The server's error answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def key_of(name: str) -> str:
    """A publication's key, as the driver makes them."""
    return hashlib.sha1(name.encode()).hexdigest()


def static(access_key: str, secret_key: str) -> dict[str, Any]:
    """Credentials of a node-publish secret."""
    return {"kind": "static", "values": {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}}


def as_nobody(hide: Path) -> list[str]:
    """The start of a command that runs as the server does in its container."""
    return [sys.executable, str(Path(__file__).with_name("as_nobody.py")), str(SERVER_UID), str(hide)]


class Node:
    """Use as a context manager: whatever was started is stopped, whatever was mounted is unmounted."""

    def __init__(self, endpoints: Sequence[str] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cfn.", dir="/tmp"))
        self.directory.chmod(0o711)
        self.node_dir = self.directory / "n"
        self.root = self.node_dir / "root"
        self.socket = self.node_dir / "run" / "control.sock"
        self.endpoints = list(endpoints)
        self.keeper: subprocess.Popen[bytes] | None = None
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.variables: dict[str, str] = {}
        """More for the environment of keeper and server."""
        self.isolated = False
        self._keeper_flags: tuple[str, ...] = ()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._devices: set[str] = set()
        self._servers: set[int] = set()
        self._published: dict[str, str] = {}

    def environment(self) -> dict[str, str]:
        """Without any key: what a volume may see, it brings itself."""
        kept = {name: value for name, value in os.environ.items() if name not in (*LOUD_VARIABLES, *KEYS)}
        quiet = {name: value for name, value in QUIET_ENVIRONMENT.items() if name not in KEYS}
        return {**kept, **quiet, "PYTHONPATH": str(REPOSITORY), "HOME": "/nonexistent", **self.variables}

    # Processes

    def _spawn(self, arguments: Sequence[str], log: str, *, before: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        with (self.directory / log).open("ab") as output:
            process = subprocess.Popen(
                [*before, sys.executable, "-P", "-m", *arguments],
                env=self.environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        return process

    def isolate(self) -> None:
        """From now on keepers have a mount namespace of their own."""
        self.node_dir.mkdir(mode=0o711)
        subprocess.run(["mount", "--bind", str(self.node_dir), str(self.node_dir)], check=True)
        subprocess.run(["mount", "--make-shared", str(self.node_dir)], check=True)
        self.isolated = True

    def start_keeper(self, *extra: str) -> None:
        """As root, until the root is mounted."""
        arguments = ["cachefs.node_keeper", "--node-dir", str(self.node_dir), "--server-uid", str(SERVER_UID)]
        self._keeper_flags = extra or self._keeper_flags
        # As in a container with Bidirectional propagation: what it mounts shows here, and stays when it ends.
        before = ["unshare", "--mount", "--propagation", "unchanged"] if self.isolated else []
        self.keeper = self._spawn([*arguments, *self._keeper_flags], "keeper.log", before=before)
        wait_for(lambda: self.mount() is not None, "the keeper mounts")

    def start_supervisor(self, *extra: str, wait: bool = True) -> None:
        """As uid 65534 without capabilities; with `wait` until its server answers."""
        arguments = ["cachefs.cli", "serve", "--node-dir", str(self.node_dir), "--cache-size", "1GiB"]
        arguments += ["--read-timeout", "40"]  # a test that reads in vain gets an error
        arguments += [part for endpoint in self.endpoints for part in ("--allow-endpoint", endpoint)]
        self.supervisor = self._spawn([*arguments, *extra], "server.log", before=as_nobody(self.root))
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until a server answers."""
        wait_for(self._answers, "the server answers")

    def _answers(self) -> bool:
        assert self.supervisor is None or self.supervisor.poll() is None, self.log("server.log")[-4000:]
        with contextlib.suppress(OSError, EOFError):
            return bool(self.ask("probe")["ready"])
        return False

    def server_pid(self) -> int:
        """Of the server process that serves now."""
        pid = int(self.ask("ping")["pid"])
        self._servers.add(pid)
        return pid

    def kill_server(self) -> None:
        """SIGKILL the server process; the next one answers when this returns."""
        before = self.server_pid()
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: self._other_server(before), "the next server")

    def _other_server(self, before: int) -> bool:
        return self.server_pid_or_none() not in (None, before)

    def server_pid_or_none(self) -> int | None:
        """None while none answers."""
        with contextlib.suppress(OSError, EOFError):
            return self.server_pid()
        return None

    def kill_keeper(self) -> None:
        """SIGKILL, and a new one as the kubelet would start it; it supervises when this returns."""
        assert self.keeper is not None
        self.keeper.kill()
        self.keeper.wait()
        before = self.takeovers()
        self.start_keeper()
        wait_for(lambda: self.takeovers() > before, "the takeover")

    def takeovers(self) -> int:
        """How often a keeper took the mount back so far."""
        return self.log("keeper.log").count("took the mount back")

    def kill_supervisor(self) -> None:
        """SIGKILL; its server dies with it."""
        assert self.supervisor is not None
        server = self.server_pid()
        self.supervisor.kill()
        self.supervisor.wait()
        wait_for(lambda: not alive(server), "the server dies with its supervisor")

    def stop_supervisor(self) -> int:
        """SIGTERM; the exit code."""
        assert self.supervisor is not None
        self.supervisor.terminate()
        return self.supervisor.wait(DEADLINE_S)

    # What it says

    def mount(self) -> Mount | None:
        """The FUSE root."""
        found = find_mount(self.root)
        if found is not None:
            self._devices.add(found.major_minor)
        return found

    def ask(self, method: str, **params: Any) -> Any:
        """One request. Raises Refused, OSError, EOFError."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(self.socket))
            sock.sendall(json.dumps({"method": method, "params": params}).encode() + b"\n")
            lines = sock.makefile().readlines()
        if not lines:
            raise EOFError
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise Refused(answer["error"]["type"], answer["error"]["message"])
        return answer["result"]

    def publish(self, name: str, source: str, credentials: dict[str, Any], **options: Any) -> Path:
        """The view's directory."""
        params = {"endpoint_url": self.endpoints[0] if self.endpoints else None, "principal": f"ns/{name}", **options}
        root = self.ask("volume_publish", key=key_of(name), source=source, credentials=credentials, **params)["root"]
        return self.root / root

    def unpublish(self, name: str) -> None:
        self.ask("volume_unpublish", key=key_of(name))

    def stats(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("volume_stats", key=key_of(name))
        return answer

    def condition(self, name: str) -> str:
        return str(self.stats(name)["condition"]["reason"])

    def log(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    # The end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for name in ("keeper.log", "server.log"):
                print(f"--- the end of {name} ---\n{self.log(name)[-6000:]}")
        self.mount()
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for pid in self._servers:
            with contextlib.suppress(ProcessLookupError):
                if alive(pid) and str(self.node_dir) in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
                    os.kill(pid, signal.SIGKILL)
        for mount in reversed(read_mounts()):
            if mount.mountpoint.startswith(f"{self.directory}/"):
                if mount.fstype == "fuse.cachefs":
                    abort(mount.major_minor, mount.mountpoint, as_root=True)
                if find_mount(mount.mountpoint) is not None:  # the abort may have been a forced unmount
                    unmount(mount.mountpoint, as_root=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running_node(
    *endpoints: str, keeper: Sequence[str] = (), server: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Node]:
    """A keeper and a server that answer."""
    with Node(endpoints) as node:
        node.variables.update(variables or {})
        node.start_keeper(*keeper)
        node.start_supervisor(*server)
        yield node
