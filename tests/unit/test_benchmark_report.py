"""What the benchmarks make of their samples."""

from pathlib import Path

import msgspec
import pytest

from benchmarks.harness import Machine, digest_of, is_mounted, metric_sum, write_object
from benchmarks.report import Report, Sample, ratio, save, table_rows, text_table

MACHINE = Machine(processor="some", cores=2, memory_gib=8.0, kernel="6.9", python="3.11", versions={"rclone": "1.75"})


def sample(peer: str, number: int, seconds: float) -> Sample:
    return Sample(peer=peer, workload="cold", round=number, seconds=seconds, bytes=2**30, cpu_seconds=1.0)


def report(*samples: Sample) -> Report:
    return Report(
        name="cold",
        taken="2026-01-01T00:00:00Z",
        machine=MACHINE,
        server="seaweed",
        object_bytes=2**30,
        rounds=3,
        baseline="loop",
        samples=samples,
    )


def test_ratio_is_the_median_of_ratios_within_rounds() -> None:
    """A machine that gets ten times slower from one round to the next does not change it."""
    rounds = [(1.0, 2.0), (10.0, 20.0), (1.0, 4.0)]
    samples = [sample("loop", n, base) for n, (base, _) in enumerate(rounds)]
    samples += [sample("cachefs", n, own) for n, (_, own) in enumerate(rounds)]
    assert ratio(report(*samples), "cachefs", "cold") == pytest.approx(0.5)


def test_a_round_without_the_baseline_has_no_ratio() -> None:
    assert ratio(report(sample("cachefs", 0, 1.0)), "cachefs", "cold") is None


def test_table_and_file_tell_machine_and_range(tmp_path: Path) -> None:
    made = report(sample("loop", 0, 1.0), sample("loop", 1, 2.0), sample("loop", 2, 4.0))
    row = dict(zip(*table_rows(made), strict=True))
    assert (row["GB/s"], row["min"], row["max"]) == ("0.537", "0.268", "1.074")
    assert row["CPU s/GiB"] == "1.00"
    assert "Linux 6.9" in text_table(made)
    assert "rclone: 1.75" in text_table(made)
    target = save(made, tmp_path)
    assert msgspec.json.decode(target.read_bytes(), type=Report) == made


def test_objects_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_object(tmp_path / name, 100_001, seed)
    digests = [digest_of(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "a").stat().st_size == 100_001


def test_metric_sum_adds_labels_and_takes_no_other_metric() -> None:
    samples = {'reads_total{result="hit"}': 2.0, 'reads_total{result="miss"}': 3.0, "reads_total_other": 9.0}
    assert metric_sum(samples, "reads_total") == 5.0


def test_mounts_are_found_by_exact_path(tmp_path: Path) -> None:
    assert is_mounted(Path("/proc"))
    assert not is_mounted(tmp_path)
