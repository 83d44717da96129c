"""Log lines of our processes: one fact each, its fields behind it as key=value."""

from __future__ import annotations

import io
import logging
import sys

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class FieldFormatter(logging.Formatter):
    """Time, level, the constant message, then the fields given as `extra`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [f"{key}={_short(value)}" for key, value in vars(record).items() if key not in _STANDARD]
        return " ".join([super().formatMessage(record), *fields])


def _short(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c.isspace() or not c.isprintable() for c in text) else text


def by_lines() -> None:
    """Have each printed line written at once: a rank is killed in the end, or goes without a last flush."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def to_stderr(level: int = logging.INFO) -> None:
    """Send this process's log to standard error; httpx says at INFO what is not worth a line per poll."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
