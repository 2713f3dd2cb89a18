"""What the start-up benchmark concludes, and how it starts an engine."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import frame, gguf
from benchmarks.frame import publish
from benchmarks.harness import Machine
from benchmarks.outlook import CASES, ENGINE, MODEL_BYTES, SHARDS, Kind, Parts, ceiling, conclusions, outlook, parts
from benchmarks.report import Failure, Report, Sample

MACHINE = Machine(processor="some", cores=2, memory_gib=8.0, kernel="6.9", python="3.11", versions={})


def report(*samples: Sample, failures: tuple[Failure, ...] = ()) -> Report:
    return Report(
        name="startup",
        taken="2026-01-01T00:00:00Z",
        machine=MACHINE,
        server="nginx",
        object_bytes=2**30,
        rounds=1,
        baseline="cachefs",
        samples=samples,
        failures=failures,
    )


def sample(peer: str, workload: str, seconds: float, **more: float) -> Sample:
    return Sample(peer=peer, workload=f"constrained {workload}", round=0, seconds=seconds, bytes=10**9, **more)  # type: ignore[arg-type]


def measured(kind: Kind, first: float, second: float, new: float) -> Report:
    """1 GB: a link of 0.25 GB/s, a download at half of it, a process of 1 s that then needs 0.5 s; mounts of 1 s."""
    own = {"ready_seconds": 1.0, "process_seconds": 1.0, "cpu_seconds": 1.0}
    ours = {"first": first, "second": second, "new": new}
    return report(
        sample("gets", f"{kind.name} link", 4.0),
        *(sample("cachefs", f"{kind.name} {case}", ours[case], **own) for case in CASES),
        *(sample("s5cmd", f"{kind.name} {case}", 9.5, ready_seconds=8.0, process_seconds=1.0) for case in CASES),
    )


def test_parts_are_the_best_downloads_and_what_the_link_gives() -> None:
    made = measured(SHARDS, 5.0, 2.5, 9.0)
    assert parts(made, "constrained", SHARDS) == Parts("s5cmd", 10**9, 4.0, 8.0, 1.0, 0.5)
    assert parts(made, "constrained", ENGINE) is None
    assert parts(made, "slow", SHARDS) is None


def test_nothing_is_faster_than_the_link_and_what_comes_after_it() -> None:
    seen = Parts("s5cmd", 10**9, link=4.0, download=8.0, process=1.0, rest=0.5)
    assert ceiling(seen, SHARDS, "first") == pytest.approx(9.5 / 4.0)
    assert ceiling(seen, ENGINE, "new") == pytest.approx(9.5 / 4.5)
    assert ceiling(seen, ENGINE, "second") == pytest.approx(9.5 / 1.5)
    slow_process = seen._replace(process=20.0)
    assert ceiling(slow_process, ENGINE, "first") == pytest.approx(28.5 / 20.5)
    assert ceiling(slow_process, SHARDS, "first") == pytest.approx(28.5 / 20.5)


def test_outlook_scales_what_comes_over_the_link_or_works_on_the_model_and_nothing_else() -> None:
    """A mount whose loads take as long as the link needs, and on the new node twice as long."""
    seen = outlook(measured(SHARDS, 5.0, 2.5, 9.0), "constrained", SHARDS, 10)
    assert seen is not None
    model_gb = MODEL_BYTES / 1e9
    assert seen.first == pytest.approx(1 + model_gb / 1.25)
    assert seen.second == pytest.approx(1 + 1 + model_gb * 0.5)
    assert seen.new == pytest.approx(1 + 2 * model_gb / 1.25)
    assert seen.download == pytest.approx(2 * model_gb / 1.25 + 1 + model_gb * 0.5)


def test_an_engine_that_needs_the_whole_model_works_on_it_after_the_last_byte() -> None:
    seen = outlook(measured(ENGINE, 5.5, 2.5, 5.5), "constrained", ENGINE, 100)
    assert seen is not None
    model_gb = MODEL_BYTES / 1e9
    assert seen.first == pytest.approx(1 + model_gb / 12.5 + model_gb * 0.5)
    assert seen.second == pytest.approx(1 + 1 + model_gb * 0.5)


def test_no_outlook_without_all_its_measurements() -> None:
    assert outlook(report(sample("gets", "shards link", 4.0)), "constrained", SHARDS, 10) is None
    assert conclusions(report(sample("gets", "shards link", 4.0)), ["constrained"]) == []


def test_verdicts_stand_beside_what_could_be_reached_at_best() -> None:
    lines = conclusions(measured(SHARDS, 5.0, 2.5, 9.0), ["constrained"])
    assert "kept: constrained shards first: against s5cmd, then start: 1.90 (wanted >= 1.3); at best 2.38" in lines
    assert any(line.startswith("MISSED: constrained shards second") and "at best 6.33" in line for line in lines)
    assert sum(line.startswith("140 GB at ") for line in lines) == 2


def test_a_failure_of_ours_is_an_exit_status_and_one_of_a_peer_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the benchmarks' own environment can plot.
    monkeypatch.setattr(frame, "plot", lambda report, target: None)
    theirs, ours = Failure("s5cmd", "x", 0, "no"), Failure("cachefs", "x", 0, "no")
    assert publish(report(sample("cachefs", "x", 1.0), failures=(theirs,)), tmp_path) == 0
    assert publish(report(sample("cachefs", "x", 1.0), failures=(theirs, ours)), tmp_path) == 1
    assert (tmp_path / "startup.json").exists()


FAKE_ENGINE = """
import http.server, json, mmap, sys, threading, time
given = dict(zip(sys.argv[1:-1], sys.argv[2:]))
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0
        self.send_response(200)
        self.end_headers()
        for event in ({"content": " Paris"}, {"content": "."}, {"content": "", "stop": True}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + bytes([10, 10]))
    def log_message(self, *words):
        pass
with open(given["--model"], "rb") as file:
    if not file.read(1):
        sys.exit("an empty model")
    model = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    http.server.HTTPServer(("127.0.0.1", int(given["--port"])), Answers).serve_forever()
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with the flags and the answers of the real one."""
    program = tmp_path / gguf.PROGRAM
    program.write_text(f"#!{sys.executable}{FAKE_ENGINE}")
    program.chmod(0o755)
    monkeypatch.setattr(gguf, "llama", lambda: str(program))


@pytest.mark.usefixtures("engine")
def test_an_engine_is_timed_from_its_launch_to_its_first_token_and_ended(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    result = gguf.serve(str(model))
    assert result["text"] == " Paris."
    assert 0 < result["process_seconds"] <= result["first_tensor_seconds"] <= result["seconds"]
    assert result["bytes"] == 4
    again = gguf.serve(str(model))
    assert again["digest"] == result["digest"]
    assert str(model) not in "".join(commands())


@pytest.mark.usefixtures("engine")
def test_an_engine_that_does_not_start_tells_why(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    with pytest.raises(RuntimeError, match="an empty model"):
        gguf.serve(str(model))


def commands() -> Iterator[str]:
    """The command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_text(errors="replace")
