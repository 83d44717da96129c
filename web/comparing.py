"""Runs side by side: their metrics in one picture, the settings in which they differ, and what an accuracy has cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from markupsafe import Markup

from ..protocol.views import RunDetail, VersionView
from . import recipe_form, svg, words
from .language import _, many

MOST = 4  # runs at once: as many as there are inks
Axis = Literal["version", "seconds", "bytes"]
AXES: dict[Axis, str] = {"version": "versions", "seconds": "seconds", "bytes": "bytes"}
FALLING = ("loss",)  # metrics that are good when they are low


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A version: what it measures, and what its run had cost until it was there. `bytes` went either way."""

    version: int
    value: float
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A run with its ink, its points by metric, and what it cost in all."""

    detail: RunDetail
    ink: str
    points: dict[str, list[Point]]
    seconds: float
    bytes: int

    @property
    def epsilon(self) -> float | None:
        return self.detail.run.privacy.value if self.detail.run.privacy else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What it took a run to get as far as all of them got; `first` is the version that was there."""

    run: Compared
    best: float
    first: Point | None


def compared(details: Sequence[RunDetail], versions: Sequence[Sequence[VersionView]]) -> list[Compared]:
    """The runs as they are compared; versions: of each."""
    return [_compared(d, v, ink) for d, v, ink in zip(details, versions, svg.INKS, strict=False)]


def _compared(detail: RunDetail, versions: Sequence[VersionView], ink: str) -> Compared:
    size = {v.n: v.bytes for v in versions}
    moved = {0: 0}
    taken = {0: 0.0}
    rounds = [r for r in detail.rounds if r.closed_at]
    totals = accumulate(
        r.world.down_bytes + r.world.up_bytes if r.world else sum(size.get(r.n - 1, 0) + a.bytes for a in r.assignments)
        for r in rounds
    )
    for r, total in zip(rounds, totals, strict=True):
        assert r.closed_at is not None
        moved[r.n] = total
        taken[r.n] = r.world.ends_s if r.world else (r.closed_at - detail.run.created_at).total_seconds()
    points: dict[str, list[Point]] = {}
    for m in sorted(detail.metrics, key=lambda m: m.version):
        if m.version in taken and math.isfinite(m.value):
            made = Point(version=m.version, value=m.value, seconds=taken[m.version], bytes=moved[m.version])
            points.setdefault(m.name, []).append(made)
    return Compared(
        detail=detail, ink=ink, points=points, seconds=max(taken.values(), default=0.0), bytes=max(moved.values())
    )


def names(runs: Sequence[Compared]) -> list[str]:
    """The metrics that at least one of the runs has, accuracy and loss first."""
    found = dict.fromkeys(name for run in runs for name in run.points)
    return sorted(found, key=lambda n: {"accuracy": 0, "loss": 1}.get(n, 2))


def chart(runs: Sequence[Compared], name: str, by: Axis, *, log: bool) -> Markup:
    """One metric of all runs over versions, seconds or bytes."""
    series: list[svg.Series] = []
    one, unit = _unit(runs, by)
    word = _("version") if by == "version" else ""
    for run in runs:
        at = [
            svg.Point(
                x=_x(p, by) / one,
                y=p.value,
                note=_(
                    "{run}, version {n}: {value} after {size}, {span}",
                    run=run.detail.run.name,
                    n=p.version,
                    value=words.number(p.value),
                    size=words.size(p.bytes),
                    span=words.took(p.seconds),
                ),
            )
            for p in run.points.get(name, ())
        ]
        series.append(svg.Series(name=run.detail.run.name, points=at, ink=run.ink))
    reach = [p.x for s in series for p in s.points]
    label = _("{metric} of {runs} over {axis}", metric=name, runs=many(len(runs), "run"), axis=_(AXES[by]))
    ends = (min(reach, default=0.0), max(reach, default=1.0))
    return svg.line(series, label=label, x_range=ends, x_label=word, x_unit=unit, height=300, log=log)


def _unit(runs: Sequence[Compared], by: Axis) -> tuple[float, str]:
    """How much one on an axis is, and its unit: bytes in the largest that has several of them."""
    if by != "bytes":
        return 1.0, _("s") if by == "seconds" else ""
    most = max((run.bytes for run in runs), default=0)
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((one, unit) for one, unit in units if most >= 3 * one), (1.0, "B"))


def _x(p: Point, by: Axis) -> float:
    return {"version": float(p.version), "seconds": p.seconds, "bytes": float(p.bytes)}[by]


def costs(runs: Sequence[Compared], name: str) -> tuple[float, list[Cost]] | None:
    """The value of a metric that all of the runs have reached, and what each had cost when it did; None without one."""
    low = name in FALLING
    best = [(min if low else max)((p.value for p in run.points.get(name, ())), default=None) for run in runs]
    reached = [b for b in best if b is not None]
    if not reached:
        return None
    target = max(reached) if low else min(reached)
    found: list[Cost] = []
    for run, its_best in zip(runs, best, strict=True):
        there = (p for p in run.points.get(name, ()) if (p.value <= target if low else p.value >= target))
        found.append(Cost(run=run, best=math.nan if its_best is None else its_best, first=next(there, None)))
    return target, found


def differing(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, each with its value in every one; names aside."""
    filled = [recipe_form.filled(run.detail.run.recipe.model_dump(mode="json")) for run in runs]
    if not filled:
        return []
    rows = ((key, [f[key] for f in filled]) for key in filled[0] if key != "name")
    return [(key, values) for key, values in rows if len(set(values)) > 1]
