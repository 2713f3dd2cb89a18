"""Starting keepers and servers by posix_spawn. Imports next to nothing: the first process of a mount has only this."""

import os
import signal
from collections.abc import Mapping, Sequence

LINK_FD = 3
"""Where a started keeper or server finds its socket."""


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    link: int,
    stderr: int,
    stdin: int = -1,
    inherit: int = -1,
) -> int:
    """Start a process in a session of its own with `link` as its descriptor 3, and return its pid.

    posix_spawn, because it does not copy the page tables of a large server, and is safe beside threads.
    stdout goes to `stderr`; stdin is /dev/null unless it is given; of other descriptors `inherit` is inherited, and
    what is marked so.
    """
    source = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0) if stdin < 0 else (os.POSIX_SPAWN_DUP2, stdin, 0)
    # The descriptors are above 3 or are dup2'ed before 3 is overwritten; dup2 clears close-on-exec.
    actions = [
        source,
        (os.POSIX_SPAWN_DUP2, stderr, 1),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
        (os.POSIX_SPAWN_DUP2, link, LINK_FD),
    ]
    if inherit >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, inherit, inherit))  # onto itself
    return os.posix_spawn(
        command[0],
        list(command),
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD),
    )


def python_command(python: str, *arguments: str) -> list[str]:
    """How keeper and server are started: -P, or a module in the working directory would be taken for ours."""
    return [python, "-P", *arguments]
