"""What the shell completes: ids of runs and names of models, asked of the coordinator that the command would ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from murmur.client import Client

Offered = tuple[str, str]  # what is typed, and what it is
ANSWER_S = 1.0  # who pressed the tab key waits for it


def run_ids(ctx: typer.Context, incomplete: str) -> list[Offered]:
    """Ids of runs that begin so, the newest first."""
    return _fitting(ctx, incomplete, lambda c: ((r.id, f"{r.name}, {r.state}") for r in c.runs()))


def model_names(ctx: typer.Context, incomplete: str) -> list[Offered]:
    """Names of models: those of their recipes."""
    return _fitting(ctx, incomplete, lambda c: ((v.run_name, "model") for v in c.versions()))


def versions(ctx: typer.Context, incomplete: str) -> list[Offered]:
    """What names a version: NAME@ALIAS, NAME, RUN@N."""

    def names(client: Client) -> Iterable[Offered]:
        found = client.versions()
        yield from ((f"{v.run_name}@{alias}", f"{v.run}@{v.n}") for v in found for alias in v.aliases)
        yield from ((v.run_name, "its newest version") for v in found)
        yield from ((f"{v.run}@{v.n}", f"{v.run_name}, {v.contributors} clients") for v in found)

    return _fitting(ctx, incomplete, names)


def _fitting(ctx: typer.Context, incomplete: str, ask: Callable[[Client], Iterable[Offered]]) -> list[Offered]:
    """What begins as what is typed, each once; nothing where no coordinator answers."""
    from murmur.client import Client, find_access

    offered: dict[str, str] = {}
    try:
        with Client(find_access(ctx.params.get("data")), answer_s=ANSWER_S) as client:
            for name, what in ask(client):
                offered.setdefault(name, what)  # the newest comes first
    except Exception:  # whatever it is, a traceback in the middle of a line that somebody types helps nobody
        return []
    return [given for given in offered.items() if given[0].startswith(incomplete)]
