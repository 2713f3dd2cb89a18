"""Rounds to medians, medians to a text table, all of it to JSON."""

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .harness import Machine


class Sample(msgspec.Struct, frozen=True):
    """One measurement of one peer in one round."""

    peer: str
    workload: str
    round: int
    seconds: float
    bytes: int
    cpu_seconds: float | None = None
    rss_mib: float | None = None
    ready_seconds: float | None = None
    first_byte_seconds: float | None = None
    upcalls: float | None = None
    first_tensor_seconds: float | None = None
    fetched_bytes: int | None = None
    """Bodies that the server sent for the objects, also those that nobody read."""
    process_seconds: float | None = None
    """From the launch of the loader's process until it needed the model."""

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def cpu_seconds_per_gib(self) -> float | None:
        """None for a read of some pages too: that ratio says nothing."""
        return None if self.cpu_seconds is None or self.bytes < 2**20 else self.cpu_seconds / (self.bytes / 2**30)

    @property
    def fetched_per_needed(self) -> float | None:
        return None if self.fetched_bytes is None else self.fetched_bytes / self.bytes


class Failure(msgspec.Struct, frozen=True):
    """A measurement that gave an error or wrong bytes instead of figures."""

    peer: str
    workload: str
    round: int
    error: str


class Report(msgspec.Struct, frozen=True):
    """What is written to benchmarks/results."""

    name: str
    taken: str
    machine: Machine
    server: str
    object_bytes: int
    rounds: int
    baseline: str
    """The peer that ratios are against."""
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left out and why, and figures that are made of several workloads'."""


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def chosen(report: Report, peer: str, workload: str) -> list[Sample]:
    return [sample for sample in report.samples if (sample.peer, sample.workload) == (peer, workload)]


def names(report: Report, field: str) -> list[str]:
    """Peers or workloads, in the order in which they first ran."""
    return list(dict.fromkeys(getattr(sample, field) for sample in report.samples))


def ratio(report: Report, peer: str, workload: str) -> float | None:
    """Median of the ratios to the baseline of the same round: drift of the machine falls out."""
    return ratio_between(report, (peer, workload), (report.baseline, workload))


def ratio_between(report: Report, above: tuple[str, str], below: tuple[str, str]) -> float | None:
    """Median of the ratios of the speeds of two (peer, workload) of the same round; None where nothing is in common."""
    base = {sample.round: sample.gb_per_s for sample in chosen(report, *below)}
    ratios = [one.gb_per_s / base[one.round] for one in chosen(report, *above) if one.round in base]
    return statistics.median(ratios) if ratios else None


def best_of(report: Report, peers: Sequence[str], workload: str) -> str | None:
    """The one of these peers with the highest median speed."""
    speeds = {
        peer: statistics.median(sample.gb_per_s for sample in samples)
        for peer in peers
        if (samples := chosen(report, peer, workload))
    }
    return max(speeds, key=lambda peer: speeds[peer]) if speeds else None


def middle(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else "-"


HEAD = (
    "workload",
    "peer",
    "GB/s",
    "min",
    "max",
    "ratio",
    "CPU s/GiB",
    "ready s",
    "first ms",
    "tensor ms",
    "all s",
    "fetched",
    "upcalls",
    "RSS MiB",
)


def row_of(report: Report, peer: str, workload: str) -> tuple[str, ...]:
    samples = chosen(report, peer, workload)
    speeds = [sample.gb_per_s for sample in samples]
    against = ratio(report, peer, workload)
    return (
        workload,
        peer,
        f"{statistics.median(speeds):.3f}",
        f"{min(speeds):.3f}",
        f"{max(speeds):.3f}",
        "-" if against is None else f"{against:.2f}",
        middle([sample.cpu_seconds_per_gib for sample in samples], ".2f"),
        middle([sample.ready_seconds for sample in samples], ".2f"),
        middle([s.first_byte_seconds and s.first_byte_seconds * 1e3 for s in samples], ".1f"),
        middle([s.first_tensor_seconds and s.first_tensor_seconds * 1e3 for s in samples], ".1f"),
        middle([sample.seconds for sample in samples], ".2f"),
        middle([sample.fetched_per_needed for sample in samples], ".2f"),
        middle([sample.upcalls for sample in samples], ".0f"),
        middle([sample.rss_mib for sample in samples], ".0f"),
    )


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """The head, and one row for each workload and peer that was measured."""
    rows: list[tuple[str, ...]] = [HEAD]
    for workload in names(report, "workload"):
        rows += [row_of(report, peer, workload) for peer in names(report, "peer") if chosen(report, peer, workload)]
    return rows


def text_table(report: Report) -> str:
    rows = table_rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        f"{report.name}: {report.object_bytes / 2**20:.0f} MiB, {report.rounds} rounds, server {report.server}, "
        f"ratio to {report.baseline} in the same round, {report.taken}",
        f"{report.machine.processor}, {report.machine.cores} cores, {report.machine.memory_gib} GiB, "
        f"Linux {report.machine.kernel}, Python {report.machine.python}",
        ", ".join(f"{name}: {version}" for name, version in report.machine.versions.items()),
        "",
    ]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [""] if report.notes or report.failures else []
    lines += report.notes
    lines += [f"failed: {one.workload} {one.peer} round {one.round + 1}: {one.error}" for one in report.failures]
    return "\n".join(lines) + "\n"


def save(report: Report, directory: Path) -> Path:
    """Writes NAME.json and NAME.txt; returns the path of the JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{report.name}.json"
    target.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    (directory / f"{report.name}.txt").write_text(text_table(report))
    return target
