"""The model registry's pages: a version with its lineage, a model with its aliases, and what moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Form
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..protocol.errors import BadRequest, NotFound
from ..protocol.registry import ALIAS_RULE, Alias
from .console import Console
from .language import _

ALIAS: TypeAdapter[str] = TypeAdapter(Alias)
ALIAS_SENTENCE = f"{ALIAS_RULE[0].upper()}{ALIAS_RULE[1:]}."
USUAL = ("production", "staging")
MOST_MOVES = 100
MOST_N = (1 << 31) - 1  # what SQL takes
Named = Annotated[str, Form(max_length=64)]
Seen = Annotated[int, Form(ge=1, le=MOST_N)]  # the newest move when the page was made


def routes(console: Console, html: Callable[..., Response]) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Each page's address, endpoint and method; who posts must be an admin. html: renders a template for a request."""
    pages = Registry(console, html)
    yield "/runs/{id}/versions/{n:int}", pages.version, "GET"
    yield "/runs/{id}/versions/{n:int}/card.md", pages.card, "GET"
    yield "/runs/{id}/versions/{n:int}/promote", pages.promote, "POST"
    yield "/models/named/{name}", pages.model, "GET"
    yield "/models/named/{name}/rollback", pages.rollback, "POST"
    yield "/models/named/{name}/remove", pages.remove, "POST"


class Registry:
    def __init__(self, console: Console, html: Callable[..., Response]) -> None:
        self._console, self._html = console, html

    def version(self, request: Request, id: str, n: int) -> Response:
        """One version with its line of ancestors, newest first."""
        lineage = self._console.lineage(id, _number(id, n))
        line = [lineage.version]
        for v in sorted(self._console.versions(id), key=lambda v: -v.n):
            if v.n < line[-1].n and v.sha256 == line[-1].parent:
                line.append(v)
        aliases = self._console.aliases(lineage.run.name)
        values: dict[str, Any] = {
            "v": lineage.version,
            "lineage": lineage,
            "ancestors": line[1:9],
            "more": max(0, len(line) - 9),
            "names": sorted({*USUAL, *(a.alias for a in aliases)}),
        }
        return self._html(request, "version.html", **values)

    def card(self, id: str, n: int) -> Response:
        """The version's card, in Markdown."""
        headers = {"content-disposition": "attachment"}
        card = self._console.card(id, _number(id, n))
        return Response(card, media_type="text/markdown; charset=utf-8", headers=headers)

    def promote(self, request: Request, id: str, n: int, alias: Named) -> Response:
        try:
            name = ALIAS.validate_python(alias)
        except ValidationError:
            raise BadRequest(_(ALIAS_SENTENCE)) from None
        self._console.promote(id, _number(id, n), name, request.state.account.name)
        return _to_model(self._console.run(id).run.name)

    def model(self, request: Request, name: str) -> Response:
        """A model's aliases with their history, and the runs that make its versions."""
        moves = self._console.alias_history(name)
        values: dict[str, Any] = {
            "name": name,
            "aliases": self._console.aliases(name),
            "moves": moves,
            "most": MOST_MOVES,
            "runs": [r for r in self._console.runs() if r.name == name],
        }
        return self._html(request, "model.html", **values)

    def rollback(self, request: Request, name: str, alias: Named, seen: Seen) -> Response:
        self._console.rollback(name, alias, request.state.account.name, seen)
        return _to_model(name)

    def remove(self, request: Request, name: str, alias: Named, seen: Seen) -> Response:
        self._console.remove_alias(name, alias, request.state.account.name, seen)
        return _to_model(name)


def _number(id: str, n: int) -> int:
    if n > MOST_N:
        raise NotFound(_("Run {run} has no version {n}.", run=id, n=n))
    return n


def _to_model(name: str) -> Response:
    return RedirectResponse(f"/models/named/{quote(name, safe='')}", 303)
