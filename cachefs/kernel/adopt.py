"""What a keeper that was started again checks before it takes back from a server what the last keeper gave to it."""

import fcntl
import os
import stat
from pathlib import Path

from cachefs.kernel import wire
from cachefs.kernel.newmount import LEDGER_BYTES, LEDGER_SEALS
from cachefs.kernel.process import log

FUSE_DEVICE = os.makedev(10, 229)
"""/dev/fuse: a misc device, minor 229 (Documentation/admin-guide/devices.txt)."""


class OfferRefused(Exception):
    """What was offered is not what it should be; the message says why."""


def connection_of(descriptor: int) -> int | None:
    """The number of the FUSE connection behind a descriptor of /dev/fuse: the minor of its mount's device.

    None when the descriptor belongs to none, or the kernel is too old to say.
    """
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "fuse_connection":
            return int(value)
    return None


def check_device(descriptor: int, major_minor: str) -> None:
    """Raises OfferRefused unless this is /dev/fuse, open for the mount whose device is `major_minor`, and alive."""
    # In this order: fstat() of a file on the server's own mount would wait for the server, that one is read-only.
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise OfferRefused("the device is not open for reading and writing")
    status = os.fstat(descriptor)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != FUSE_DEVICE:
        raise OfferRefused("the descriptor is not of /dev/fuse")
    connection = connection_of(descriptor)
    if connection is None:
        # Another connection would only be served the server's own files (check_backing), which it can read anyway.
        log("the kernel does not say which mount the offered device serves: it is believed")
    elif str(connection) != major_minor.partition(":")[2]:
        raise OfferRefused(f"the device serves connection {connection}, the mount is {major_minor}")
    if not wire.is_connected(descriptor):
        raise OfferRefused("the connection was closed")


def check_memory(descriptor: int) -> int:
    """The seals of a memory file. Raises OfferRefused for another kind: reading one may wait for ever."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise OfferRefused("not a memory file") from None


def check_ledger(descriptor: int) -> None:
    """Raises OfferRefused unless this is a memory file of the ledger's size that nobody can change the size of."""
    seals = check_memory(descriptor)
    if seals & LEDGER_SEALS != LEDGER_SEALS:
        raise OfferRefused("the ledger's size can be changed")
    if os.fstat(descriptor).st_size != LEDGER_BYTES:
        raise OfferRefused("the ledger has another size")
