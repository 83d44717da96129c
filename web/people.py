"""Who is in which version of a run: for each client a strip of the rounds, how often it was in, and why it was not."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from ..protocol.views import AssignmentView, RunDetail
from . import svg, words
from .language import _, many
from .refusals import in_words

ROUNDS = 60  # of the strip, the newest
ROWS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """A client. counted, asked: rounds; missed: why it was missing the last time, empty where it never was."""

    client: str
    strip: Markup
    counted: int
    asked: int
    missed: str

    @property
    def seldom(self) -> bool:
        """Whether it was asked and missing more often than it was in."""
        return 2 * self.counted < self.asked


@dataclass(frozen=True, kw_only=True, slots=True)
class People:
    rows: list[Person]
    more: int
    first: int
    last: int


def people(detail: RunDetail) -> People:
    """The clients of a run's finished training rounds; of many those first that were missing most."""
    rounds = [r for r in detail.rounds if r.kind == "train" and r.state == "committed"][-ROUNDS:]
    parts = [{a.client: a for a in r.assignments} for r in rounds]
    names = sorted({name for part in parts for name in part})
    rows = [_person(name, [(r.n, part.get(name)) for r, part in zip(rounds, parts, strict=True)]) for name in names]
    if len(rows) > ROWS:
        rows.sort(key=lambda p: (p.counted - p.asked, p.client))
    first, last = (rounds[0].n, rounds[-1].n) if rounds else (0, 0)
    return People(rows=rows[:ROWS], more=max(0, len(rows) - ROWS), first=first, last=last)


def _person(name: str, parts: list[tuple[int, AssignmentView | None]]) -> Person:
    asked = [(n, a) for n, a in parts if a is not None]
    missed = [(n, a) for n, a in asked if a.state != "counted"]
    counted = len(asked) - len(missed)
    cells = [_cell(n, a) for n, a in parts]
    last = ""
    if missed:
        n, a = missed[-1]
        why = _("came too late") if a.late else in_words(a.reason, brief=True) or words.ASSIGNMENT[a.state][0].lower()
        last = _("round {n}: {why}", n=n, why=why)
    label = _(
        "{client} is in {n} of the {versions} that it was asked for",
        client=name,
        n=counted,
        versions=many(len(asked), "version"),
    )
    return Person(client=name, strip=svg.strip(cells, label=label), counted=counted, asked=len(asked), missed=last)


def _cell(n: int, a: AssignmentView | None) -> svg.Cell:
    if a is None:
        return svg.Cell(tone="todo", title=_("Round {n}: not asked", n=n))
    if a.state == "counted":
        return svg.Cell(tone="ok", title=_("Round {n}: in version {n}", n=n))
    if a.late:
        return svg.Cell(tone="now", title=_("Round {n}: too late", n=n))
    return svg.Cell(tone="bad", title=_("Round {n}: missing", n=n))
