"""cachefs.daemon whose check of passthrough is held up: the first server's without end, the next one's until somebody
opens a file.

    python -m tests.mount.held_check_server FD

A check that is held has registered its file already. STATE/checking is there once the first server is at that point.
"""

import logging
import os
import sys
from pathlib import Path

import trio

from cachefs import daemon, passthrough
from cachefs.passthrough import SELF_CHECK_INODE, Passthrough, SelfCheck
from cachefs.vfs import Opened, Vfs

OPEN_WAIT_S = 60.0
opened = trio.Event()
read_back, open_file = Passthrough._read_back, Vfs.open


async def held_read_back(self: Passthrough, path: Path, check: SelfCheck, nursery: trio.Nursery) -> str:
    """As Passthrough._read_back()."""
    session = self._link.session  # type: ignore[attr-defined]
    if session.generation == 0:
        (session.config.server.state_dir / "checking").touch()
        await trio.sleep_forever()
    with trio.move_on_after(OPEN_WAIT_S):
        await opened.wait()
    return await read_back(self, path, check, nursery)


async def noted_open(self: Vfs, inode: int, flags: int) -> Opened:
    """As Vfs.open()."""
    if inode != SELF_CHECK_INODE:
        opened.set()
    return await open_file(self, inode, flags)


if __name__ == "__main__":
    Passthrough._read_back = held_read_back  # type: ignore[method-assign]
    Vfs.open = noted_open  # type: ignore[method-assign]
    passthrough.SELF_CHECK_DEADLINE_S = passthrough.CHECK_WAIT_S = 2 * OPEN_WAIT_S
    code = daemon.main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # as the daemon does
