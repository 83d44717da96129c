"""What a coordinator is told of an error at a site: its code, and little of its text, for the text may quote data."""

from __future__ import annotations

import re
import traceback
from pathlib import PurePath
from typing import Literal

from ..protocol.errors import MurmurError, PrivacyRefusal
from .trainer import TrainerFailed

LINES = 3
CHARACTERS = 600

# A path in quotes may hold spaces. Without them it ends at the first space, unless more of it follows behind that.
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<path>(?:~?/|[A-Za-z]:[\\/])[^"'\n]*)(?P=quote)""")
_BARE = re.compile(r"""(?<![\w:/.)\]>…])(?:~?/|[A-Za-z]:[\\/])[^\s"',;)]+(?: [^\s"',;)]*/[^\s"',;)]*)*""")
_FRAME = re.compile(r"""File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<where>\S+)""")
_LIBRARIES = re.compile(r"/(?:site|dist)-packages/|/lib/python3|/murmur/(?:clients|protocol)/|<frozen")


def describe(error: Exception, *, share: bool | Literal["place"]) -> tuple[str, str]:
    """Code and detail of an error as `Failure` carries them.

    share: True sends the last lines of its text, without the paths of this machine. "place" sends what kind of error
    it is and the line of code that raised it: none of its words, for `KeyError: 'patient 123'` quotes data. False
    sends what kind of error it is and nothing more.
    """
    if isinstance(error, PrivacyRefusal):
        return f"{error.code}:{error.reason}", scrub(error.detail)  # names clients and numbers of the round, no data
    code = error.code if isinstance(error, MurmurError) else "client_error"
    if share is True:
        text = error.detail if isinstance(error, MurmurError) else f"{type(error).__name__}: {error}"
        return code, scrub(text)
    kind = _kind(error)
    if share == "place" and (place := _place(error)):
        kind = f"{kind} ({place})"
    return code, scrub(kind)


def _kind(error: Exception) -> str:
    if isinstance(error, TrainerFailed) and error.kind.isidentifier():
        return f"{error.title}: {error.kind}"
    return error.title if isinstance(error, MurmurError) else type(error).__name__


def _place(error: Exception) -> str:
    """The innermost line outside of libraries: of a trainer's error from its traceback's text."""
    if isinstance(error, MurmurError):
        frames = [match.group("file", "line", "where") for match in _FRAME.finditer(error.detail)]
    else:
        found = traceback.extract_tb(error.__traceback__)
        frames = [(frame.filename, str(frame.lineno), frame.name) for frame in found]
    own = [frame for frame in frames if not _LIBRARIES.search(frame[0])] or frames
    if not own:
        return ""
    file, line, where = own[-1]
    return f"{PurePath(file).name}, line {line}, in {where}"


def scrub(text: str) -> str:
    """The last lines of a text, short, without paths and without anything that a terminal or a page could obey."""
    lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
    kept = without_paths("\n".join([line for line in lines if line][-LINES:]))
    return kept if len(kept) <= CHARACTERS else "…" + kept[1 - CHARACTERS :]


def without_paths(text: str) -> str:
    """The text with the names of code files alone in place of their paths, and other paths as "…": they tell of data.

    Where a site keeps what, and whose files they are, is its own affair; which line of a task failed is of use.
    """
    text = _QUOTED.sub(lambda match: f"{match['quote']}{_short(match['path'])}{match['quote']}", text)
    return _BARE.sub(lambda match: _short(match[0]), text)


def _short(path: str) -> str:
    last = re.split(r"[\\/]", path)[-1]
    return last if re.search(r"\.py(:\w+)?$", last) else "…"  # the latter is a reference to a task
