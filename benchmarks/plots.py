"""Bars per peer and workload with the range of the rounds: `python -m benchmarks.plots RESULT.json` writes a PNG."""

import statistics
import sys
from pathlib import Path

import msgspec

from .report import Report, chosen, names

COLUMNS_MAX = 4
BYTES_MIN = 2**20


def plotted(report: Report) -> list[str]:
    """The workloads whose speed says something: not those that read one page."""
    read = {sample.workload: sample.bytes for sample in report.samples}
    return [workload for workload in names(report, "workload") if read[workload] > BYTES_MIN]


def plot(report: Report, target: Path) -> None:
    """Medians of GB/s as bars, least and most as whiskers."""
    # Only the benchmarks' own environment has it.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads = plotted(report)
    if not workloads:
        return
    columns = min(COLUMNS_MAX, len(workloads))
    rows = -(-len(workloads) // columns)
    size = (2.4 * columns + 1.6, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(workloads) :]:
        axis.set_visible(False)
    for axis, workload in zip(axes.flat, workloads, strict=False):
        peers = [peer for peer in names(report, "peer") if chosen(report, peer, workload)]
        for position, peer in enumerate(peers):
            speeds = [sample.gb_per_s for sample in chosen(report, peer, workload)]
            median = statistics.median(speeds)
            whiskers = [[median - min(speeds)], [max(speeds) - median]]
            color = "#1b6ca8" if peer == "cachefs" else "#9aa5b1"
            axis.bar(position, median, color=color, yerr=whiskers, capsize=3)
        axis.set_title(workload, fontsize=10)
        axis.set_xticks(range(len(peers)), peers, rotation=60, ha="right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("GB/s (median, min to max)")
    figure.suptitle(f"{report.name}, {report.object_bytes / 2**20:.0f} MiB, {report.machine.cores} cores", fontsize=11)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(msgspec.json.decode(source.read_bytes(), type=Report), source.with_suffix(".png"))
