"""The privacy page: what each run has spent, what it will come to, and what that means for each data owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..protocol.budgets import owners
from ..protocol.roles import Right
from .console import Console


class PrivacyPage:
    """html: renders a template for a request."""

    def __init__(self, console: Console, html: Callable[..., Response]) -> None:
        self._console, self._html = console, html

    def routes(self) -> Iterator[tuple[str, Callable[..., Any], Right, str]]:
        yield "/privacy", self.page, Right.READ, "GET"

    def page(self, request: Request) -> Response:
        """Runs with differential privacy first: of the others there is only to say that they have none."""
        runs = self._console.budgets()
        bounded = [r for r in runs if r.mode != "off"]
        return self._html(
            request,
            "privacy.html",
            runs=bounded,
            unbounded=[r for r in runs if r.mode == "off"],
            owners=owners(runs),
            names={r.run: r.name for r in runs},
        )
