"""Logging of the server: text or JSON lines on stderr, which in the background is STATE/log/server.log, rotated.

Both structlog's loggers and the standard ones (libraries have those) end in the same handler and form.
"""

import logging
import logging.handlers
import os
import sys
import unicodedata
from pathlib import Path
from typing import Literal

import structlog

LOG_NAME = "server.log"
LOG_BYTES_MAX = 10 * 1024 * 1024
LOG_FILES = 3
STDERR = 2


class StderrRotatingHandler(logging.handlers.RotatingFileHandler):
    """Rotates the file that stderr is, too: what a library or a crash prints goes into the newest file."""

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX, files: int = LOG_FILES) -> None:
        super().__init__(path, maxBytes=bytes_max, backupCount=files - 1, encoding="utf-8")
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


def one_line(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A processor: control characters in the message are escaped. Messages name keys, and a bucket's owner may call one
    `x\\n2026-01-01 [error] ...`."""
    text = event.get("event")
    if isinstance(text, str) and not text.isprintable():
        event["event"] = "".join(
            char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
            for char in text
        )
    return event


def set_up(state_dir: Path, level: str, form: Literal["text", "json"]) -> None:
    """Log to stderr. In the background (stderr is STATE/log/server.log) rotate that file: 3 files of 10 MiB."""
    path = state_dir / "log" / LOG_NAME
    handler: logging.Handler = StderrRotatingHandler(path) if _is_stderr(path) else logging.StreamHandler(sys.stderr)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        one_line,
        structlog.processors.TimeStamper(fmt="iso", utc=form == "json"),
    ]
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    )
    final = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
    if form == "json":
        final.insert(1, structlog.processors.format_exc_info)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
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
