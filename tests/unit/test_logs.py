"""The server's log: rotated, with stderr following, in both forms."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cachefs import logs

SCRIPT = """
import logging, os, sys
from pathlib import Path
from cachefs import logs
logs.LOG_BYTES_MAX = 10 * 1024 * 1024
logs.set_up(Path(sys.argv[1]), "info", sys.argv[2])
logging.getLogger("cachefs.x").info("plain %s", "text")
logging.getLogger("cachefs.y").warning("structured", extra={"source": "s3://b", "count": 3})
logging.getLogger("cachefs.x").debug("not shown")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("cachefs.x").exception("failed")
os.write(2, b"a library wrote this\\n")
"""


def log_of(directory: Path, form: str) -> list[str]:
    path = directory / "log" / "server.log"
    path.parent.mkdir(parents=True)
    with path.open("ab") as stderr:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", SCRIPT, str(directory), form], stderr=stderr, env=env, check=True)
    return path.read_text().splitlines()


def test_json_lines_are_documents(tmp_path: Path) -> None:
    *lines, last = log_of(tmp_path, "json")
    documents = [json.loads(line) for line in lines]
    assert [document["event"] for document in documents] == ["plain text", "structured", "failed"]
    assert documents[1]["source"] == "s3://b"
    assert documents[1]["count"] == 3
    assert documents[1]["level"] == "warning"
    assert "ZeroDivisionError" in documents[2]["exception"]
    assert last == "a library wrote this"


def test_text_lines_have_no_colours(tmp_path: Path) -> None:
    text = "\n".join(log_of(tmp_path, "text"))
    assert "plain text" in text
    assert "s3://b" in text
    assert "ZeroDivisionError" in text
    assert "not shown" not in text
    assert "\x1b" not in text


FORGING = """
import logging, sys
from pathlib import Path
from cachefs import logs
logs.set_up(Path(sys.argv[1]), "info", sys.argv[2])
logging.getLogger("cachefs.x").warning("no key %s", "a\\n2026-01-01 [error    ] forged\\x1b[2J\\u202e\\u2028 é 模型")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_hostile_key_forges_no_line(tmp_path: Path, form: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", FORGING, str(tmp_path), form]
    text = subprocess.run(command, env=env, check=True, capture_output=True).stderr.decode()
    assert len(text.splitlines()) == 1
    assert "forged" in text
    assert not {"\x1b", "\u202e", "\u2028"} & set(text)
    shown = json.loads(text)["event"] if form == "json" else text
    assert "é 模型" in shown


FORGING_TRACEBACK = """
import logging, sys
from pathlib import Path
from cachefs import logs
logs.set_up(Path(sys.argv[1]), "info", "text")
try:
    raise ValueError("key a\\n2026-01-01T00:00:00 [error    ] forged\\x1b[2J\\r\\u2028 \\udc80")
except ValueError:
    logging.getLogger("cachefs.x").exception("failed", stack_info=True)
logging.getLogger("cachefs.x").info("after")
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_hostile_key_in_a_traceback_forges_no_line(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "log" / logs.LOG_NAME
    path.parent.mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (path if background else tmp_path / "other").open("ab") as stderr:
        subprocess.run([sys.executable, "-c", FORGING_TRACEBACK, str(tmp_path)], stderr=stderr, env=env, check=True)
    text = Path(stderr.name).read_text()
    lines = text.splitlines()
    assert ["failed" in lines[0], "after" in lines[-1]] == [True, True]
    assert all(line.startswith("  ") for line in lines[1:-1])
    assert "forged" in text
    assert "\\udc80" in text
    assert not {"\x1b", "\r", "\u2028"} & set(text)


def test_what_utf8_cannot_say_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.StderrRotatingHandler, "_redirect", lambda self: None)  # stderr is the tests' own
    handler = logs.StderrRotatingHandler(tmp_path / "log")
    handler.emit(logging.makeLogRecord({"msg": "key \udc80"}))
    handler.close()
    assert (tmp_path / "log").read_text() == "key \\udc80\n"


def test_rotation_keeps_three_files_and_stderr_follows(tmp_path: Path) -> None:
    script = (
        "import os, sys, logging; from pathlib import Path; from cachefs import logs\n"
        "handler = logs.StderrRotatingHandler(Path(sys.argv[1]), bytes_max=1000, files=3)\n"
        "logger = logging.getLogger('x'); logger.addHandler(handler)\n"
        "for number in range(1000): logger.warning('line %d', number)\n"
        "os.write(2, b'stderr\\n')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / logs.LOG_NAME
    subprocess.run([sys.executable, "-c", script, str(path)], env=env, check=True)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["server.log", "server.log.1", "server.log.2"]
    assert path.read_text().endswith("line 999\nstderr\n")
    tail = logs.tail(tmp_path, 150)
    assert tail[-2:] == ["line 999", "stderr"]
    assert tail[:-1] == [f"line {number}" for number in range(1000 - 149, 1000)]
    assert logs.tail(tmp_path, 2) == ["line 999", "stderr"]
    assert logs.tail(tmp_path / "nowhere", 2) == []


FULL_SCRIPT = """
import logging, sys
from pathlib import Path
from cachefs import logs
from cachefs.kernel import process
process.JOURNAL = sys.argv[1]
process.log("the keeper's line")
logs.set_up(Path("/nowhere"), "info", "text")
logging.getLogger("cachefs.x").info("not worth it")
logging.getLogger("cachefs.x").error("the index\\nfails")
"""


@pytest.mark.parametrize("listens", [True, False])
def test_what_the_log_does_not_take_goes_to_the_systems(listens: bool) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # A socket's path has 108 bytes at most, pytest's directories are long.
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal,
        open("/dev/full", "w") as full,
    ):
        if listens:
            journal.bind(f"{directory}/log")
        # At its end the interpreter finds that stderr cannot be flushed, which is exit status 120.
        subprocess.run(
            [sys.executable, "-c", FULL_SCRIPT, f"{directory}/log"], stderr=full, env=env, check=False, timeout=60
        )
        journal.setblocking(False)
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines.append(journal.recv(4096).decode().partition(": ")[2])
    assert lines == (["the keeper's line", "the index\\nfails"] if listens else [])
