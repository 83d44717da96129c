"""What a notebook shows of a coordinator and its runs, and a run's numbers as a data frame."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from murmur.protocol.errors import OperatorError
from murmur.protocol.views import RunDetail, RunView


class Run(RunDetail):
    """A run with its rounds and metrics, which shows itself in a notebook as the dashboard does."""

    def values(self) -> dict[str, list[tuple[float, float]]]:
        """(version, value) pairs by metric, in the order of versions."""
        found: dict[str, list[tuple[float, float]]] = {}
        for point in sorted(self.metrics, key=lambda p: p.version):
            found.setdefault(point.name, []).append((point.version, point.value))
        return found

    def frame(self) -> Any:
        """A pandas.DataFrame with a row for each version and a column for each metric; raises where there is none."""
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise OperatorError("a data frame needs pandas: pip install pandas; `values()` needs nothing") from None
        columns = {name: dict(pairs) for name, pairs in self.values().items()}
        return pandas.DataFrame(columns).rename_axis("version")

    def _repr_html_(self) -> str:
        from murmur.watching import standing
        from murmur.web.notebook import shown

        run = self.run
        kind = "masked" if run.recipe.secure.on else "plain"
        said = f"{run.recipe.strategy.name}, {kind}, {run.round} of {run.rounds} rounds, {standing(run)}"
        if run.privacy:
            said += f", {run.privacy.text}"
        return shown(run.id, said, self.values())


def overview(url: str, runs: list[RunView]) -> str:
    """A coordinator's newest runs as HTML."""
    from murmur.web.notebook import table

    columns = ("run", "state", "rounds", "accuracy", "started")
    rows = [
        (r.id, r.word, f"{r.round} of {r.rounds}", r.latest.get("accuracy"), f"{r.created_at:%Y-%m-%d %H:%M}")
        for r in runs[:20]
    ]
    return table(f"{url}, {len(runs)} runs", columns, rows)
