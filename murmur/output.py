"""How the commands speak: tables for people, one JSON document for programs, errors with their exit code.

0 it worked · 1 it failed · 2 the command was used wrongly · 3 it took too long · 4 the coordinator cannot be reached or
does not allow it · 130 Ctrl-C
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

FAILED, USAGE, TIMED_OUT, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def told() -> Generator[None]:
    """Turn our errors into one line and an exit code; anything else is a bug and keeps its traceback."""
    from murmur.protocol.errors import MurmurError

    try:
        yield
    except MurmurError as error:
        fail(error.detail, _exit_code(error))
    except TimeoutError as error:
        fail(str(error), TIMED_OUT)


def _exit_code(error: Exception) -> int:
    from murmur.protocol.errors import NotAllowed, NotAuthenticated, Unavailable

    return UNREACHABLE if isinstance(error, NotAuthenticated | NotAllowed | Unavailable) else FAILED


def fail(text: str, code: int = FAILED) -> NoReturn:
    err.print(f"[bold red]error[/]: {plain(text)}", soft_wrap=True)
    raise typer.Exit(code)


def plain(text: str) -> str:
    """Text that is shown as it is: what looks like markup in it is none."""
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(plain(_cell(value)) for value in row))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
