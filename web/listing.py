"""The list of runs with its filter, and runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from ..protocol.views import RunView
from . import boards, comparing, words
from .console import Console

OFFERED = 60  # runs that one can choose from to compare, the newest


class Listing:
    """The routes about several runs. html, live_page: render a template, the second with a stream to follow."""

    def __init__(self, console: Console, html: Callable[..., Response], live_page: Callable[..., Response]) -> None:
        self._console, self._html, self._live_page = console, html, live_page

    def runs(
        self,
        request: Request,
        name: Annotated[str, Query(max_length=64)] = "",
        state: Annotated[str, Query(max_length=16)] = "",
        task: Annotated[str, Query(max_length=64)] = "",
    ) -> Response:
        """All runs, live; or those that fit the filter, as they are now."""
        last = self._console.recent_events(None, 1)
        board = boards.runs(self._console, "")
        values: dict[str, Any] = {"tasks": sorted({r.recipe.task for r in board.runs}), "states": words.RUN}
        values["asked"] = {"name": name, "state": state, "task": task}
        if not (name or state or task):
            return self._live_page(request, "runs", "runs.html", board, last[-1].id if last else 0, **values)
        found = [r for r in board.runs if _fits(r, name, state, task)]
        shown = boards.Runs(now=board.now, runs=found)
        return self._html(request, "runs.html", b=shown, live="", at=0, all=len(board.runs), **values)

    def compare(
        self,
        request: Request,
        id: Annotated[list[str] | None, Query(max_length=50)] = None,
        by: comparing.Axis = "version",
        scale: Literal["linear", "log"] = "linear",
    ) -> Response:
        """The runs that are named, in one picture; without any, only the list to choose from."""
        chosen = list(dict.fromkeys(id or ()))[: comparing.MOST]
        details = [self._console.run(one) for one in chosen]
        runs = comparing.compared(details, [self._console.versions(one) for one in chosen])
        names = comparing.names(runs)
        offered = self._console.runs()
        return self._html(
            request,
            "compare.html",
            runs=runs,
            charts=[(name, comparing.chart(runs, name, by, log=scale == "log")) for name in names],
            costs=[(name, found) for name in names[:2] if (found := comparing.costs(runs, name))],
            differing=comparing.differing(runs),
            offered=[r for r in offered if r.id in chosen] + [r for r in offered if r.id not in chosen][:OFFERED],
            by=by,
            scale=scale,
            axes=comparing.AXES,
            most=comparing.MOST,
            too_many=len(id or ()) > comparing.MOST,
            query="&".join(f"id={quote(one, safe='')}" for one in chosen),
        )


def _fits(run: RunView, name: str, state: str, task: str) -> bool:
    said = name.strip().lower()
    return (said in run.name.lower() or said in run.id) and state in ("", run.word) and task in ("", run.recipe.task)
