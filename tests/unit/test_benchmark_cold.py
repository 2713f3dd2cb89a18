"""What the cold benchmark measures, loads and concludes."""

import random
from pathlib import Path

import pytest

from benchmarks.cells import SHORT, TARGETS, Cell, cells, order_of
from benchmarks.harness import BenchError, Machine
from benchmarks.links import PLANS
from benchmarks.loads import MIB, ordered, parallel, shards, shuffled, tensor_sizes, write_safetensors, write_shards
from benchmarks.report import Failure, Report, Sample, best_of, ratio_between, text_table
from benchmarks.verdicts import Verdict, verdicts

MACHINE = Machine(processor="some", cores=2, memory_gib=8.0, kernel="6.9", python="3.11", versions={})
GIB = 2**30


def report(*samples: Sample, **more: tuple[Failure, ...] | tuple[str, ...]) -> Report:
    return Report(
        name="cold",
        taken="2026-01-01T00:00:00Z",
        machine=MACHINE,
        server="nginx",
        object_bytes=GIB,
        rounds=1,
        baseline="cachefs",
        samples=samples,
        **more,  # type: ignore[arg-type]
    )


def sample(peer: str, workload: str, seconds: float, number: int = 0, **more: float) -> Sample:
    return Sample(peer=peer, workload=workload, round=number, seconds=seconds, bytes=10**9, **more)  # type: ignore[arg-type]


def test_each_round_has_all_cells_and_begins_with_another_peer() -> None:
    plan = cells("short", list(SHORT), "", "")
    rounds = [order_of(plan, number) for number in range(3)]
    assert all(sorted(one) == sorted(plan) for one in rounds)
    first = [next(cell.peer for cell in one if cell.label == "slow sequential") for one in rounds]
    assert len(set(first)) == 3


def test_every_link_and_workload_of_the_matrix_can_be_made() -> None:
    assert SHORT.keys() == PLANS.keys()
    assert all(workload in TARGETS for able in SHORT.values() for workload in able)


def test_a_workload_that_is_named_is_measured_on_each_link() -> None:
    found = cells("short", ["loopback", "tls"], "cachefs,rclone", "shards")
    assert found == [Cell(link, "shards", peer) for link in ("loopback", "tls") for peer in ("cachefs", "rclone")]


@pytest.mark.parametrize(("peers", "workloads"), [("ghost", ""), ("", "ghost")])
def test_an_unknown_name_is_refused(peers: str, workloads: str) -> None:
    with pytest.raises(BenchError, match="ghost"):
        cells("full", ["loopback"], peers, workloads)


def test_references_have_no_directory_to_read() -> None:
    full = cells("full", ["loopback"], "", "")
    assert {cell.workload for cell in full if cell.peer in ("loop", "gets", "fill")} == {"sequential"}


@pytest.mark.parametrize("total", [1, MIB, 16 * MIB, 1000 * MIB + 7])
def test_tensors_fill_a_model_exactly(total: int) -> None:
    sizes = tensor_sizes(total)
    assert sum(sizes) == total
    assert min(sizes) > 0


def test_a_load_gives_the_same_digest_in_every_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, 3 * MIB + 5, 7)
    one, other = ordered(str(path)), shuffled(str(path))
    assert one["digest"] == other["digest"]
    assert one["bytes"] == path.stat().st_size
    assert 0 < other["first_tensor_seconds"] <= other["seconds"]


def test_a_flipped_bit_changes_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, 2 * MIB, 7)
    before = ordered(str(path))["digest"]
    data = bytearray(path.read_bytes())
    position = random.Random(0).randrange(len(data) - MIB, len(data))
    data[position] ^= 1
    path.write_bytes(data)
    assert ordered(str(path))["digest"] != before


def test_a_model_of_shards_is_what_its_library_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    write_shards(tmp_path / "model", 2, 2 * MIB, 1)
    for path in (tmp_path / "model").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as model:
            assert sum(model.get_tensor(name).nbytes for name in model.keys()) == MIB  # noqa: SIM118 -- not a dict
    assert shards(str(tmp_path / "model"))["bytes"] > 2 * MIB
    assert parallel(str(tmp_path / "model"))["digest"] == parallel(str(tmp_path / "model"))["digest"]


def test_the_best_peer_is_that_of_the_highest_median() -> None:
    made = report(
        *(sample("rclone", "w", seconds, n) for n, seconds in enumerate((1.0, 1.0, 9.0))),
        *(sample("s3fs", "w", seconds, n) for n, seconds in enumerate((0.1, 2.0, 2.0))),
    )
    assert best_of(made, ("rclone", "s3fs", "absent"), "w") == "rclone"
    assert best_of(made, ("absent",), "w") is None
    assert ratio_between(made, ("rclone", "w"), ("s3fs", "w")) == pytest.approx(2 / 9)
    assert ratio_between(made, ("rclone", "w"), ("absent", "w")) is None


def test_verdicts_tell_kept_from_missed_and_leave_out_what_was_not_measured() -> None:
    made = report(
        sample("cachefs", "loopback sequential", 1.0, rss_mib=300.0, cpu_seconds=2.0),
        sample("loop", "loopback sequential", 0.9),
        sample("rclone", "loopback sequential", 1.2),
    )
    found = {one.what: one for one in verdicts(made)}
    kept = {what for what, one in found.items() if one.kept}
    assert len(found) == 4
    assert {what.split(":")[1].split(" ")[1] for what in found if what not in kept} == {"against", "CPU"}
    assert any("without FUSE" in what for what in kept)
    assert not any(what.startswith(("constrained", "slow", "faults")) for what in found)


def test_a_least_and_a_greatest_value_are_told_apart() -> None:
    assert Verdict("x", 2.0, 1.0).kept
    assert not Verdict("x", 2.0, 1.0, at_most=True).kept
    assert Verdict("x", 2.0, 1.0, at_most=True).line() == "MISSED: x: 2.00 (wanted <= 1)"


def test_first_bytes_are_compared_with_a_direct_get() -> None:
    made = report(
        sample("cachefs", "slow sequential", 1.0, first_byte_seconds=0.049),
        sample("cachefs", "slow last", 1.0, first_byte_seconds=0.051),
        sample("gets", "slow sequential", 1.0, first_byte_seconds=0.030),
    )
    found = [one for one in verdicts(made) if "4 KiB" in one.what]
    assert [(one.wanted, one.kept) for one in found] == [(50.0, True), (50.0, False)]


def test_processor_time_of_fills_is_judged_beside_that_with_serving() -> None:
    made = report(
        sample("cachefs", "tls sequential", 1.0, cpu_seconds=1.5),
        sample("fill", "tls sequential", 1.0, cpu_seconds=1.15, rss_mib=500.0),
    )
    found = {one.what: one for one in verdicts(made)}
    fetched = found["tls sequential: CPU seconds per GiB to fetch, check and store"]
    served = found["tls sequential: CPU seconds per GiB with serving, which the aim is without"]
    assert (fetched.kept, served.kept) == (True, False)
    assert not next(one for what, one in found.items() if "peak RSS" in what).kept


def test_failures_and_notes_stand_below_the_table() -> None:
    failure = Failure("s3fs", "faults sequential", 2, "wrong bytes")
    text = text_table(report(sample("cachefs", "w", 1.0), failures=(failure,), notes=("skipped: geesefs",)))
    assert "skipped: geesefs\n" in text
    assert "failed: faults sequential s3fs round 3: wrong bytes\n" in text
