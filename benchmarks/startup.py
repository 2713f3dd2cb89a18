"""How long until a replica has its model: through the mount, and by downloading before the start.

Three cases: `first` (the first replica on an empty node), `second` (another replica on the node that has it), `new`
(scale-up: a node with nothing, while the first one goes on serving). Each time includes the mount or the download and
the load of all tensors of a sharded model, as an engine does it. Every byte is compared.
`python -m benchmarks.startup --rounds 5 --mib 2048`.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from . import workloads
from .cells import DOWNLOADS
from .cold import CELL_SECONDS_MAX, RESULTS, VERSIONS, Data, stop_once
from .downloads import Download, RcloneCopy, S5cmd
from .harness import BUCKET, BenchError, Target, machine, peak_rss_mib, processor_seconds, program
from .links import Link, links
from .peers import Cachefs
from .plots import plot
from .report import Failure, Report, Sample, best_of, chosen, now, ratio_between, save, text_table
from .verdicts import OURS, Verdict

SHARDS = Target("shards", "")
LOAD = "shards"
CASES = {"first": 1.3, "second": 10.0, "new": 1.3}
"""Least ratio to the best download that is wanted; a mount's time is part of it, as a download's is."""
MODEL_BYTES = 140 * 10**9
LINKS_GBIT_PER_S = (10, 100)


class Startup:
    """Measures one approach after the other on one link."""

    def __init__(self, data: Data, link: Link, work: Path) -> None:
        self._data = data
        self._link = link
        self._work = work

    def _load(self, path: Path) -> dict[str, float]:
        result = workloads.run(LOAD, str(path), CELL_SECONDS_MAX)
        if result["digest"] != self._data.expected(LOAD, SHARDS):
            raise BenchError("wrong bytes")
        return result

    def _sample(self, peer: str, case: str, number: int, ready: float, load: dict[str, float]) -> Sample:
        return Sample(
            peer=peer,
            workload=f"{self._link.plan.name} {case}",
            round=number,
            seconds=ready + load["seconds"],
            bytes=int(load["bytes"]),
            ready_seconds=ready,
            first_tensor_seconds=ready + load["first_tensor_seconds"],
        )

    def ours(self, number: int) -> list[Sample]:
        """All three cases: they need each other's state."""
        one, other = Cachefs(SHARDS), Cachefs(SHARDS)
        first, second = self._work / "node1", self._work / "node2"
        try:
            samples = [self._cold(one, first, "first", number)]
            one.make_warm(SHARDS.under(first / "mnt"))
            started = time.perf_counter()
            path = one.mount_at(first / "mnt2", self._link)
            ready = time.perf_counter() - started
            samples.append(self._sample(OURS, "second", number, ready, self._load(path)))
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
        sample = self._sample(peer.name, case, number, ready, self._load(path))
        return msgspec.structs.replace(
            sample,
            cpu_seconds=processor_seconds(pids) - before,
            rss_mib=peak_rss_mib(pids),
            fetched_bytes=self._link.bytes_since(position, f"/{BUCKET}/{SHARDS.prefix}/"),
        )

    def download(self, peer: Download, case: str, number: int) -> Sample:
        """Download, then start: the same for every replica."""
        work = self._work / "download"
        work.mkdir(parents=True)
        try:
            started = time.perf_counter()
            path = peer.start(work, self._link)
            ready = time.perf_counter() - started
            sample = self._sample(peer.name, case, number, ready, self._load(path))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return msgspec.structs.replace(sample, cpu_seconds=peer.cpu_seconds, rss_mib=peer.rss_mib)

    def gets(self, number: int) -> Sample:
        """What the link gives to one shard's parallel GETs."""
        work = self._work / "gets"
        work.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.loop", self._link.endpoint_url, str(work), SHARDS.prefix, "gets"]
        try:
            done = subprocess.run(
                command, env=self._link.env(), capture_output=True, text=True, check=False, timeout=CELL_SECONDS_MAX
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if done.returncode != 0:
            raise BenchError(f"gets: {done.stderr.strip()[-500:]}")
        label = f"{self._link.plan.name} link"
        return Sample(peer="gets", workload=label, round=number, **json.loads(done.stdout))


class Outlook(NamedTuple):
    """What a large model would take: seconds."""

    first: float
    second: float
    new: float
    download: float


def outlook(report: Report, link: str, gbit_per_s: float, best: str) -> Outlook | None:
    """MODEL_BYTES over a link of this speed, at the measured share of what the measured link gave. Pure.

    A second replica reads the local disk at the measured speed, whatever the link. A download's load comes after it,
    at the measured local speed; a mount's load goes on meanwhile. None when something was not measured.
    """
    given = [sample.gb_per_s for sample in chosen(report, "gets", f"{link} link")]
    cases = {case: chosen(report, OURS, f"{link} {case}") for case in CASES}
    downloads = chosen(report, best, f"{link} first")
    if not given or not downloads or not all(cases.values()):
        return None
    link_gb_per_s, model_gb = gbit_per_s / 8, MODEL_BYTES / 1e9
    measured = statistics.median(given)

    def cold(case: str) -> float:
        return _ready(cases[case]) + model_gb / (link_gb_per_s * _load_gb_per_s(cases[case]) / measured)

    fetching = statistics.median(s.bytes / (s.ready_seconds or s.seconds) / 1e9 for s in downloads)
    return Outlook(
        first=cold("first"),
        second=_ready(cases["second"]) + model_gb / _load_gb_per_s(cases["second"]),
        new=cold("new"),
        download=model_gb / (link_gb_per_s * fetching / measured) + model_gb / _load_gb_per_s(downloads),
    )


def _ready(samples: list[Sample]) -> float:
    """Seconds of the mount: they do not grow with the model."""
    return statistics.median(sample.ready_seconds or 0.0 for sample in samples)


def _load_gb_per_s(samples: list[Sample]) -> float:
    return statistics.median(s.bytes / (s.seconds - (s.ready_seconds or 0.0)) / 1e9 for s in samples)


def conclusions(report: Report, names: list[str]) -> list[str]:
    """Lines below the table: what was promised, and the outlook."""
    lines: list[str] = []
    for link in names:
        for case, wanted in CASES.items():
            best = best_of(report, DOWNLOADS, f"{link} {case}")
            value = best and ratio_between(report, (OURS, f"{link} {case}"), (best, f"{link} {case}"))
            if best and value is not None:
                lines.append(Verdict(f"{link} {case}: against {best}, then start", float(value), wanted).line())
        best = best_of(report, DOWNLOADS, f"{link} first")
        for speed in LINKS_GBIT_PER_S if best else ():
            seen = outlook(report, link, speed, best or "")
            if seen:
                lines.append(
                    f"140 GB at {speed} Gbit/s by the efficiency on the {link} link: first replica {seen.first:.0f} s, "
                    f"second {seen.second:.0f} s, new node {seen.new:.0f} s; {best}, then start: {seen.download:.0f} s"
                )
        firsts = chosen(report, OURS, f"{link} first")
        cpu = [value for sample in firsts if (value := sample.cpu_seconds_per_gib) is not None]
        if cpu:
            fastest = LINKS_GBIT_PER_S[-1]
            cores = statistics.median(cpu) * fastest / 8 * 1e9 / 2**30
            lines.append(f"(at {fastest} Gbit/s the mount's measured CPU would be {cores:.1f} cores of this kind)")
    return lines


def run(names: list[str], given: argparse.Namespace, work: Path) -> Report:
    data = Data(work / "buckets")
    data.make({SHARDS.prefix}, given.mib)
    (work / "links").mkdir()
    samples: list[Sample] = []
    failures: list[Failure] = []
    with links(names, data.root, work / "links") as made:
        for number in range(given.rounds):
            for name in names:
                startup = Startup(data, made[name], work / "turns")
                turn(startup, name, number, samples, failures)
            print(f"round {number + 1} of {given.rounds} done", flush=True)
    report = Report(
        name="startup",
        taken=now(),
        machine=machine({name: [program(VERSIONS[name][0]), *VERSIONS[name][1:]] for name in ("rclone", "s5cmd")}),
        server="nginx; links " + ", ".join(names),
        object_bytes=given.mib * 2**20,
        rounds=given.rounds,
        baseline=OURS,
        samples=tuple(samples),
        failures=tuple(failures),
    )
    return msgspec.structs.replace(report, notes=tuple(conclusions(report, names)))


def turn(startup: Startup, link: str, number: int, samples: list[Sample], failures: list[Failure]) -> None:
    """One round on one link: everybody once in each case, in an order that turns."""

    def downloads() -> list[Sample]:
        return [startup.download(kind(SHARDS), case, number) for case in CASES for kind in (S5cmd, RcloneCopy)]

    steps: list[tuple[str, Callable[[], list[Sample]]]] = [
        ("cachefs", lambda: startup.ours(number)),
        ("downloads", downloads),
        ("gets", lambda: [startup.gets(number)]),
    ]
    shift = number % len(steps)
    for name, step in steps[shift:] + steps[:shift]:
        try:
            found = step()
        except (BenchError, RuntimeError, subprocess.TimeoutExpired, OSError) as exc:
            failures.append(Failure(name, link, number, " ".join(str(exc).split())[:300]))
            print(f"round {number + 1} {link} {name}: FAILED: {exc}", flush=True)
            continue
        samples += found
        for sample in found:
            print(f"round {number + 1} {sample.workload} {sample.peer}: {sample.seconds:.2f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", default="constrained")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, stop_once)
    work = Path(tempfile.mkdtemp(prefix="cachefs-bench-"))
    try:
        report = run(arguments.links.split(","), arguments, work)
    except KeyboardInterrupt:
        print("startup: interrupted, cleaned up", file=sys.stderr)
        return 130
    except BenchError as exc:
        print(f"startup: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    target = save(report, arguments.output)
    plot(report, target.with_suffix(".png"))
    print(text_table(report))
    return 1 if any(one.peer == "cachefs" for one in report.failures) else 0


if __name__ == "__main__":
    sys.exit(main())
