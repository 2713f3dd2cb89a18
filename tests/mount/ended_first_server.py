"""first_start.py with a first server that ends by SIGKILL: `dead`, before its session is sent, or `takes`, once it was.

    python -m tests.mount.ended_first_server (the arguments of first_start)

CACHEFS_TEST_FIRST_SERVER says which. SIGCHLD is ignored, as a parent may leave it.
"""

import os
import signal
import sys
from typing import Any

from cachefs import first_start
from cachefs.kernel.spawn import spawn

DIE = {
    "dead": "import os; os.kill(os.getpid(), 9)",
    "takes": "import os, socket; socket.socket(fileno=3).recv(1, socket.MSG_PEEK); os.kill(os.getpid(), 9)",
}


def spawn_ended(command: list[str], environment: dict[str, str], **options: Any) -> int:
    """As spawn()."""
    how = environment["CACHEFS_TEST_FIRST_SERVER"]
    pid = spawn([command[0], "-c", DIE[how]], environment, **options)
    if how == "dead":
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    first_start.spawn = spawn_ended  # type: ignore[assignment]
    sys.exit(first_start.main(sys.argv[1:]))
