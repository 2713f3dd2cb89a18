"""The driver, with a SIGKILL at one step: `python tests/csi/killing_driver.py STEP ...driver's flags`.

STEP is `WHEN:WHERE:N`: before or after the N-th call of WHERE (records.put, records.remove, server.publish,
server.unpublish, kernel.bind, kernel.unmount, targets.mkdir).
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from csi import __main__ as command
from csi import mounts, records, server, service

PLACES = {
    "records.put": (records.Publications, "_write"),
    "records.remove": (records.Publications, "remove"),
    "server.publish": (server.ControlServer, "volume_publish"),
    "server.unpublish": (server.ControlServer, "volume_unpublish"),
    "kernel.bind": (mounts.Kernel, "bind"),
    "kernel.unmount": (mounts.Kernel, "unmount"),
    "targets.mkdir": (mounts.Targets, "make_directory"),
}


def dying(method: Callable[..., Any], when: str, count: int) -> Callable[..., Any]:
    """`method`, with a SIGKILL around its `count`-th call."""
    calls = 0

    def wrapper(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*args, **named)
        if calls == count and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


def main() -> int:
    """The driver's exit code, if it lives."""
    when, where, count = sys.argv[1].split(":")
    kind, name = PLACES[where]
    setattr(kind, name, dying(getattr(kind, name), when, int(count)))
    assert service.Driver is not None
    return command.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
