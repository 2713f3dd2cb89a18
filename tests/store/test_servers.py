"""The servers that tests use die with the test run, however it ends."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.support.servers import wait_until

PROGRAM = """
import sys, time
from pathlib import Path
from tests.support.s3 import HadroServer
with HadroServer(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_dies_with_a_killed_test_run(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        server = Path("/proc") / process.stdout.readline().strip()
        assert server.exists()
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    wait_until(
        lambda: not server.exists() or "\nState:\tZ" in (server / "status").read_text(), what="the server has died"
    )
