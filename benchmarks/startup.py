"""How long until a replica has its model: through the mount, and by downloading before the start.

Three cases: `first` (the first replica on an empty node), `second` (another replica on the node that has it), `new`
(scale-up: a node with nothing, while the first one goes on serving). The clock runs from the launch of the mount or
the download, and has the loader's process in it, as a pod's start has. Loads: `shards` (a sharded model, every
tensor copied and compared), `engine` (a real llama.cpp server with a real model of 253 MB, to the first token),
`engine-large` (the same with a model of --mib and random weights).
`python -m benchmarks.startup --rounds 5 --mib 2048`.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from . import gguf, workloads
from .cells import target_of
from .cold import CELL_ERRORS, CELL_SECONDS_MAX, Data, failed, reference, versions_of
from .downloads import Download, RcloneCopy, S5cmd
from .frame import RESULTS, run_and_publish
from .harness import BUCKET, BenchError, Target, digest_of, machine, peak_rss_mib, processor_seconds
from .links import Link, links
from .outlook import CASES, ENGINE, KINDS, LARGE_ENGINE, SHARDS, conclusions
from .peers import Cachefs
from .report import Failure, Report, Sample, now

WHOLE_MODEL = {"CACHEFS_PREFETCH": "all"}
"""A replica will read all of its model: the mount is told so."""


def _load_shards(path: Path) -> dict[str, Any]:
    launched = time.perf_counter()
    result = workloads.run(SHARDS.name, str(path), CELL_SECONDS_MAX)
    # CLOCK_MONOTONIC is one clock for all processes.
    process_seconds = result["began"] - launched
    times = {name: process_seconds + result[name] for name in ("seconds", "first_tensor_seconds")}
    return result | times | {"process_seconds": process_seconds}


class Load(NamedTuple):
    """What is started: `run(path)` gives what a workload gives, with times from the launch of its process on."""

    name: str
    workload: str
    run: Callable[[Path], dict[str, Any]]

    @property
    def target(self) -> Target:
        return target_of(self.workload)


def _start_engine(path: Path) -> dict[str, Any]:
    return gguf.serve(str(path))


LOADS = {
    load.name: load
    for load in (
        Load(SHARDS.name, "shards", _load_shards),
        Load(ENGINE.name, "gguf", _start_engine),
        Load(LARGE_ENGINE.name, "gguf-large", _start_engine),
    )
}


class Startup:
    """Measures one approach after the other with one load on one link."""

    def __init__(self, data: Data, load: Load, link: Link, work: Path) -> None:
        self._data = data
        self._load = load
        self._link = link
        self._work = work
        self.label = f"{link.plan.name} {load.name}"

    def _sample(self, peer: str, case: str, number: int, path: Path, ready: float) -> Sample:
        """Loads; `ready`: seconds of the mount or of the download, which have just ended."""
        result = self._load.run(path)
        if result["digest"] != self._data.expected(self._load.workload, self._load.target):
            raise BenchError("wrong bytes, or another answer than from a local file")
        return Sample(
            peer=peer,
            workload=f"{self.label} {case}",
            round=number,
            seconds=ready + result["seconds"],
            bytes=int(result["bytes"]),
            ready_seconds=ready,
            first_tensor_seconds=ready + result["first_tensor_seconds"],
            process_seconds=result["process_seconds"],
        )

    def _compare(self, path: Path) -> None:
        """Every byte of a single file, after the clock: an engine's tokens do not depend on each of them."""
        if path.is_file() and digest_of(path) != digest_of(self._data.bucket / self._load.target.prefix / path.name):
            raise BenchError("wrong bytes")

    def ours(self, number: int) -> list[Sample]:
        """All three cases: they need each other's state."""
        one, other = Cachefs(self._load.target, WHOLE_MODEL), Cachefs(self._load.target, WHOLE_MODEL)
        first, second = self._work / "node1", self._work / "node2"
        try:
            samples = [self._cold(one, first, "first", number)]
            one.make_warm(self._load.target.under(first / "mnt"))
            started = time.perf_counter()
            path = one.mount_at(first / "mnt2", self._link)
            ready = time.perf_counter() - started
            samples.append(self._sample(one.name, "second", number, path, ready))
            self._compare(path)
            samples.append(self._cold(other, second, "new", number))
        finally:
            try:
                other.stop()
            finally:
                one.stop()
            for directory in (first, second):
                shutil.rmtree(directory, ignore_errors=True)
        return samples

    def _cold(self, peer: Cachefs, work: Path, case: str, number: int) -> Sample:
        work.mkdir(parents=True)
        position = self._link.log_position()
        started = time.perf_counter()
        path = peer.start(work, self._link)
        ready = time.perf_counter() - started
        pids = peer.pids()
        before = processor_seconds(pids)
        sample = self._sample(peer.name, case, number, path, ready)
        sample = msgspec.structs.replace(
            sample,
            cpu_seconds=processor_seconds(pids) - before,
            rss_mib=peak_rss_mib(pids),
            fetched_bytes=self._link.bytes_since(position, f"/{BUCKET}/{self._load.target.prefix}/"),
        )
        self._compare(path)
        return sample

    def download(self, kind: Callable[[Target], Download], number: int) -> list[Sample]:
        """Download, then start: it is the same for every replica, so that one measurement stands for all cases."""
        peer = kind(self._load.target)
        work = self._work / "download"
        work.mkdir(parents=True)
        try:
            started = time.perf_counter()
            path = peer.start(work, self._link)
            ready = time.perf_counter() - started
            sample = self._sample(peer.name, "first", number, path, ready)
            self._compare(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sample = msgspec.structs.replace(sample, cpu_seconds=peer.cpu_seconds, rss_mib=peer.rss_mib)
        return [msgspec.structs.replace(sample, workload=f"{self.label} {case}") for case in CASES]

    def gets(self, number: int) -> list[Sample]:
        """What the link gives to the parallel GETs of one file of the model."""
        work = self._work / "gets"
        work.mkdir(parents=True)
        try:
            return [reference("gets", f"{self.label} link", self._link, work, self._load.target, number)]
        finally:
            shutil.rmtree(work, ignore_errors=True)


def run(names: list[str], given: argparse.Namespace, work: Path) -> Report:
    data = Data(work / "buckets")
    wanted = [LOADS[name] for name in given.loads.split(",")]
    data.make({load.target.prefix for load in wanted}, given.mib)
    loads = [load for load in wanted if data.has(load.target.prefix)]
    for line in data.notes:
        print(f"startup: {line}", flush=True)
    (work / "links").mkdir()
    samples: list[Sample] = []
    failures: list[Failure] = []
    with links(names, data.root, work / "links") as made:
        for number in range(given.rounds):
            for load in loads:
                for name in names:
                    turn(Startup(data, load, made[name], work / "turns"), number, samples, failures)
            print(f"round {number + 1} of {given.rounds} done", flush=True)
    report = Report(
        name="startup",
        taken=now(),
        machine=machine(versions_of(("rclone", "s5cmd"))),
        server="nginx; links " + ", ".join(names),
        object_bytes=given.mib * 2**20,
        rounds=given.rounds,
        baseline=Cachefs.name,
        samples=tuple(samples),
        failures=tuple(failures),
    )
    return msgspec.structs.replace(report, notes=(*data.notes, *conclusions(report, names)))


def turn(startup: Startup, number: int, samples: list[Sample], failures: list[Failure]) -> None:
    """One round with one load on one link: everybody once, in an order that turns."""
    steps: list[tuple[str, Callable[[], list[Sample]]]] = [
        (Cachefs.name, lambda: startup.ours(number)),
        (S5cmd.name, lambda: startup.download(S5cmd, number)),
        (RcloneCopy.name, lambda: startup.download(RcloneCopy, number)),
        ("gets", lambda: startup.gets(number)),
    ]
    shift = number % len(steps)
    for name, step in steps[shift:] + steps[:shift]:
        try:
            found = step()
        except CELL_ERRORS as exc:
            failures.append(failed(name, startup.label, number, exc))
            continue
        samples += found
        for sample in found:
            print(f"round {number + 1} {sample.workload} {sample.peer}: {sample.seconds:.2f} s", flush=True)


def loads_of(given: str) -> str:
    """An argument of names of loads; argparse tells of a ValueError."""
    if unknown := [name for name in given.split(",") if name not in LOADS]:
        raise ValueError(unknown)
    return given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", default="constrained")
    parser.add_argument("--loads", default=",".join(kind.name for kind in KINDS), type=loads_of)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=2048, help="size of a model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.links.split(",")
    return run_and_publish("startup", lambda work: run(names, arguments, work), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
