"""The real server, but a LOOKUP of the name "hang" is not answered while the file STATE/hang is there.

That is what an origin does that hangs in a LIST, at a moment of the test's choice. While it waits, STATE/waiting
is there.
"""

import logging
import os
import sys
from pathlib import Path

import trio

from cachefs import daemon
from cachefs.link import KeeperLink
from cachefs.tree import Node, Tree

POLL_S = 0.02


def main() -> int:
    lookup = Tree.lookup
    receive = KeeperLink.receive.__func__
    state_dir = Path()

    def receiving(cls: type[KeeperLink], fd: int) -> KeeperLink:
        nonlocal state_dir
        link: KeeperLink = receive(cls, fd)
        state_dir = link.session.config.server.state_dir
        return link

    async def looking_up(self: Tree, parent: int, name: str) -> Node:
        if name == "hang":
            while (state_dir / "hang").exists():
                (state_dir / "waiting").touch()
                await trio.sleep(POLL_S)
        return await lookup(self, parent, name)

    KeeperLink.receive = classmethod(receiving)
    Tree.lookup = looking_up
    return daemon.main(sys.argv[1:])


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)
