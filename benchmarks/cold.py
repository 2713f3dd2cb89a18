"""Cold sequential reads: this project, rclone and s3fs on mounts with empty caches, and the loop without FUSE.

All take turns in each round, in an order that changes from round to round; each starts with nothing: no cache, no
mount, no page of the file. Every byte is compared. `python -m benchmarks.cold --rounds 5 --mib 1024`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.s3 import S3Server

from . import workloads
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
from .peers import Cachefs, Peer, Rclone, S3fs
from .plots import plot
from .report import Report, Sample, now, save, text_table

RESULTS = Path(__file__).parent / "results"
PEERS: dict[str, Callable[[], Peer]] = {"cachefs": Cachefs, "rclone": Rclone, "s3fs": S3fs}


def measure(peer: Peer, work: Path, server: S3Server, expected: str, number: int) -> Sample:
    """One cold read of the whole object. Raises BenchError when a byte is wrong."""
    try:
        started = time.perf_counter()
        path = peer.start(work, server)
        ready_seconds = time.perf_counter() - started
        pids = peer.pids()
        before = processor_seconds(pids)
        result = workloads.run("sequential", str(path))
        sample = Sample(
            peer=peer.name,
            workload="cold",
            round=number,
            seconds=result["seconds"],
            bytes=result["bytes"],
            cpu_seconds=processor_seconds(pids) - before,
            rss_mib=peak_rss_mib(pids),
            ready_seconds=ready_seconds,
            first_byte_seconds=result["first_byte_seconds"],
        )
    finally:
        peer.stop()
    if result["digest"] != expected:
        raise BenchError(f"{peer.name} gave wrong bytes")
    return sample


def measure_loop(work: Path, server: S3Server, number: int) -> Sample:
    command = [sys.executable, "-m", "benchmarks.loop", server.endpoint_url, str(work)]
    done = subprocess.run(command, env=server.env(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"loop: {done.stderr.strip()[-500:]}")
    return Sample(peer="loop", workload="cold", round=number, **json.loads(done.stdout))


def turn(name: str, work: Path, server: S3Server, expected: str, number: int) -> Sample:
    work.mkdir()
    try:
        if name == "loop":
            return measure_loop(work, server, number)
        return measure(PEERS[name](), work, server, expected, number)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(names: list[str], rounds: int, mib: int, kind: str, work: Path) -> Report:
    original = work / OBJECT
    write_object(original, mib * MIB)
    expected = digest_of(original)
    samples: list[Sample] = []
    with serving(kind, work / "server", original) as server:
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                sample = turn(name, work / f"{number}-{name}", server, expected, number)
                samples.append(sample)
                print(f"round {number + 1} {name}: {sample.gb_per_s:.3f} GB/s", flush=True)
    programs = {"rclone": [program("rclone"), "version"], "s3fs": [program("s3fs"), "--version"]}
    return Report(
        name=f"cold-{kind}",
        taken=now(),
        machine=machine({name: programs[name] for name in names if name in programs}),
        server=kind,
        object_bytes=mib * MIB,
        rounds=rounds,
        baseline="loop" if "loop" in names else names[0],
        samples=tuple(samples),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--server", choices=("localbucket", "seaweed"), default="localbucket")
    parser.add_argument("--peers", default="cachefs,rclone,s3fs,loop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="cachefs-bench-"))
    try:
        report = run(arguments.peers.split(","), arguments.rounds, arguments.mib, arguments.server, work)
    except BenchError as exc:
        print(f"cold: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    target = save(report, arguments.output)
    plot(report, target.with_suffix(".svg"))
    print(text_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
