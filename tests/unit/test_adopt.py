"""What a keeper takes back from a server: only what it gave."""

import os
from pathlib import Path

import pytest

from cachefs.kernel.adopt import OfferRefused, check_device, check_ledger, check_memory
from cachefs.kernel.newmount import LEDGER_BYTES, make_ledger


def test_only_a_ledger_of_fixed_size_is_taken(tmp_path: Path) -> None:
    check_ledger(make_ledger())
    loose = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, LEDGER_BYTES)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(LEDGER_BYTES)
        for descriptor in (loose, file.fileno()):
            with pytest.raises(OfferRefused):
                check_ledger(descriptor)
    os.close(loose)


def test_only_memory_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        with pytest.raises(OfferRefused):
            check_memory(descriptor)
        os.close(descriptor)


def test_only_the_device_of_a_mount_is_taken() -> None:
    paths = ["/dev/null", "/dev/fuse"] if os.access("/dev/fuse", os.R_OK | os.W_OK) else ["/dev/null"]
    for path in paths:
        for flags in (os.O_RDONLY, os.O_RDWR):
            descriptor = os.open(path, flags)
            with pytest.raises(OfferRefused):
                check_device(descriptor, "0:99")
            os.close(descriptor)
