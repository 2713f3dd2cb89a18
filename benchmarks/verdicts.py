"""What the cold benchmark promises, as ratios within one run: each line says what was wanted and what was reached."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .report import Report, best_of, chosen, ratio_between

OURS = "cachefs"
MOUNTS = ("rclone", "s3fs", "juicefs", "mount-s3", "geesefs")
FIRST_BYTE_SLACK_S = 0.005
FIRST_BYTE_FACTOR = 1.5
RSS_MIB_MAX = 400.0


class Verdict(NamedTuple):
    """`wanted` is a least value, or a greatest one where `at_most`."""

    what: str
    reached: float
    wanted: float
    at_most: bool = False

    @property
    def kept(self) -> bool:
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'kept' if self.kept else 'MISSED'}: {self.what}: {self.reached:.2f} (wanted {sign} {self.wanted:g})"


def _against(report: Report, what: str, workload: str, below: tuple[str, str], wanted: float) -> Iterator[Verdict]:
    value = ratio_between(report, (OURS, workload), below)
    if value is not None:
        yield Verdict(what, value, wanted)


def _against_best(report: Report, workload: str, wanted: float) -> Iterator[Verdict]:
    best = best_of(report, MOUNTS, workload)
    if best:
        what = f"{workload}: against {best}, the best of the other mounts"
        yield from _against(report, what, workload, (best, workload), wanted)


def _median(report: Report, workload: str, of: Callable[..., float | None], peer: str = OURS) -> float | None:
    known = [value for sample in chosen(report, peer, workload) if (value := of(sample)) is not None]
    return statistics.median(known) if known else None


def _first_bytes(report: Report, link: str) -> Iterator[Verdict]:
    """First 4 KiB at the start and at the end, against one direct GET."""
    direct = _median(report, f"{link} sequential", lambda sample: sample.first_byte_seconds, "gets")
    if direct is None:
        return
    for workload, where in ((f"{link} sequential", "start"), (f"{link} last", "end")):
        reached = _median(report, workload, lambda sample: sample.first_byte_seconds)
        if reached is not None:
            what = f"{link}: ms to the first 4 KiB at the {where}, a direct GET takes {direct * 1e3:.1f}"
            most = (direct * FIRST_BYTE_FACTOR + FIRST_BYTE_SLACK_S) * 1e3
            yield Verdict(what, reached * 1e3, round(most, 1), at_most=True)


def verdicts(report: Report) -> list[Verdict]:
    """Those whose workloads were measured. Pure."""
    found: list[Verdict] = []
    for link, wanted in (("loopback", 0.8), ("slow", 0.9)):
        workload = f"{link} sequential"
        what = f"{workload}: against the same GETs, digests and writes without FUSE"
        found += _against(report, what, workload, ("loop", workload), wanted)
    for link in ("loopback", "slow"):
        found += _against_best(report, f"{link} sequential", 1.5)
    given = ("gets", "constrained sequential")
    for kind, wanted in (("sequential", 0.95), ("shuffled", 0.8)):
        workload = f"constrained {kind}"
        found += _against(report, f"{workload}: against what the link gives", workload, given, wanted)
    what = "faults sequential: against the same link without faults"
    found += _against(report, what, "faults sequential", (OURS, "slow sequential"), 0.6)
    for link, most in (("loopback", 1.0), ("tls", 1.3)):
        for peer, how in (("fill", "to fetch, check and store"), (OURS, "with serving, which the aim is without")):
            cpu = _median(report, f"{link} sequential", lambda sample: sample.cpu_seconds_per_gib, peer)
            if cpu is not None:
                found.append(Verdict(f"{link} sequential: CPU seconds per GiB {how}", cpu, most, at_most=True))
    for link in ("loopback", "slow", "constrained"):
        found += _first_bytes(report, link)
    sizes = [
        sample.rss_mib for sample in report.samples if sample.peer in (OURS, "fill") and sample.rss_mib is not None
    ]
    if sizes:
        found.append(Verdict("peak RSS of server and keeper, MiB", max(sizes), RSS_MIB_MAX, at_most=True))
    return found
