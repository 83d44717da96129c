"""Hyper-parameter search: trials that Optuna chooses, each a whole run, ended early where it falls behind.

What has happened lies in a folder, as Optuna's SQLite storage: a search that was killed goes on in it, inside the trial
that was under way, and a search that was not killed gives the same trials for the same seed.
"""

from __future__ import annotations

import fcntl
import json
import math
import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..privacy.dp.accounting import Epsilon
from ..protocol.errors import MurmurError, NotAllowed, NotAuthenticated, OperatorError, Unavailable
from ..protocol.recipe import Recipe, parse_recipe
from .space import Space, Value, grid, with_changes
from .spending import Spent, epsilons, read_spent, together, written

if TYPE_CHECKING:
    import optuna

FILE = "search.sqlite"
TRIALS = 20  # where neither the caller nor a grid says how many

Pruner = Literal["median", "halving", "none"]


class Pruned(Exception):
    """The trial falls behind the others and is not worth its other rounds."""


class Backend(Protocol):
    """What runs a trial: simulated clients, or a coordinator with real ones."""

    def cost(self, recipe: Recipe) -> Spent:
        """What a whole run of this recipe spends of differential privacy, by whose ledger it stands in."""
        ...

    def run(self, attempt: Attempt) -> Mapping[str, float]:
        """Run the attempt's recipe to its end, and report on the way; the final version's metrics.

        Lets `Pruned` pass through after it has stopped the run; a MurmurError fails this trial only.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial that is over. value: the metric of its last version that was measured; None for a failed one.

    version: that version. reason: why it was pruned or has failed. run: its id on a coordinator.
    """

    n: int
    state: Literal["complete", "pruned", "failed"]
    params: Mapping[str, Value]
    value: float | None
    version: int
    seconds: float
    reason: str = ""
    run: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a search has found so far: its trials in their order, and what they have spent together.

    best: the complete trial with the best value; recipe: the values of its recipe, as a file would hold them.
    epsilons: by client, or one for all clients; empty without differential privacy. stopped: why it ended before its
    last trial, empty where it did not.
    """

    metric: str
    direction: Literal["maximize", "minimize"]
    seed: int
    trials: tuple[Trial, ...]
    best: Trial | None
    recipe: Mapping[str, Any]
    epsilons: Mapping[str, Epsilon]
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it, in values that `json.dumps` takes."""
        return {
            "metric": self.metric,
            "direction": self.direction,
            "seed": self.seed,
            "trials": [asdict(t) for t in self.trials],
            "best": asdict(self.best) if self.best else None,
            "recipe": dict(self.recipe),
            "epsilon": {whose: e.to_json() for whose, e in self.epsilons.items()},
            "stopped": self.stopped,
        }


class Attempt:
    """A trial under way, as its backend sees it; what is kept here outlives the process."""

    def __init__(self, trial: optuna.Trial, recipe: Recipe, metric: str, pruner: str) -> None:
        self._trial, self._metric, self._pruner = trial, metric, pruner
        self._said = dict(trial.storage.get_trial(trial._trial_id).intermediate_values)  # pyright: ignore[reportPrivateUsage]: Optuna's own way to it
        self.n, self.recipe = trial.number + 1, recipe

    def report(self, version: int, metrics: Mapping[str, float]) -> None:
        """Tell what a version was measured to be; raises Pruned where the trial is not worth going on with."""
        if version in self._said or not math.isfinite(metrics.get(self._metric, math.nan)):
            return
        self._said[version] = metrics[self._metric]
        self._trial.report(metrics[self._metric], version)
        if self._trial.should_prune():
            raise Pruned(f"behind the others at version {version} ({self._pruner})")

    @property
    def spent(self) -> Spent:
        """What this trial has spent, with what it spent before it was killed, if it was."""
        return read_spent(self._trial.user_attrs)

    def spend(self, spent: Spent) -> None:
        """Keep what this trial has spent until now, all in all."""
        self.keep("spent", written(spent))

    def keep(self, name: str, value: Any) -> None:
        self._trial.set_user_attr(name, value)

    def kept(self, name: str) -> Any:
        return self._trial.user_attrs.get(name)


def search(
    base: Mapping[str, Any],
    space: Space,
    backend: Backend,
    *,
    folder: Path,
    metric: str,
    trials: int = 0,
    seed: int = 0,
    pruner: Pruner = "median",
    budget: float = 0.0,
    on_start: Callable[[int, Mapping[str, Value]], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Search:
    """Try values of the space in the base recipe until there are `trials` trials, those of earlier calls among them.

    metric: as "accuracy", "loss" (the one name that is minimized by itself), "auc:max" or "error:min".
    trials: 0 is one for each point of a grid, else 20. A space of choices, no larger than `trials`, is tried whole.
    budget: the epsilon that all trials together may spend, 0 without bound; a trial that could exceed it is not begun.
    Raises OperatorError where the folder holds another search, or another process goes on with this one.
    """
    optuna = _optuna()
    name, direction = _metric(metric)
    points = grid(space)
    most = trials or len(points) or TRIALS
    if len(points) > most:
        points = []
    random.Random(seed).shuffle(points)
    stopped = ""
    with _held(folder):
        study = optuna.create_study(
            storage=_storage(folder / FILE),
            study_name="murmur",
            load_if_exists=True,
            direction=direction,
            pruner=_pruner(pruner),
        )
        about = {"recipe": base, "space": {k: repr(d) for k, d in space.items()}, "metric": metric, "seed": seed}
        _same_search(study, folder, json.loads(json.dumps(about | {"pruner": pruner})))
        for point in points:
            study.enqueue_trial(point, skip_if_exists=True)
        most = min(most, len(points) or most)
        while not stopped:
            trial = _next(study, seed, most)
            if trial is None:
                break
            params = {k: dimension.suggest(trial, k) for k, dimension in space.items()}
            if on_start:
                on_start(trial.number + 1, params)
            stopped = _try(study, trial, with_changes(base, params), backend, name, pruner, budget)
            if on_trial and not stopped:
                on_trial(_trial(study.get_trials(deepcopy=False)[trial.number]))
        return _found(study, base, name, direction, seed, stopped)


# One trial


def _next(study: optuna.Study, seed: int, most: int) -> optuna.Trial | None:
    """The trial that a killed process left, or a new one; None when there are enough."""
    optuna = _optuna()
    states = optuna.trial.TrialState
    known = study.get_trials(deepcopy=False)
    left = next((t for t in known if t.state == states.RUNNING), None)
    number = left.number if left else sum(t.state != states.WAITING for t in known)
    # Of the trial's number, so that a resumed search draws what one that was never killed draws.
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=drawn)
    if left:
        return optuna.trial.Trial(study, left._trial_id)  # pyright: ignore[reportPrivateUsage]: there is no other way
    return study.ask() if number < most else None


def _try(
    study: optuna.Study,
    trial: optuna.Trial,
    values: Mapping[str, Any],
    backend: Backend,
    metric: str,
    pruner: str,
    budget: float,
) -> str:
    """Run a trial and tell the study; gives why the search must stop before it, else nothing."""
    states, began = _optuna().trial.TrialState, monotonic()
    state, value, reason = states.PRUNED, None, ""
    try:
        recipe = parse_recipe(deepcopy(dict(values)), where=f"trial {trial.number + 1}")
        if over := _over_budget(study, recipe, backend, budget):
            return over
        attempt = Attempt(trial, recipe, metric, pruner)
        final = backend.run(attempt)
        value = final.get(metric)
        if value is None:
            known = ", ".join(sorted(final)) or "none"
            raise OperatorError(f"the run has no metric {metric!r} (it has: {known}): name it in the recipe's metrics")
        if not math.isfinite(value):
            raise OperatorError(f"{metric} is not finite")
        state = states.COMPLETE
        attempt.keep("version", recipe.rounds)
    except Pruned as pruned:
        reason = str(pruned)
    except (Unavailable, NotAuthenticated, NotAllowed):
        raise  # of no trial's making: it goes on where it is once the coordinator is there again
    except MurmurError as error:
        # Told as pruned, for the sampler leaves failed trials out: it would look in the same corner again.
        reason, value = f"failed: {error.detail}", None
    trial.set_user_attr("reason", reason)
    trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + monotonic() - began)
    study.tell(trial, value if state == states.COMPLETE else None, state=state)
    return ""


def _over_budget(study: optuna.Study, recipe: Recipe, backend: Backend, budget: float) -> str:
    if not budget:
        return ""
    spent = [read_spent(t.user_attrs) for t in study.get_trials(deepcopy=False)]
    cost = backend.cost(recipe)
    after = epsilons(recipe, {k: v for k, v in together(*spent, cost).items() if k in cost})
    worst = max(after.values(), key=lambda e: e.value, default=None)
    if worst is None or worst.value <= budget:
        return ""
    return (
        f"the privacy budget: one more trial could bring epsilon to {worst.value:.3g} at delta {worst.delta:g}, "
        f"{worst.unit}-level, and {budget:g} is allowed for all"
    )


# The study


def _trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    attributes, said = frozen.user_attrs, frozen.intermediate_values
    reason: str = attributes.get("reason", "")
    complete, failed = frozen.state.name == "COMPLETE", reason.startswith("failed: ")
    last = max(said, default=0)
    return Trial(
        n=frozen.number + 1,
        state="complete" if complete else "failed" if failed else "pruned",
        params=dict(frozen.params),
        value=frozen.value if complete else None if failed else said.get(last),
        version=attributes.get("version", last),
        seconds=attributes.get("seconds", 0.0),
        reason=reason.removeprefix("failed: "),
        run=attributes.get("run", ""),
    )


def _found(
    study: optuna.Study,
    base: Mapping[str, Any],
    metric: str,
    direction: Literal["maximize", "minimize"],
    seed: int,
    stopped: str,
) -> Search:
    known = study.get_trials(deepcopy=False)
    over = tuple(_trial(t) for t in known if t.state.is_finished())
    sign = 1 if direction == "maximize" else -1
    complete = [t for t in over if t.state == "complete"]
    best = max(complete, key=lambda t: sign * (t.value or 0.0), default=None)  # the first of equals
    spent = together(*(read_spent(t.user_attrs) for t in known))
    return Search(
        metric=metric,
        direction=direction,
        seed=seed,
        trials=over,
        best=best,
        recipe=with_changes(base, best.params if best else {}),
        epsilons=epsilons(parse_recipe(deepcopy(dict(base))), spent),
        stopped=stopped,
    )


def _metric(said: str) -> tuple[str, Literal["maximize", "minimize"]]:
    name, _, way = said.partition(":")
    if way not in ("", "min", "max") or not name:
        raise OperatorError(f"{said!r} is no metric: write accuracy, loss, or name:min or name:max")
    least = way == "min" or (not way and name in ("loss", "train_loss"))
    return name, "minimize" if least else "maximize"


def _pruner(name: Pruner) -> optuna.pruners.BasePruner:
    """Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (ASHA), for "halving"."""
    pruners = _optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
    if name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    if name == "none":
        return pruners.NopPruner()
    raise OperatorError(f"pruner {name!r}: median, halving or none")


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """A SQLite file that a killed process leaves whole; a power cut may take its last rows, and costs a trial."""
    from sqlalchemy import event

    def on_connect(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # else every value that is kept waits for the disk

    storage = _optuna().storages.RDBStorage(f"sqlite:///{path.resolve()}")
    event.listen(storage.engine, "connect", on_connect)
    storage.engine.dispose()  # what was opened before is opened anew
    return storage


def _same_search(study: optuna.Study, folder: Path, about: dict[str, Any]) -> None:
    before = study.user_attrs.get("search")
    if before is None:
        study.set_user_attr("search", about)
    elif before != about:
        differs = ", ".join(sorted(k for k in about if before.get(k) != about[k]))
        raise OperatorError(f"{folder} holds a search with another {differs}: give another --dir, or remove the folder")


@contextmanager
def _held(folder: Path) -> Generator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OperatorError(f"another process goes on with the search in {folder}") from None
        yield


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise OperatorError("a search needs Optuna: pip install 'murmur[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
