"""What all benchmarks have in common: where they work, how they are stopped, what they leave."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .harness import BenchError
from .plots import plot
from .report import Report, save, text_table
from .verdicts import OURS

RESULTS = Path(__file__).parent / "results"
INTERRUPTED = 130


def stop_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C and SIGTERM end the run, and a second one does not end the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_and_publish(name: str, make: Callable[[Path], Report], output: Path, file_system: Path | None = None) -> int:
    """Runs `make` in a directory of its own, which is removed; writes NAME.json, .txt and .png; the exit status.

    1: it could not run, or this project failed where others may. 130: it was interrupted; nothing is written.
    `file_system`: a directory on it; that of the temporary files by itself.
    """
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, stop_once)
    work = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=file_system))
    try:
        report = make(work)
    except KeyboardInterrupt:
        print(f"{name}: interrupted, cleaned up", file=sys.stderr)
        return INTERRUPTED
    except BenchError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return publish(report, output)


def publish(report: Report, output: Path) -> int:
    """Writes and prints the results; 1 when this project failed in one of them."""
    target = save(report, output)
    plot(report, target.with_suffix(".png"))
    print(text_table(report))
    return 1 if any(one.peer == OURS for one in report.failures) else 0
