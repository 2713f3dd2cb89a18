"""The kernel gives the device number of an unmounted file system to the next one: that one must be left alone."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from cachefs.kernel.mounts import find_mount
from tests.faults.killing import keeper_log
from tests.mount.harness import Mounted, alive, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer

pytestmark = needs_fuse


def test_keeper_that_notices_its_unmount_late_leaves_the_next_mount_alone(tmp_path: Path, origin: LyingServer) -> None:
    origin.put("models", "m/a", b"bytes")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    source = volume("m", "s3://models/m", origin.endpoint_url)
    one, two = Mounted(tmp_path / "one", [source]), Mounted(tmp_path / "two", [source])
    with one, contextlib.ExitStack() as stack:
        stack.push(two)  # its end, also if it is never started
        keeper, server = one.keeper_pid, one.first_server_pid
        found = find_mount(one.mountpoint)
        assert found is not None
        for pid in (keeper, server):
            os.kill(pid, signal.SIGSTOP)
        try:
            # Not umount(8), which would ask the stopped server about the path.
            assert ctypes.CDLL(None).umount2(os.fsencode(one.mountpoint), 0) == 0
            two.start()
            os.kill(keeper, signal.SIGCONT)
            wait_for(lambda: "was unmounted" in keeper_log(one), "the keeper notices")
        finally:
            for pid in (keeper, server):
                os.kill(pid, signal.SIGCONT)
        with_same_number = find_mount(two.mountpoint)
        wait_for(lambda: not alive(keeper), "the keeper of the first mount ends")
        assert with_same_number is not None
        print("the same device number:", with_same_number.major_minor == found.major_minor)
        assert (two.path() / "a").read_bytes() == b"bytes"
        assert find_mount(two.mountpoint) == with_same_number
