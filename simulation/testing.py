"""A test set that no client of a round holds: measured every few rounds, and when to end a run that gets no better."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..clients.task import Task, load_task
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe
from .federation import Federation
from .history import Totals
from .measuring import measured_on, totals_of

FALLING = "loss"  # the metric that is good when it is low


@dataclass(frozen=True, kw_only=True, slots=True)
class CentralTest:
    """What a run is tested on, besides the test data of each round's cohort, and when it ends early.

    clients: so many are held out: the run's seed draws them, they train in no round, and their test data are the test
    set. task: or that of this task ("module:Class" or "file.py:Class", or the task itself). every: rounds from one test
    to the next; the first and the last version are tested always. patience: the run ends when `metric` has not got
    better in so many tests; 0: never.
    """

    clients: int = 0
    task: Task | str = ""
    every: int = 1
    patience: int = 0
    metric: str = "loss"

    def __post_init__(self) -> None:
        if bool(self.clients) == bool(self.task):
            raise OperatorError("say what versions are tested on: clients that are held out, or a task, one of them")
        if self.clients < 0 or self.every < 1 or self.patience < 0:
            raise OperatorError("a test needs clients >= 0, every >= 1 and patience >= 0")


def hold_out(federation: Federation, count: int, seed: int) -> tuple[Federation, Federation]:
    """The federation without `count` of its clients, and these; the same for the same seed."""
    if count >= len(federation):
        raise OperatorError(f"{count} clients are to be held out, and the federation has {len(federation)}")
    held = set(random.Random(f"{seed}/held-out").sample(federation.ids, count))
    return federation.of(c for c in federation.ids if c not in held), federation.of(held)


class Examiner:
    """Measures versions on what a `CentralTest` names, and says when it is enough."""

    def __init__(self, told: CentralTest, held: Federation | None, recipe: Recipe) -> None:
        """held: the clients that are held out. Raises OperatorError for a task that cannot be measured here."""
        self._told, self._rounds = told, recipe.rounds
        self._metrics = tuple(dict.fromkeys((*recipe.metrics, told.metric)))
        if held:
            tasks = {client: held.task(client) for client in held.ids}
        else:
            tasks = {"the test task": load_task(told.task, {}) if isinstance(told.task, str) else told.task}
        self._members = [measured_on(task, "test", name) for name, task in tasks.items()]
        self._module = self._members[0].task.model()

    def due(self, n: int) -> bool:
        return n % self._told.every == 0 or n == self._rounds

    def test(self, version: Path) -> Totals:
        """Sums and counts of the metrics over the whole test set."""
        found = totals_of(version, self._module, self._members, self._metrics)
        if self._told.patience and self._told.metric not in found:
            known = ", ".join(found) or "none"
            raise OperatorError(f"the test measures no {self._told.metric!r} to wait for: name one of {known}")
        return found

    def enough(self, tests: Sequence[tuple[int, Totals]]) -> str:
        """Why the run ends now, empty where it goes on. tests: of versions in order, empty where one was not tested."""
        name, patience = self._told.metric, self._told.patience
        sign = -1 if name == FALLING else 1
        values = [(n, totals[name][0] / totals[name][1]) for n, totals in tests if totals]
        if not patience or len(values) <= patience:
            return ""
        best = max(values, key=lambda v: (sign * v[1], -v[0]))
        if values.index(best) >= len(values) - patience:
            return ""
        return f"the test's {name} has not got better in {patience} tests: {best[1]:.6g} at version {best[0]}"
