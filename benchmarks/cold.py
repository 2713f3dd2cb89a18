"""Cold reads on several links: this project, its peers with empty caches, download-then-start, and the references.

All take turns in each round, in an order that changes from round to round; each starts with nothing: no cache, no
mount, no page of the file. Every byte is compared. What is measured where is in benchmarks/cells.py.
`python -m benchmarks.cold --links loopback,slow,constrained,tls,faults --rounds 5 --mib 512`.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec

from . import gguf, gguf_write, loads, workloads
from .cells import Cell, available, cells, order_of, target_of
from .demo import DemoFailed, model_directory
from .downloads import Download, JuicefsCold, JuicefsImport, RcloneCopy, S5cmd
from .frame import RESULTS, run_and_publish
from .harness import BUCKET, MIB, BenchError, Target, find_memory, machine, peak_rss_mib, processor_seconds, program
from .links import PLANS, Link, links
from .peers import Cachefs, Foreground, Geesefs, MountS3, Native, Peer, Rclone, S3fs
from .report import Failure, Report, Sample, now
from .verdicts import verdicts

CELL_SECONDS_MAX = 300.0
CELL_ERRORS = (BenchError, RuntimeError, subprocess.TimeoutExpired, OSError)
"""End the cell in which they come, not the run."""
SHARDS = 4
FRESH_BYTES = 384 * MIB
"""What a mount takes; besides, the bytes that it serves are in the page cache, and some are also in the reader."""
VERSIONS = {
    "rclone": ["rclone", "version"],
    "s3fs": ["s3fs", "--version"],
    "juicefs": ["juicefs", "version"],
    "s5cmd": ["s5cmd", "version"],
    "mount-s3": ["mount-s3", "--version"],
    "geesefs": ["geesefs", "--version"],
}


class Data:
    """The buckets that are served: `one` (a file), `shards` (a model of SHARDS files), `minilm`, `gguf`,
    `gguf-large`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bucket = root / BUCKET
        self.notes: list[str] = []

    def make(self, kinds: set[str], mib: int) -> None:
        self.bucket.mkdir(parents=True)
        if "one" in kinds:
            (self.bucket / "one").mkdir()
            loads.write_safetensors(self.bucket / "one" / "model.safetensors", mib * MIB, 0)
        if "shards" in kinds:
            loads.write_shards(self.bucket / "shards", SHARDS, mib * MIB, 1)
        if "minilm" in kinds:
            with contextlib.suppress(DemoFailed):
                shutil.copytree(model_directory(), self.bucket / "minilm")
        if "gguf" in kinds and gguf.llama() is not None:
            gguf.assemble(self.bucket / "gguf")
        if "gguf-large" in kinds and gguf.llama() is not None:
            gguf_write.write(self.bucket / "gguf-large" / "model.gguf", mib * MIB)
        reasons = {
            "minilm": "its package is not installed",
            "gguf": "llama.cpp or the model is not installed",
            "gguf-large": "llama.cpp is not installed",
        }
        for kind in sorted(kinds):
            if not (self.bucket / kind).is_dir():
                self.notes.append(f"skipped: {kind}: {reasons[kind]} (`make setup-bench`, WITH_LLAMA=1 for llama.cpp)")

    def has(self, kind: str) -> bool:
        return (self.bucket / kind).is_dir()

    @functools.cache  # noqa: B019 -- one object in a run
    def bytes_of(self, target: Target) -> int:
        """All files of its prefix."""
        return sum(path.stat().st_size for path in (self.bucket / target.prefix).rglob("*") if path.is_file())

    @functools.cache  # noqa: B019 -- one object in a run
    def expected(self, workload: str, target: Target) -> str:
        """The digest that a workload must give."""
        path = target.under(self.bucket / target.prefix)
        digest: str = workloads.run(workload, str(path), CELL_SECONDS_MAX)["digest"]
        return digest


class Cold:
    """Measures cells. `work`: for what a turn leaves behind, emptied after it."""

    def __init__(self, data: Data, imported: JuicefsImport | None, work: Path) -> None:
        self._data = data
        self._imported = imported
        self._work = work

    def _peer(self, name: str, target: Target) -> Peer:
        if name == "native":
            return Native(target.under(self._data.bucket / target.prefix))
        if name == "juicefs":
            assert self._imported is not None
            return JuicefsCold(self._imported, target)
        kinds: dict[str, Callable[[Target], Peer]] = {
            "cachefs": Cachefs,
            "rclone": Rclone,
            "s3fs": S3fs,
            "mount-s3": MountS3,
            "geesefs": Geesefs,
            "s5cmd": S5cmd,
            "rclone-copy": RcloneCopy,
        }
        return kinds[name](target)

    def measure(self, cell: Cell, link: Link, number: int) -> Sample:
        """One cold run. Raises BenchError when a byte is wrong, and what else went wrong."""
        target = target_of(cell.workload)
        work = self._work / f"{number}-{cell.link}-{cell.workload}-{cell.peer}"
        work.mkdir(parents=True)
        find_memory(FRESH_BYTES + 3 * self._data.bytes_of(target) // 2)
        position = link.log_position()
        try:
            if cell.peer in ("loop", "gets"):
                sample = reference(cell.peer, cell.label, link, work, target, number)
            elif cell.peer == "fill":
                sample = self._fill(cell, link, work, target, number)
            else:
                sample = self._read(cell, link, work, target, number)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        prefix = "/juicefs/" if cell.peer == "juicefs" else f"/{BUCKET}/{target.prefix}/"
        fetched = None if cell.peer == "native" else link.bytes_since(position, prefix)
        return with_fetched(sample, fetched)

    def _read(self, cell: Cell, link: Link, work: Path, target: Target, number: int) -> Sample:
        peer = self._peer(cell.peer, target)
        if isinstance(peer, Foreground):
            peer.prepare(work, link)
        try:
            started = time.perf_counter()
            path = peer.start(work, link)
            ready_seconds = time.perf_counter() - started
            # What comes before the first read is the whole cost of a download, and no part of a native file.
            before_read = ready_seconds if isinstance(peer, Download) else 0.0
            pids = peer.pids()
            before = processor_seconds(pids)
            result = workloads.run(cell.workload, str(path), CELL_SECONDS_MAX)
            cpu_seconds, rss_mib = processor_seconds(pids) - before, peak_rss_mib(pids)
        finally:
            peer.stop()
        if isinstance(peer, Download):
            cpu_seconds, rss_mib = peer.cpu_seconds, peer.rss_mib
        self._compare(result, cell, target)
        first = {name: result.get(name) for name in ("first_byte_seconds", "first_tensor_seconds")}
        return Sample(
            peer=cell.peer,
            workload=cell.label,
            round=number,
            seconds=before_read + result["seconds"],
            bytes=result["bytes"],
            cpu_seconds=None if cell.peer == "native" else cpu_seconds,
            rss_mib=None if cell.peer == "native" else rss_mib,
            ready_seconds=None if cell.peer == "native" else ready_seconds,
            **{name: None if value is None else before_read + value for name, value in first.items()},
        )

    def _compare(self, result: dict[str, Any], cell: Cell, target: Target) -> None:
        if result["digest"] != self._data.expected(cell.workload, target):
            raise BenchError("wrong bytes")

    def _fill(self, cell: Cell, link: Link, work: Path, target: Target, number: int) -> Sample:
        """`cachefs warm` at a mount; the time has the command's start in it, processor time and memory are the
        server's and the keeper's. What it brought is compared afterwards."""
        peer = Cachefs(target)
        try:
            path = peer.start(work, link)
            before = processor_seconds(peer.pids())
            started = time.perf_counter()
            peer.fill()
            seconds = time.perf_counter() - started
            cpu_seconds, rss_mib = processor_seconds(peer.pids()) - before, peak_rss_mib(peer.pids())
            result = workloads.run(cell.workload, str(path), CELL_SECONDS_MAX)
        finally:
            peer.stop()
        self._compare(result, cell, target)
        return Sample(
            peer=cell.peer,
            workload=cell.label,
            round=number,
            seconds=seconds,
            bytes=result["bytes"],
            cpu_seconds=cpu_seconds,
            rss_mib=rss_mib,
        )


def reference(kind: str, label: str, link: Link, work: Path, target: Target, number: int) -> Sample:
    """One run of benchmarks/loop.py over a file of the target: `kind` is "loop" or "gets". Raises BenchError."""
    command = [sys.executable, "-m", "benchmarks.loop", link.endpoint_url, str(work), target.prefix, kind]
    done = subprocess.run(
        command, env=link.env(), capture_output=True, text=True, check=False, timeout=CELL_SECONDS_MAX
    )
    if done.returncode != 0:
        raise BenchError(f"{kind}: {done.stderr.strip()[-500:]}")
    return Sample(peer=kind, workload=label, round=number, **json.loads(done.stdout))


def versions_of(peers: Collection[str]) -> dict[str, list[str]]:
    """For machine(): the commands that print the versions of these peers, of those that have one."""
    return {name: [program(words[0]), *words[1:]] for name, words in VERSIONS.items() if name in peers}


def failed(peer: str, label: str, number: int, exc: Exception) -> Failure:
    """Says that a cell failed; for the report."""
    print(f"round {number + 1} {label} {peer}: FAILED: {exc}", flush=True)
    return Failure(peer, label, number, " ".join(str(exc).split())[:300])


def with_fetched(sample: Sample, fetched: int | None) -> Sample:
    # 4 KiB out of a chunk of 8 MiB: that ratio says nothing.
    return sample if sample.bytes <= MIB else msgspec.structs.replace(sample, fetched_bytes=fetched)


def run(plan: list[Cell], names: list[str], given: argparse.Namespace, work: Path, missing: list[str]) -> Report:
    """All cells, each once a round; no round but the first begins that would end after `--seconds-max`."""
    rounds, mib, seconds_max = given.rounds, given.mib, given.seconds_max
    data = Data(work / "buckets")
    data.make({target_of(cell.workload).prefix for cell in plan}, mib)
    plan = [cell for cell in plan if data.has(target_of(cell.workload).prefix)]
    imported = None
    wanted_by_juicefs = {target_of(cell.workload).prefix for cell in plan if cell.peer == "juicefs"}
    if wanted_by_juicefs:
        imported = JuicefsImport(data.root, work / "juicefs")
        imported.make([data.bucket / kind for kind in sorted(wanted_by_juicefs)])
    samples: list[Sample] = []
    failures: list[Failure] = []
    (work / "links").mkdir()
    with links(names, data.root, work / "links") as made:
        cold = Cold(data, imported, work / "turns")
        started = time.monotonic()
        done = 0
        while done < rounds and (done == 0 or (time.monotonic() - started) * (done + 1) / done < seconds_max):
            for cell in order_of(plan, done):
                outcome = turn(cold, cell, made[cell.link], done)
                (samples if isinstance(outcome, Sample) else failures).append(outcome)  # type: ignore[arg-type]
            done += 1
            print(f"round {done} of {rounds}: {time.monotonic() - started:.0f} s so far", flush=True)
    notes = [*missing, *data.notes]
    if done < rounds:
        notes.append(f"stopped after {done} of {rounds} rounds: more would not end within {seconds_max:.0f} s")
    peers = {cell.peer for cell in plan}
    report = Report(
        name="cold",
        taken=now(),
        machine=machine(versions_of(peers)),
        server="nginx; links " + ", ".join(names),
        object_bytes=mib * MIB,
        rounds=done,
        baseline="cachefs",
        samples=tuple(samples),
        failures=tuple(failures),
        notes=tuple(notes),
    )
    return finished(report)


def finished(report: Report) -> Report:
    return msgspec.structs.replace(report, notes=(*report.notes, *(one.line() for one in verdicts(report))))


def turn(cold: Cold, cell: Cell, link: Link, number: int) -> Sample | Failure:
    """One cell; a peer that fails does not end the run."""
    try:
        sample = cold.measure(cell, link, number)
    except CELL_ERRORS as exc:
        return failed(cell.peer, cell.label, number, exc)
    print(f"round {number + 1} {cell.label} {cell.peer}: {sample.gb_per_s:.3f} GB/s", flush=True)
    return sample


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", default="", help="comma-separated (default: all that can be made)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=512, help="size of a model, 16 to 8192")
    parser.add_argument("--peers", default="", help="only these (default: all that are installed)")
    parser.add_argument("--workloads", default="", help="only these (default: those of --matrix)")
    parser.add_argument("--matrix", choices=("short", "full"), default="short", help="full: everything everywhere")
    parser.add_argument("--seconds-max", type=float, default=36000, help="begin no round that would end later")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def links_of(given: str) -> tuple[list[str], list[str]]:
    """Names of links, and lines about those that are left out. What was asked for by name is never left out."""
    if given:
        return given.split(","), []
    made = [name for name, plan in PLANS.items() if os.geteuid() == 0 or not plan.total_mbit_per_s]
    left_out = [name for name in PLANS if name not in made]
    return made, [f"skipped: the {name} link: it needs root (network namespace)" for name in left_out]


def main() -> int:
    arguments = arguments_of()
    names, left_out = links_of(arguments.links)

    def make(work: Path) -> Report:
        plan, missing = available(cells(arguments.matrix, names, arguments.peers, arguments.workloads))
        missing += left_out
        for line in missing:
            print(f"cold: {line}", flush=True)
        return run(plan, names, arguments, work, missing)

    return run_and_publish("cold", make, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
