"""What test_keeper_user.py runs as a user who is not root: `python -m tests.mount.keeper_as_user DIRECTORY`."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from cachefs.errors import UsageError
from cachefs.kernel.mounts import probe
from tests.mount.keeper_support import DEADLINE_S, TinyMount, is_alive, kill_both, wait_until


def reader_survives_everybodys_death(tiny: TinyMount, data: bytes) -> None:
    tiny.switch("slow")
    reader = subprocess.Popen(["sha256sum", str(tiny.mountpoint / "f")], stdout=subprocess.PIPE, text=True)
    tiny.kill_server()
    tiny.kill_keeper()
    tiny.kill_server()
    tiny.switch("slow", on=False)
    output, _ = reader.communicate(timeout=DEADLINE_S)
    assert output.split()[0] == hashlib.sha256(data).hexdigest()
    print("survived")


def main() -> None:
    assert os.geteuid() != 0
    data = os.urandom(16 << 20)
    with TinyMount(Path(sys.argv[1])) as tiny:
        (tiny.data / "f").write_bytes(data)
        tiny.start()
        reader_survives_everybodys_death(tiny, data)

        assert "kernel refused" in str(tiny.command("hostile", "good"))  # it needs CAP_SYS_ADMIN
        assert tiny.listing() == ["f"]
        print("without passthrough")

        kill_both(tiny)
        wait_until(lambda: probe(tiny.mountpoint) == "dead", "a dead mount")
        (tiny.state / "server.json").unlink()
        tiny.start()
        assert tiny.listing() == ["f"]
        print("recovered")

        subprocess.run(["fusermount3", "-u", str(tiny.mountpoint)], check=True, timeout=DEADLINE_S)
        tiny.wait_for_end()
        print("unmounted")

        (tiny.state / "server.json").unlink()
        tiny.start()
        tiny.command("unmount")
        tiny.wait_for_end()
        assert not any(is_alive(pid) for pid in tiny.pids)
        print("ended")

        tiny.mountpoint.chmod(0o555)
        try:
            tiny.start()
        except UsageError as exc:
            print("refused", exc)


if __name__ == "__main__":
    main()
