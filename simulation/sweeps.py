"""Sweeps: every combination of some settings' values, and what the simulations of them came to."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..protocol.errors import OperatorError
from ..protocol.recipe import parse_recipe
from ..web.curves import curves
from ..web.svg import INKS, Point, Series

Value = int | float | str | bool
DRAWN = len(INKS)  # lines that can be told apart
NAME = {"name": "sweep", "task": "sweep"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One combination: its settings by dotted name, and what `History.to_json` says of it; why it failed, if it did."""

    params: Mapping[str, Value]
    history: Mapping[str, Any] | None = None
    reason: str = ""

    @property
    def final(self) -> Mapping[str, float]:
        return self.history["versions"][-1] if self.history else {}

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.params.items())


def axes(values: Mapping[str, Any], where: str = "") -> dict[str, tuple[Value, ...]]:
    """The settings of a recipe that have a list where one value belongs, by dotted name: these are what varies."""
    return _axes(values, parse_recipe(dict(NAME)).model_dump(), where)


def _axes(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, tuple[Value, ...]]:
    found: dict[str, tuple[Value, ...]] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found |= _axes(value, default, f"{where}{name}.")
        elif isinstance(value, list) and isinstance(default, Value):
            if not value:
                raise OperatorError(f"{where}{name} is an empty list: there is nothing to try")
            found[f"{where}{name}"] = tuple(dict.fromkeys(value))
    return found


def grid(varied: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """Every combination, the last name's values changing fastest."""
    return [dict(zip(varied, chosen, strict=True)) for chosen in product(*varied.values())]


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The best first by `metric`, "name", "name:min" or "name:max"; those without it last.

    Without a direction a name that says loss or error is to be small, any other large. Raises OperatorError for a
    metric that no trial has.
    """
    name, _, way = metric.partition(":")
    if way not in ("", "min", "max"):
        raise OperatorError(f"{metric!r}: name, name:min or name:max")
    if trials and not any(name in t.final for t in trials) and any(t.final for t in trials):
        has = ", ".join(sorted({n for t in trials for n in t.final}))
        raise OperatorError(f"no metric {name!r}: there are {has}")
    sign = 1.0 if way == "min" or (not way and any(word in name for word in ("loss", "error"))) else -1.0

    def key(trial: Trial) -> float:
        value = trial.final.get(name, math.nan)
        return sign * value if math.isfinite(value) else math.inf

    return sorted(trials, key=key)


def columns(trials: Sequence[Trial]) -> tuple[list[str], list[str]]:
    """The names of settings and of metrics that the trials have, in order."""
    params = list(dict.fromkeys(name for t in trials for name in t.params))
    return params, sorted({name for t in trials for name in t.final})


def rows(trials: Sequence[Trial]) -> list[list[Any]]:
    """A row for each trial: settings, final metrics, rounds, seconds, run, why it failed."""
    params, metrics = columns(trials)
    found: list[list[Any]] = []
    for t in trials:
        done = t.history["rounds"] if t.history else []
        row = [*(t.params.get(n) for n in params), *(t.final.get(n) for n in metrics), len(done)]
        run = t.history.get("run", "") if t.history else ""
        found.append([*row, round(sum(r["seconds"] for r in done), 2), run, t.reason])
    return found


def table_csv(trials: Sequence[Trial]) -> str:
    """A line for each trial."""
    params, metrics = columns(trials)
    return _csv([[*params, *metrics, "rounds", "seconds", "run", "reason"], *rows(trials)])


def curves_csv(trials: Sequence[Trial]) -> str:
    """A line for each version of each trial: its settings, the version, its metrics."""
    params, metrics = columns(trials)
    found: list[list[Any]] = [[*params, "version", *metrics]]
    for t in trials:
        for n, measured in enumerate(t.history["versions"] if t.history else ()):
            found.append([*(t.params.get(name) for name in params), n, *(measured.get(name) for name in metrics)])
    return _csv(found)


def _csv(lines: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def picture(trials: Sequence[Trial], metric: str) -> str:
    """A whole SVG file: the metric by version, of the first trials that have it, as many as can be told apart."""
    name = metric.partition(":")[0]
    shown = [t for t in trials if name in t.final][:DRAWN]
    series: list[Series] = []
    for ink, t in zip(INKS, shown, strict=False):
        assert t.history is not None
        by_version = [(n, v[name]) for n, v in enumerate(t.history["versions"]) if name in v]
        points = [Point(x=n, y=y, note=f"{t.label}: {y:.4g} at version {n}") for n, y in by_version]
        series.append(Series(name=t.label, points=points, ink=ink))
    said = f"{name} by version" + (f", the best {len(shown)} of {len(trials)}" if len(trials) > len(shown) else "")
    return curves(said, {"": series}, x_label="version")


def notebook(title: str, metric: str) -> str:
    """A Jupyter notebook (nbformat 4.5) over table.csv, curves.csv and sweep.svg beside it; it needs no library."""
    name = metric.partition(":")[0]
    cells = [
        ("markdown", f"# {title}\n\nThe files beside this notebook: `table.csv`, `curves.csv`, `sweep.svg`."),
        ("code", 'from IPython.display import SVG\n\nSVG(filename="sweep.svg")'),
        (
            "code",
            "import csv\nfrom pathlib import Path\n\n"
            'table = list(csv.DictReader(Path("table.csv").read_text().splitlines()))\ntable',
        ),
        (
            "code",
            'curves = list(csv.DictReader(Path("curves.csv").read_text().splitlines()))\n'
            f'[(row["version"], row["{name}"]) for row in curves if row["{name}"]]',
        ),
    ]
    made = [
        {"id": f"cell-{i}", "cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for i, (kind, source) in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
