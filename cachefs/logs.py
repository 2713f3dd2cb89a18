"""Logging of the server: text or JSON lines on stderr, which in the background is STATE/log/server.log, rotated."""

import datetime
import json
import logging
import logging.handlers
import os
import sys
import unicodedata
from pathlib import Path
from typing import Literal, TextIO

from cachefs.kernel.process import to_journal

LOG_NAME = "server.log"
LOG_BYTES_MAX = 10 * 1024 * 1024
LOG_FILES = 3
STDERR = 2
_PLAIN_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""What every record has; the rest is `extra`."""


class _JournalOtherwise(logging.Handler):
    """What the log does not take goes to the system's, if it is a warning or worse: its disk is full or failing."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
        elif record.levelno >= logging.WARNING:
            to_journal(one_line(record.getMessage()))


class StderrHandler(_JournalOtherwise, logging.StreamHandler[TextIO]):
    """Lines on stderr."""


class StderrRotatingHandler(_JournalOtherwise, logging.handlers.RotatingFileHandler):
    """Rotates the file that stderr is, too: what a library or a crash prints goes into the newest file."""

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX, files: int = LOG_FILES) -> None:
        super().__init__(path, maxBytes=bytes_max, backupCount=files - 1, encoding="utf-8", errors="backslashreplace")
        self._redirect()

    def doRollover(self) -> None:
        super().doRollover()
        self._redirect()

    def _redirect(self) -> None:
        if self.stream is None:
            self.stream = self._open()
        os.dup2(self.stream.fileno(), STDERR)


def _is_stderr(path: Path) -> bool:
    try:
        ours, theirs = os.fstat(STDERR), path.stat()
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


class _Formatter(logging.Formatter):
    """One record, one line: control characters in the message are escaped. Messages name keys, and a bucket's owner
    may call one `x\\n2026-01-01 [error] ...`. Only a traceback has more lines; an exception's text names keys too, so
    each line is escaped, and indented, which no record is.

    Our own, on the standard library's records: structlog loads rich and asyncio, 40 ms of every start of a server.
    """

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """What the caller gave as `extra`."""
        return {name: value for name, value in vars(record).items() if name not in _PLAIN_FIELDS}

    def traceback(self, record: logging.LogRecord) -> str:
        """Of the exception and of `stack_info`; "" without either."""
        parts = [self.formatException(record.exc_info) if record.exc_info else "", record.stack_info or ""]
        return "\n".join(part for part in parts if part)


class TextFormatter(_Formatter):
    """`2026-01-01T12:00:00.123456 [warning  ] message [cachefs.snapshot] key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).isoformat(timespec="microseconds")
        words = [time, f"[{record.levelname.lower():9}]", one_line(record.getMessage()), f"[{one_line(record.name)}]"]
        words += [f"{name}={_value(value)}" for name, value in sorted(self.fields(record).items())]
        line = " ".join(words)
        traceback = self.traceback(record)
        return "\n".join([line, *(f"  {one_line(part)}" for part in traceback.split("\n"))]) if traceback else line


class JsonFormatter(_Formatter):
    """`{"event", "logger", "level", "timestamp", ...}`, with `exception` for a traceback; times in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        document = {
            **self.fields(record),
            "event": one_line(record.getMessage()),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        }
        if traceback := self.traceback(record):
            document["exception"] = traceback
        return json.dumps(document, default=str)


def one_line(text: str) -> str:
    """The text with control characters escaped; all kinds of spaces may stay."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def _value(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text


def set_up(state_dir: Path, level: str, form: Literal["text", "json"]) -> None:
    """Log to stderr. In the background (stderr is STATE/log/server.log) rotate that file: 3 files of 10 MiB."""
    path = state_dir / "log" / LOG_NAME
    handler: logging.Handler = StderrRotatingHandler(path) if _is_stderr(path) else StderrHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("botocore", "aiobotocore", "asyncio", "fsspec", "s3fs", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))


def tail(state_dir: Path, lines: int) -> list[str]:
    """The last `lines` lines of the server's log, over its rotated files, oldest first."""
    found: list[str] = []
    for number in range(LOG_FILES):
        path = state_dir / "log" / (LOG_NAME + (f".{number}" if number else ""))
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            break
        found = text.splitlines() + found
        if len(found) >= lines:
            break
    return found[-lines:] if lines > 0 else []
