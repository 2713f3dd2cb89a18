"""Which volumes are still mounted somewhere: the server's view of /proc/self/mountinfo.

As root every volume is a directory under one FUSE root and is bind-mounted where it is wanted. The server learns
of binds from the kernel and not from those who make them, so it does not matter who unmounts, or how.
"""

import select
from collections.abc import Callable
from pathlib import Path

import trio

from cachefs.kernel.mounts import read_mounts

LOOK_S = 5.0
"""mountinfo tells of changes; this is how often we look all the same."""


def bound_at(device: str) -> dict[str, list[Path]]:
    """Volume name -> where it is bind-mounted. `device` is MAJOR:MINOR of the FUSE mount."""
    found: dict[str, list[Path]] = {}
    for mount in read_mounts():
        if mount.major_minor == device and mount.root != "/":
            found.setdefault(mount.root.split("/")[1], []).append(Path(mount.mountpoint))
    return found


class MountChanges:
    """Waits for the mount table to change. The kernel flags a change on mountinfo with POLLPRI, which only an
    epoll of our own can ask for."""

    def __init__(self) -> None:
        self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  # closed in close()
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI | select.EPOLLERR)

    async def wait(self, timeout_s: float) -> None:
        """Return at the next change, or after `timeout_s`."""
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        self._epoll.poll(0)

    def close(self) -> None:
        self._epoll.close()
        self._file.close()


class Lifetimes:
    """When a volume has lost its last bind. `clock` counts seconds (trio.current_time); `timeout_s` is
    how long a bind may be awaited: whoever asked for the volume may have died."""

    def __init__(self, clock: Callable[[], float], timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._expected: dict[str, tuple[int, float]] = {}  # name -> binds when it was expected, until when

    def expect(self, name: str, bound: int = 0) -> None:
        """Somebody is about to bind this volume, which has `bound` binds now: those may go before that one comes."""
        self._expected[name] = (bound, self._clock() + self._timeout_s)

    def removed(self, name: str) -> None:
        self._expected.pop(name, None)

    def update(self, bound: dict[str, list[Path]], volumes: list[str]) -> list[str]:
        """Take note of the binds that there are; returns the volumes that nobody has or waits for any more."""
        gone = []
        for name in volumes:
            count = len(bound.get(name, ()))
            before, until = self._expected.get(name, (0, 0.0))
            if count > before or until <= self._clock():
                self._expected.pop(name, None)
            if not count and name not in self._expected:
                gone.append(name)
        return gone

    @property
    def expecting(self) -> bool:
        return bool(self._expected)
