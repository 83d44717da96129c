"""The commands as somebody would type them, but in this process: starting Python and torch anew costs seconds each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from murmur.cli import app
from murmur.output import err, out


class Done(NamedTuple):
    code: int
    out: str
    err: str


def murmur(*arguments: str | Path, environment: dict[str, str] | None = None) -> Done:
    """What the command printed, 120 columns wide, and its exit code; no MURMUR_ variable but those given."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("MURMUR_")}
    with _wide():
        done = CliRunner().invoke(app, [*map(str, arguments)], env=clean | {"COLUMNS": "120"} | (environment or {}))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


@contextmanager
def _wide() -> Iterator[None]:
    """Consoles have looked at COLUMNS when they were made."""
    consoles = out, err
    before = [console._width for console in consoles]
    for console in consoles:
        console.width = 120
    try:
        yield
    finally:
        for console, width in zip(consoles, before, strict=True):
            console._width = width
