"""Bars per peer and workload with the range of the rounds: `python -m benchmarks.plots RESULT.json` writes an SVG."""

import statistics
import sys
from pathlib import Path

import msgspec

from .report import Report, chosen, names


def plot(report: Report, target: Path) -> None:
    """Medians of GB/s as bars, least and most as whiskers."""
    # Only the benchmarks' own environment has it.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads, peers = names(report, "workload"), names(report, "peer")
    figure, axes = plt.subplots(1, len(workloads), figsize=(2.4 * len(workloads) + 1.6, 3.6), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        for position, peer in enumerate(peers):
            speeds = [sample.gb_per_s for sample in chosen(report, peer, workload)]
            if not speeds:
                continue
            median = statistics.median(speeds)
            whiskers = [[median - min(speeds)], [max(speeds) - median]]
            color = "#1b6ca8" if peer == "cachefs" else "#9aa5b1"
            axis.bar(position, median, color=color, yerr=whiskers, capsize=3)
        axis.set_title(workload, fontsize=10)
        axis.set_xticks(range(len(peers)), peers, rotation=60, ha="right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("GB/s (median, min to max)")
    figure.suptitle(f"{report.name}, {report.object_bytes / 2**20:.0f} MiB, {report.machine.cores} cores", fontsize=11)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(msgspec.json.decode(source.read_bytes(), type=Report), source.with_suffix(".svg"))
