"""From boards to HTML: the template environment, the fragments, and addresses of static files that can be cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from . import figures, svg, words
from .boards import PAGES
from .console import Console
from .fairness import fairness
from .language import ENGLISH, LANGUAGES, _, many, marked, speaking, spoken
from .people import people
from .reasons import told
from .timeline import timeline
from .worlds import world

HERE = Path(__file__).parent
STATIC = HERE / "static"


@cache
def asset(name: str) -> str:
    """Address of a static file that changes with its content, so that browsers may keep it for ever."""
    return f"/static/{name}?v={_digest(name)}"


@cache
def _digest(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:16]


class Static(StaticFiles):
    """The static files: kept for a year under an address made by `asset`, asked for again under any other."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        asked = scope.get("query_string", b"").decode("latin-1")
        current = response.status_code == 200 and asked == f"v={_digest(path)}"
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if current else "no-cache"
        return response


def coded(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(text.split("`"))
    )


def static_app() -> Static:
    """To be mounted at /static."""
    return Static(directory=STATIC)


def environment() -> Environment:
    """Templates with escaping on for everything and an error for every name that is missing."""
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    names: dict[str, Any] = env.globals  # their declared types list Jinja's own entries only
    filters: dict[str, Any] = env.filters
    names.update(_=marked, many=many, spoken=spoken, languages=LANGUAGES)
    names.update(
        asset=asset,
        words=words,
        figures=figures,
        svg=svg,
        timeline=timeline,
        people=people,
        fairness=fairness,
        world=world,
    )
    filters.update(
        ago=words.ago,
        change=words.change,
        clock=words.clock,
        date=words.date,
        number=words.number,
        size=words.size,
        span=words.span,
        took=words.took,
        many=many,
        said=_,
        told=told,
        metric=words.metric,
        coded=coded,
    )
    return env


class Renderer:
    """Whole pages, and fragments alone for the live stream."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._env = environment()

    def page(self, template: str, **values: Any) -> str:
        return self._env.get_template(template).render(**values)

    def fragments(self, page: str, run: str, names: Sequence[str], language: str = ENGLISH) -> dict[str, str]:
        """HTML of some of a page's fragments in a language, all as of one reading of the console."""
        macros = self._env.get_template(PAGES[page].macros).module
        with speaking(language):
            board = PAGES[page].read(self._console, run)
            return {name: str(Markup(getattr(macros, name)(board))) for name in names}
