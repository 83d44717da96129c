"""What a check of a site has found: one line each, with what to do where something is wrong."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..protocol.errors import MurmurError

Level = Literal["green", "yellow", "red"]
_ROOT = Path(__file__).resolve().parents[1]
_OURS = {_ROOT / name for name in ("aggregation", "clients", "murmur", "privacy", "protocol", "simulation")}
# Errors whose words speak of code, files and shapes; the words of others may quote the data that they met.
_OF_CODE = (ImportError, SyntaxError, NameError, AttributeError, OSError, TypeError)
_OF_TORCH = (RuntimeError, IndexError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check. subject: what was looked at; said: what was found; todo: what to do, empty where green."""

    subject: str
    level: Level
    said: str
    todo: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Finding:
        return cls(**values)


def green(subject: str, said: str) -> Finding:
    return Finding(subject, "green", said)


def yellow(subject: str, said: str, todo: str) -> Finding:
    return Finding(subject, "yellow", said, todo)


def red(subject: str, said: str, todo: str) -> Finding:
    return Finding(subject, "red", said, todo)


def words(error: BaseException, *, show: bool) -> str:
    """An error for the person who wrote the task: its kind, the line of their own code, and what it says.

    show: also the words of errors that may quote data, as those of ValueError and KeyError do.
    """
    cause = error.__cause__ if isinstance(error, MurmurError) and error.__cause__ else error
    if isinstance(cause, MurmurError):
        return cause.detail
    at = _own_line(cause)
    said = (
        str(cause).rstrip(".")
        if show or _is_of_code(cause, at)
        else "(its words may quote data: --show-values shows them)"
    )
    place = f" at {Path(at.filename).name}, line {at.lineno}, in {at.name}: `{_line(at)}`" if at else ""
    return f"{type(cause).__name__}: {said}{place}" if said else f"{type(cause).__name__}{place}"


def _own_line(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame in the task's own code: not ours, not Python's, and not in what is installed."""
    if isinstance(error, SyntaxError) and error.filename:
        return traceback.FrameSummary(error.filename, error.lineno, "the file", line=error.text or "")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_own(Path(frame.filename)):
            return frame
    return None


def is_own(path: Path) -> bool:
    """Whether a file is the task's: none of ours, nor of Python's, nor of what is installed."""
    if {"site-packages", "dist-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}"} & set(path.parts):
        return False
    return path.suffix == ".py" and not _OURS & set(path.resolve().parents)


def _line(at: traceback.FrameSummary) -> str:
    return (at.line or linecache.getline(at.filename, at.lineno or 0)).strip()


def _is_of_code(error: BaseException, at: traceback.FrameSummary | None) -> bool:
    raised_by_hand = at is not None and _line(at).startswith("raise")
    return isinstance(error, _OF_CODE) or (isinstance(error, _OF_TORCH) and not raised_by_hand)
