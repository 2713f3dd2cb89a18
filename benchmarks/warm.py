"""Warm reads against a plain local file: this project (sealed, passthrough), rclone, s3fs and JuiceFS in one run.

Each has the object wholly local and has been read once before the clock starts. All take turns in each round and
workload. `python -m benchmarks.warm --rounds 7 --mib 1024`.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from . import workloads
from .frame import RESULTS, run_and_publish
from .harness import (
    MIB,
    OBJECT,
    BenchError,
    digest_of,
    machine,
    peak_rss_mib,
    processor_seconds,
    program,
    serving,
    write_object,
)
from .peers import Cachefs, Juicefs, Native, Peer, Rclone, S3fs
from .report import Report, Sample, now

WORKLOADS = ("plain", "mmap", "four", "random")
PROGRAMS = {"rclone": "version", "s3fs": "--version", "juicefs": "version"}


def factories(original: Path) -> dict[str, Callable[[], Peer]]:
    return {
        "native": lambda: Native(original),
        "cachefs": Cachefs,
        "rclone": Rclone,
        "s3fs": S3fs,
        "juicefs": lambda: Juicefs(original),
    }


def measure(peer: Peer, path: Path, workload: str, number: int) -> Sample:
    pids = peer.pids()
    upcalls, before = peer.upcalls(), processor_seconds(pids)
    result = workloads.run(workload, str(path))
    cpu_seconds, later = processor_seconds(pids) - before, peer.upcalls()
    return Sample(
        peer=peer.name,
        workload=workload,
        round=number,
        seconds=result["seconds"],
        bytes=result["bytes"],
        cpu_seconds=cpu_seconds,
        rss_mib=peak_rss_mib(pids) if pids else None,
        upcalls=None if upcalls is None or later is None else later - upcalls,
    )


def run(names: list[str], rounds: int, mib: int, kind: str, work: Path) -> Report:
    original = work / OBJECT
    write_object(original, mib * MIB)
    expected = digest_of(original)
    make = factories(original)
    samples: list[Sample] = []
    with serving(kind, work / "server", original) as server, ExitStack() as stack:
        ready: list[tuple[Peer, Path]] = []
        for name in names:
            peer = make[name]()
            (work / name).mkdir()
            stack.callback(peer.stop)
            path = peer.start(work / name, server)
            peer.make_warm(path)
            # A new open: what was sealed meanwhile is served as sealed. It also brings the file into the page cache.
            if digest_of(path) != expected:
                raise BenchError(f"{name} gave wrong bytes")
            ready.append((peer, path))
        for number in range(rounds):
            shift = number % len(ready)
            for workload in WORKLOADS:
                for peer, path in ready[shift:] + ready[:shift]:
                    samples.append(measure(peer, path, workload, number))
            print(f"round {number + 1} of {rounds} done", flush=True)
    return Report(
        name="warm",
        taken=now(),
        machine=machine({name: [program(name), PROGRAMS[name]] for name in names if name in PROGRAMS}),
        server=kind,
        object_bytes=mib * MIB,
        rounds=rounds,
        baseline="native",
        samples=tuple(samples),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--server", choices=("localbucket", "seaweed"), default="localbucket")
    parser.add_argument("--peers", default="native,cachefs,rclone,s3fs,juicefs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--directory", type=Path, help="file system to measure on (default: that of the temporary files)"
    )
    arguments = parser.parse_args()
    names = arguments.peers.split(",")

    def make(work: Path) -> Report:
        return run(names, arguments.rounds, arguments.mib, arguments.server, work)

    return run_and_publish("warm", make, arguments.output, arguments.directory)


if __name__ == "__main__":
    sys.exit(main())
