"""Starting a run from a page: a recipe as a form or as text, what it comes to, and every mistake where it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..protocol.encoding import DIGEST
from ..protocol.errors import MurmurError, NotFound
from ..protocol.mistakes import Mistake
from ..protocol.recipe import Recipe
from ..protocol.views import RunEstimate, VersionView
from . import recipe_form
from .console import Console
from .language import _

MOST_MODELS = 60  # in the list to start from; others are named by their hash


async def fields_of(request: Request) -> dict[str, str]:
    """What a form sends, each field once."""
    async with request.form(max_files=0, max_fields=300) as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


Fields = Annotated[dict[str, str], Depends(fields_of)]


@dataclass(kw_only=True, slots=True)
class Draft:
    """A run that somebody is about to start: the fields or the text, what is wrong with it, what it would come to."""

    fields: Mapping[str, str] = field(default_factory=dict[str, str])
    text: str | None = None
    model: str = ""
    wrong: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    estimate: RunEstimate | None = None
    recipe: Recipe | None = None

    @property
    def by_text(self) -> bool:
        return self.text is not None


class Starting:
    """The two routes of the page. html: renders a template with a status."""

    def __init__(self, console: Console, html: Callable[..., Response]) -> None:
        self._console, self._html = console, html

    def form(self, request: Request, source: str = "", text: bool = False) -> Response:
        """The page, empty, or filled with the recipe of the run `source` and the model that it started from."""
        values: dict[str, Any] = {}
        model = ""
        if source:
            run = self._console.run(source).run
            values = run.recipe.model_dump(mode="json")
            first = [v.sha256 for v in self._console.versions(source) if v.n == 0]
            model = first[0] if first else ""
        fields = recipe_form.filled(values)
        values = recipe_form.values_of(fields)
        draft = Draft(fields=fields, model=model, text=recipe_form.as_toml(values) if text else None)
        return self._page(request, draft)

    def submit(self, request: Request, given: Fields) -> Response:
        """Check, estimate or start what was filled in; or show it as text, or as a form."""
        draft, values = self._draft(given)
        action = given.get("action", "check")
        if action == "text" and values is not None:
            return self._page(request, Draft(fields=given, text=recipe_form.as_toml(values), model=draft.model))
        if values is not None:
            self._check(draft, values)
        if action == "fields" and draft.recipe is not None:
            assert values is not None
            return self._page(request, Draft(fields=recipe_form.filled(values), model=draft.model))
        if draft.recipe is None or draft.wrong:
            return self._page(request, draft, 422)
        if action == "start":
            try:
                run = self._console.start_run(draft.recipe, draft.model, by=request.state.account.name)
                return RedirectResponse(f"/runs/{quote(run, safe='')}", 303)
            except MurmurError as error:
                draft.wrong, draft.estimate = recipe_form.by_field([Mistake((), error.detail)]), None
                return self._page(request, draft, error.status if error.status < 500 else 422)
        return self._page(request, draft)

    def _draft(self, given: Mapping[str, str]) -> tuple[Draft, dict[str, Any] | None]:
        """What was sent, and a recipe's values from it; None where the text is no TOML."""
        model = given.get("sha256", "").strip().lower() or given.get("model", "")
        if "recipe" not in given:
            return Draft(fields=given, model=model), recipe_form.values_of(given)
        text = given["recipe"].replace("\r\n", "\n")
        draft = Draft(text=text, model=model)
        try:
            return draft, recipe_form.of_toml(text)
        except (ValueError, RecursionError) as error:
            draft.wrong = {"": [_("This is not TOML: {why}.", why=error)]}
            return draft, None

    def _check(self, draft: Draft, values: dict[str, Any]) -> None:
        """Fill in the recipe with its estimate, or what is wrong."""
        draft.recipe, found = recipe_form.checked(values)
        draft.wrong = recipe_form.by_field(found)
        if not DIGEST.fullmatch(draft.model):
            draft.wrong.setdefault("model", []).append(
                _("Choose the model to start from, or give the SHA-256 of one that was uploaded.")
            )
        if draft.recipe is None or draft.wrong:
            return
        try:
            draft.estimate = self._console.estimate(draft.recipe, draft.model)
        except MurmurError as error:
            if isinstance(error, NotFound):
                draft.wrong = {"model": [_("No model with this SHA-256 lies here ({hash}…).", hash=draft.model[:12])]}
            else:
                draft.wrong = recipe_form.by_field([Mistake((), error.detail)])

    def _page(self, request: Request, draft: Draft, status: int = 200) -> Response:
        models = self._models()
        return self._html(
            request,
            "start.html",
            status,
            draft=draft,
            sections=recipe_form.sections(),
            models=models,
            other=draft.model if draft.model not in {v.sha256 for v in models} else "",
            open=[s.key for s in recipe_form.sections() if _is_open(s, draft)],
        )

    def _models(self) -> list[VersionView]:
        """What one may start from: of each run the newest version, and what it started from itself."""
        newest: dict[str, VersionView] = {}
        first: dict[str, VersionView] = {}
        for v in self._console.versions():
            if v.run not in newest:
                newest[v.run] = v
            if v.n == 0:
                first[v.run] = v
        unique = {v.sha256: v for run, v in newest.items() for v in (v, first.get(run, v))}
        return list(unique.values())[:MOST_MODELS]


def _is_open(section: recipe_form.FormSection, draft: Draft) -> bool:
    """Whether a section is shown open: the usual ones, and where something was set or is wrong."""
    changed = any(draft.fields.get(f.key, f.default) != f.default for f in section.fields)
    return section.key in recipe_form.OPEN or changed or any(f.key in draft.wrong for f in section.fields)
