"""Keeps a server of node mode running, and for it what must survive its death: the mount's device and the credentials.

    python -m cachefs.supervisor FD        FD: a memory file with a NodeConfig as JSON

The standard library only, and no look into what it keeps: descriptors under names, handed to the next server process.
Unprivileged, the container's first process. SIGTERM ends the server, which leaves its requests to the next one.

Server and supervisor speak over a SEQPACKET pair, the server's end is its descriptor 3. First the supervisor sends
{"kept": [names], "starts": n} with a descriptor per name. The server sends {"keep": [names]} with descriptors that
replace those of the same names, {"note": {...}} (backing files since "session" was last kept; given to the next server
in the memory file "notes", a JSON list) and {"ready": true}.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time

PACKET_BYTES_MAX = 65536
DESCRIPTORS_MAX = 8
NOTES_MAX = 1_000_000
STOP_GRACE_S = 10.0
BACKOFF_READY_S_MAX = 0.2
BACKOFF_FAILED_S_MAX = 5.0
STEADY_S = 1.0
USAGE_EXIT_CODE = 2
LINK_FD = 3


def log(text: str) -> None:
    """One line to stderr."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} supervisor[{os.getpid()}] {text}\n")
        sys.stderr.flush()


def memory_file(name: str, data: bytes) -> int:
    """A new memory file; the caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


class Supervisor:
    """One server process at a time. run() returns the exit status."""

    def __init__(self, config_fd: int, module: str) -> None:
        self._kept = {"config": config_fd}
        self._module = module
        self._notes: list[object] = []
        self._starts = 0
        self._failures = 0
        self._pid = 0
        self._sock: socket.socket | None = None
        self._ready = False
        self._started_s = 0.0
        self._restart_at_s: float | None = 0.0
        self._kill_at_s: float | None = None
        self._stopping = False
        self._wakeup_fd, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)

    def run(self) -> int:
        """Until SIGTERM, or the first server says that its settings make no sense."""
        while True:
            now_s = time.monotonic()
            if self._restart_at_s is not None and now_s >= self._restart_at_s:
                self._start()
            if self._kill_at_s is not None and now_s >= self._kill_at_s:
                self._kill_at_s = None
                log(f"server {self._pid} does not end: killing it")
                os.kill(self._pid, signal.SIGKILL)
            poller = select.poll()
            poller.register(self._wakeup_fd, select.POLLIN)
            if self._sock is not None:
                poller.register(self._sock, select.POLLIN)
            until_s = [at_s - now_s for at_s in (self._restart_at_s, self._kill_at_s) if at_s is not None]
            events = {fd for fd, _ in poller.poll(max(0.0, min([*until_s, 60.0])) * 1000 + 1)}
            if self._sock is not None and self._sock.fileno() in events:
                self._receive()
            if self._wakeup_fd in events:
                status = self._signals(set(os.read(self._wakeup_fd, 4096)))
                if status is not None:
                    return status

    def _start(self) -> None:
        self._restart_at_s = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        notes_fd = memory_file("cachefs-notes", json.dumps(self._notes).encode())
        kept = {**self._kept, "notes": notes_fd}
        try:
            head = json.dumps({"kept": list(kept), "starts": self._starts}).encode()
            socket.send_fds(ours, [head], list(kept.values()))
            command = [sys.executable, "-P", "-m", self._module, "--node", str(LINK_FD)]
            self._pid = os.posix_spawn(
                command[0],
                command,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), LINK_FD)],
                setsigmask=(),
                setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD),
            )
        finally:
            theirs.close()
            os.close(notes_fd)
        ours.setblocking(False)
        self._sock = ours
        self._starts += 1
        self._ready = False
        self._started_s = time.monotonic()
        log(f"started server {self._pid}")

    def _receive(self) -> None:
        while self._sock is not None:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, PACKET_BYTES_MAX, DESCRIPTORS_MAX)
            except BlockingIOError:
                return
            except ConnectionError:
                data, descriptors = b"", []
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)  # CPython 3.11 drops recv_fds' flags
            if not data:
                self._sock.close()
                self._sock = None
                return
            try:
                message = json.loads(data)
                names = [str(name) for name in message.get("keep", ())]
            except (ValueError, AttributeError, TypeError):
                names, message = [], {}
            self._keep(names, descriptors)
            if "note" in message and len(self._notes) < NOTES_MAX:
                self._notes.append(message["note"])
            if message.get("ready"):
                self._ready = True
                log(f"server {self._pid} is ready after {time.monotonic() - self._started_s:.2f} s")

    def _keep(self, names: list[str], descriptors: list[int]) -> None:
        if len(names) != len(descriptors):
            names = []
        if "session" in names:
            self._notes.clear()
        for name, descriptor in zip(names, descriptors, strict=False):
            old = self._kept.get(name)
            if name == "config" or (old is None and len(self._kept) >= DESCRIPTORS_MAX - 1):
                os.close(descriptor)
                continue
            self._kept[name] = descriptor
            if old is not None:
                os.close(old)
        for descriptor in descriptors[len(names) :]:
            os.close(descriptor)

    def _signals(self, numbers: set[int]) -> int | None:
        if numbers & {signal.SIGTERM, signal.SIGINT} and not self._stopping:
            self._stopping = True
            log("ending the server")
            if not self._pid:
                return 0
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            self._kill_at_s = time.monotonic() + STOP_GRACE_S
        # As the first process of a container this one also gets others' orphans.
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid == self._pid:
                    code = os.waitstatus_to_exitcode(status)
                    return self._ended(code)
        return None

    def _ended(self, code: int) -> int | None:
        self._receive()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        log(f"server {self._pid} ended: {f'exit status {code}' if code >= 0 else f'signal {-code}'}")
        self._pid = 0
        self._kill_at_s = None
        if self._stopping:
            return 0
        lived_s = time.monotonic() - self._started_s
        if self._ready:
            self._failures = 0 if lived_s > STEADY_S else self._failures + 1
            backoff_s = min(BACKOFF_READY_S_MAX, 0.05 * self._failures)
        elif self._starts == 1 and code == USAGE_EXIT_CODE:
            return code
        else:
            self._failures += 1
            backoff_s = min(BACKOFF_FAILED_S_MAX, 0.1 * 2 ** min(self._failures, 10))
        self._restart_at_s = time.monotonic() + backoff_s
        return None


def main() -> int:
    """See the module's docstring."""
    config_fd = int(sys.argv[1])
    os.set_inheritable(config_fd, False)
    module = sys.argv[2] if len(sys.argv) > 2 else "cachefs.daemon"
    return Supervisor(config_fd, module).run()


if __name__ == "__main__":
    sys.exit(main())
