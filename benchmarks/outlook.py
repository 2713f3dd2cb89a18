"""What the start-up benchmark concludes: what was promised, the most that could be, a large model's times. Pure.

A start has parts, all measured: the download (or what the link gives), the loader's process until it needs the model,
and the rest: the load and, with a real engine, its warm-up and first token.
"""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from .cells import DOWNLOADS
from .report import Report, Sample, best_of, chosen, ratio_between
from .verdicts import OURS, Verdict

CASES = {"first": 1.3, "second": 10.0, "new": 1.3}
"""Least ratio to the best download that is wanted; a mount's time is part of it, as a download's is."""
MODEL_BYTES = 140 * 10**9
LINKS_GBIT_PER_S = (10, 100)


class Kind(NamedTuple):
    """How a load goes. `whole`: it does nothing with the model before it has all of it (an engine that maps it with
    MAP_POPULATE); otherwise it uses bytes as they come."""

    name: str
    whole: bool


SHARDS = Kind("shards", whole=False)
ENGINE = Kind("engine", whole=True)
LARGE_ENGINE = Kind("engine-large", whole=True)
KINDS = (SHARDS, ENGINE, LARGE_ENGINE)


class Parts(NamedTuple):
    """Medians of one load on one link, in seconds."""

    best: str
    """The download that was fastest."""
    bytes: int
    link: float
    """What the link needs at least: that of parallel GETs which nobody looks at."""
    download: float
    process: float
    """From the launch of the loader's process until it needs the model."""
    rest: float
    """From there to the end, with every byte in the page cache."""


def parts(report: Report, link: str, kind: Kind) -> Parts | None:
    """None when not all of them were measured."""
    label = f"{link} {kind.name}"
    given = [sample.gb_per_s for sample in chosen(report, "gets", f"{label} link")]
    best = best_of(report, DOWNLOADS, f"{label} first")
    if not given or best is None:
        return None
    downloads = chosen(report, best, f"{label} first")
    process = _process(downloads)
    return Parts(
        best=best,
        bytes=downloads[0].bytes,
        link=downloads[0].bytes / 1e9 / statistics.median(given),
        download=_ready(downloads),
        process=process,
        rest=_loading(downloads) - process,
    )


def ceiling(seen: Parts, kind: Kind, case: str) -> float:
    """The greatest ratio to "download, then start" that a mount could have which took no time of its own.

    Nothing starts before its bytes are here; what a loader does without them can go on meanwhile.
    """
    base = seen.download + seen.process + seen.rest
    if case == "second":
        return base / (seen.process + seen.rest)
    if kind.whole:
        return base / (max(seen.link, seen.process) + seen.rest)
    return base / max(seen.link, seen.process + seen.rest)


class Outlook(NamedTuple):
    """What a large model would take: seconds."""

    first: float
    second: float
    new: float
    download: float


def outlook(report: Report, link: str, kind: Kind, gbit_per_s: float) -> Outlook | None:
    """MODEL_BYTES over a link of this speed, at the measured share of what the measured link gave.

    A mount and the loader's process take what they took. What a loader does with the model grows with it, and does not
    depend on the link. None when something was not measured.
    """
    seen = parts(report, link, kind)
    cases = {case: chosen(report, OURS, f"{link} {kind.name} {case}") for case in CASES}
    if seen is None or not all(cases.values()):
        return None
    scale = MODEL_BYTES / seen.bytes
    transfer = MODEL_BYTES * 8 / (gbit_per_s * 1e9)
    rest = seen.rest * scale

    def cold(samples: list[Sample]) -> float:
        fetching = _loading(samples) - (seen.rest if kind.whole else 0.0)
        fetched = transfer * max(fetching, seen.link) / seen.link
        if kind.whole:
            return _ready(samples) + max(seen.process, fetched) + rest
        return _ready(samples) + max(seen.process + rest, fetched)

    second = cases["second"]
    process = _process(second)
    return Outlook(
        first=cold(cases["first"]),
        second=_ready(second) + process + (_loading(second) - process) * scale,
        new=cold(cases["new"]),
        download=transfer * seen.download / seen.link + seen.process + rest,
    )


def _ready(samples: list[Sample]) -> float:
    """Seconds of the mount (they do not grow with the model) or of the download."""
    return statistics.median(sample.ready_seconds or 0.0 for sample in samples)


def _process(samples: list[Sample]) -> float:
    return statistics.median(sample.process_seconds or 0.0 for sample in samples)


def _loading(samples: list[Sample]) -> float:
    """Seconds from the launch of the loader's process to the end."""
    return statistics.median(sample.seconds - (sample.ready_seconds or 0.0) for sample in samples)


def conclusions(report: Report, links: list[str]) -> list[str]:
    """Lines below the table."""
    return [line for link in links for kind in KINDS for line in _conclusions(report, link, kind)]


def _conclusions(report: Report, link: str, kind: Kind) -> Iterator[str]:
    seen = parts(report, link, kind)
    if seen is None:
        return
    label = f"{link} {kind.name}"
    for case, wanted in CASES.items():
        value = ratio_between(report, (OURS, f"{label} {case}"), (seen.best, f"{label} {case}"))
        if value is not None:
            verdict = Verdict(f"{label} {case}: against {seen.best}, then start", value, wanted)
            yield f"{verdict.line()}; at best {ceiling(seen, kind, case):.2f}"
    needs = "all bytes before it goes on" if kind.whole else "bytes as it goes on"
    yield (
        f"(parts on the {link} link: {seen.best} {seen.download:.2f} s, GETs alone {seen.link:.2f} s; {kind.name}: "
        f"process {seen.process:.2f} s, then {seen.rest:.2f} s with the model in memory; it needs {needs})"
    )
    for speed in LINKS_GBIT_PER_S:
        times = outlook(report, link, kind, speed)
        if times:
            yield (
                f"140 GB at {speed} Gbit/s by these parts ({kind.name}): first replica {times.first:.0f} s, second "
                f"{times.second:.0f} s, new node {times.new:.0f} s; {seen.best}, then start: {times.download:.0f} s"
            )
    firsts = chosen(report, OURS, f"{label} first")
    cpu = [value for sample in firsts if (value := sample.cpu_seconds_per_gib) is not None]
    if cpu:
        fastest = LINKS_GBIT_PER_S[-1]
        cores = statistics.median(cpu) * fastest / 8 * 1e9 / 2**30
        yield f"(at {fastest} Gbit/s the mount's measured CPU would be {cores:.1f} cores of this kind)"
