"""The demo is a command that users run first: it works, tells what it did, and leaves nothing, also when stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 150.0

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened here"),
    pytest.mark.timeout(400),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the demo makes its directory: short, for a socket's path is at most 107 bytes long."""
    directory = tmp_path / "t"
    directory.mkdir()
    return directory


@pytest.fixture
def demo(place: Path) -> Iterator["subprocess.Popen[str]"]:
    environment = {
        **os.environ,
        "TMPDIR": str(place),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-m", "benchmarks.demo"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that starts tests in the background has them ignore it, and they pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def mounts_under(place: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {place}/" in line]


def test_demo_compares_every_tensor_and_cleans_up(demo: "subprocess.Popen[str]", place: Path) -> None:
    output, _ = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 0, output
    assert re.search(r"every byte was right: \d{2,} tensors and \d+ files compared", output), output
    network_mb = {name: float(mb) for name, mb in re.findall(r"\b(cold|warm) .* ([\d.]+) MB .* [\d.]+ MB", output)}
    assert network_mb["cold"] > 90
    assert network_mb["warm"] == 0
    assert mounts_under(place) == []
    assert list(place.glob("cachefs-demo-*")) == []


def test_interrupted_demo_leaves_nothing_mounted(demo: "subprocess.Popen[str]", place: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not mounts_under(place) and demo.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 130, output
    assert mounts_under(place) == []
    assert list(place.glob("cachefs-demo-*")) == []
