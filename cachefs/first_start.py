"""The first process of a mount: starts the server, then becomes its keeper.

    python -m cachefs.first_start READY CREDENTIALS LINK SERVER_LINK SERVER_LOG SERVER_MODULE (background|foreground)

Five descriptors: for the one line that says what became of the mount, the secrets, both ends of the socket between
keeper and server, and the server's log; MountConfig as JSON on stdin.

The keeper's imports take 40 ms and the mount 5, the server's interpreter and imports 130: they run side by side. So
nothing of the keeper is imported before the server runs. It waits for its session, and ends when the keeper does.
"""

import os
import signal
import sys

from cachefs.kernel.spawn import python_command, spawn


def main(arguments: list[str]) -> int:
    """The keeper's exit status."""
    ready, credentials, link, server_link, server_log = map(int, arguments[:5])
    module, how = arguments[5:]
    for descriptor in (ready, credentials, link, server_link, server_log):
        os.set_inheritable(descriptor, False)
    # A parent may have left it ignored: then children are reaped by the kernel, and how a server ended is lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if how == "background" and os.fork():
        os._exit(0)  # the command waits for this process only; the keeper is nobody's child
    command = python_command(sys.executable, "-m", module, "3")
    try:
        # The environment has no secrets: the command that started us has taken them out.
        pid = spawn(command, os.environ, link=server_link, stderr=server_log, inherit=credentials)
    except OSError:
        pid = -1  # the keeper tries it again, and says what is wrong
    os.close(server_link)
    os.close(server_log)

    from cachefs import keeper

    return keeper.start(ready, module, foreground=how == "foreground", waiting_pid=pid, link=link)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
