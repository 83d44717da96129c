"""Clients one after the other in this process: the backend that every other one must agree with."""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from time import monotonic
from typing import Any, Literal

from ..aggregation.selection import select
from ..aggregation.server import server_step, unflatten
from ..aggregation.weighted_sum import Contribution, RunningMean, check_finite, round_half_even
from ..clients.engine.loop import run_job
from ..clients.engine.session import Session
from ..clients.engine.state import initial_model
from ..clients.job import Job, Result
from ..clients.ledger import training_event
from ..clients.updates import metrics_of, weight_of
from ..privacy.dp.accounting import Event
from ..privacy.masks import Array
from ..protocol.errors import BadUpdate, OperatorError
from ..protocol.messages import TRAIN_LOSS, Assignment, Kind, SecureTerms
from ..protocol.recipe import Recipe, Strategy, parse_recipe
from ..protocol.tensors import Layout
from ..protocol.wire import narrow
from .federation import Federation, as_federation, find_federation
from .history import History, Round, Totals
from .masking import Keys, MaskedRound

Secure = Literal["real"] | bool | None


def simulate(
    federation: Any,
    recipe: Recipe | None = None,
    *,
    strategy: Strategy | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    cohort: int | None = None,
    secure: Secure = False,
    options: Mapping[str, Any] | None = None,
    on_round: Callable[[Round], None] | None = None,
    folder: Path | str | None = None,
) -> History:
    """Train virtual clients on this machine, with the training loop, sums and server steps of a real run.

    federation: a mapping of names to tasks, a sequence of tasks, a function that makes one of these (it is given
    `options`, and `clients` where it takes it), a folder such as "examples/hospitals", or "file.py:function".
    recipe: the one in that folder, or all defaults, when absent. strategy, rounds, seed, cohort (clients asked in a
    round, 0 for all) take the place of what it says.
    secure: "real" or True masks every update as real clients do, which costs time that grows with the square of the
    cohort and moves the mean by the fixed point's rounding only; False adds plain updates; None follows the recipe.
    on_round is called after each round. folder: where the versions are kept; without it only the final one, for as
    long as the History lives.
    The same arguments give the same model, bit for bit on one machine, masked or plain alike from run to run.
    Raises OperatorError for a federation or settings that cannot work, and whatever a client's task raises, with the
    client's name in a note: nothing is dropped silently here.
    """
    found: Recipe | None = None
    if isinstance(federation, str | Path):
        made, found = find_federation(str(federation), clients, options)
    else:
        made = as_federation(federation, clients, options)
    settled = _settle(recipe or found, made, strategy, rounds, seed, cohort, secure)
    place = Path(folder) if folder is not None else Path(mkdtemp(prefix="murmur-", dir=_memory_disk()))
    place.mkdir(parents=True, exist_ok=True)
    try:
        history = _run(_Simulation(made, settled, place, keep=folder is not None), len(made), settled, on_round)
    except BaseException:
        if folder is None:
            shutil.rmtree(place)
        raise
    if folder is None:
        weakref.finalize(history, shutil.rmtree, place, ignore_errors=True)  # at exit, too
    return history


def _run(simulation: _Simulation, clients: int, recipe: Recipe, on_round: Callable[[Round], None] | None) -> History:
    done: list[Round] = []
    for n in range(1, recipe.rounds + 1):
        done.append(simulation.round(n))
        if on_round:
            on_round(done[-1])
    measured = simulation.evaluate(recipe.rounds + 1)
    versions = (*(r.metrics for r in done), _means(measured))
    return History(
        recipe=recipe,
        clients=clients,
        rounds=tuple(done),
        versions=versions,
        model=simulation.version,
        spent={client: tuple(events) for client, events in sorted(simulation.spent.items())},
    )


class _Simulation:
    """A run in progress: the newest version, the server's state, and what clients keep between their jobs."""

    def __init__(self, federation: Federation, recipe: Recipe, folder: Path, *, keep: bool) -> None:
        self._federation, self._recipe, self._folder, self._keep = federation, recipe, folder, keep
        self._keys, self._session = Keys(), Session()
        self._state: Path | None = None
        self.spent: dict[str, list[Event]] = {}  # on local differential privacy, by client
        self.version = folder / "version-0.safetensors"
        self._layout: Layout = initial_model(federation.task(federation.ids[0]), recipe.seed, self.version)

    def round(self, n: int) -> Round:
        """Select, train, sum, step; `version` is the new one afterwards."""
        started = monotonic()
        cohort = self._select(n)
        mean, measured, clipped = self._ask(n, cohort, Kind.TRAIN)
        version, state = self._folder / f"version-{n}.safetensors", self._folder / f"state-{n}.safetensors"
        kept = server_step(self.version, self._layout, mean, self._recipe.strategy, self._state, version, state)
        if self._state:
            self._state.unlink()
        if not self._keep:
            self.version.unlink()
        self.version, self._state = version, state if kept else None
        total, count = measured.pop(TRAIN_LOSS, (0.0, 0.0))
        return Round(
            n=n,
            cohort=cohort,
            measured=measured,
            train_loss=total / count if count else 0.0,
            clipped=clipped,
            seconds=monotonic() - started,
        )

    def evaluate(self, n: int) -> Totals:
        """Measure the newest version, as a round that trains nobody; the server's state is not needed any more."""
        if self._state:
            self._state.unlink()
        return self._ask(n, self._select(n), Kind.EVALUATE)[1]

    def _select(self, n: int) -> tuple[str, ...]:
        recipe = self._recipe
        return select(self._federation.ids, recipe.cohort.size, seed=recipe.seed, round=n, attempt=1)

    def _ask(self, n: int, cohort: tuple[str, ...], kind: Kind) -> tuple[dict[str, Array], Totals, float]:
        """The mean update by tensor (none for an evaluation), the metrics' totals, the part of values clipped."""
        assignment = self._assignment(n, cohort, kind)
        if assignment.secure:
            return self._masked(n, cohort, assignment)
        wire = self._layout.update(assignment.train.wire)
        mean, measured = RunningMean(wire), Totals()
        for client in cohort:
            result = self._work(client, n, kind)
            for name, (total, count) in _totals(assignment, result).items():
                before = measured.get(name, (0.0, 0.0))
                measured[name] = (before[0] + total, before[1] + count)
            if result.update is not None:
                sent = self._sent(assignment, result.update)
                check_finite(sent, wire)
                weight = weight_of(assignment, result)
                mean.add(Contribution(client=client, path=sent, weight=weight))
                result.update.unlink()
        return mean.mean() if kind is Kind.TRAIN else {}, measured, 0.0

    def _sent(self, assignment: Assignment, update: Path) -> Path:
        """A plain update as it would have travelled."""
        if assignment.train.wire == "fp32":
            return update
        narrow(update, self._layout, self._folder / "upload.safetensors")
        return self._folder / "upload.safetensors"

    def _masked(
        self, n: int, cohort: tuple[str, ...], assignment: Assignment
    ) -> tuple[dict[str, Array], Totals, float]:
        talk = MaskedRound(assignment, self._layout, self._keys)
        for client in cohort:
            result = self._work(client, n, assignment.kind)
            talk.upload(client, assignment, result, self._folder / "upload.safetensors")
            if result.update is not None:
                result.update.unlink()
        sum_D, totals = talk.unmask()
        if assignment.kind is Kind.EVALUATE:
            return {}, totals.metrics, 0.0
        if not totals.weight:
            raise BadUpdate("no client trained on a single example")
        sum_D /= totals.weight
        clipped = totals.clipped / max(1, self._layout.float_numel * len(cohort))
        mean = unflatten(sum_D, round_half_even(totals.integers, totals.weight), self._layout)
        return mean, totals.metrics, clipped

    def _work(self, client: str, n: int, kind: Kind) -> Result:
        recipe = self._recipe
        job = Job(
            id=f"simulation.{n}.1.{client}",
            kind="train" if kind is Kind.TRAIN else "evaluate",
            model=self.version,
            update=self._folder / "update.safetensors",
            train=recipe.train,
            mu=recipe.strategy.mu,
            metrics=recipe.metrics,
            seed=recipe.seed,
            round=n,
            client=client,
            dp=recipe.dp,
        )
        try:
            result = run_job(self._federation.task(client), job, session=self._session)
        except Exception as error:
            error.add_note(f"in round {n} at {client}")
            raise
        if recipe.dp.mode == "local" and kind is Kind.TRAIN:
            self.spent.setdefault(client, []).append(training_event(recipe.train, recipe.dp, result.examples))
        return result

    def _assignment(self, n: int, cohort: tuple[str, ...], kind: Kind) -> Assignment:
        """What each client of the cohort is asked, in the words of a coordinator."""
        recipe, terms = self._recipe, None
        if recipe.secure.on:
            terms = SecureTerms(
                cohort=cohort,
                threshold=recipe.secure.threshold_of(len(cohort)),
                min_clients=recipe.cohort.min,
                clip_value=recipe.secure.clip_value,
            )
        with self.version.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Assignment(
            id=f"simulation.{n}.1",
            fence=1,
            run="simulation",
            round=n,
            attempt=1,
            kind=kind,
            task=recipe.task,
            model=digest,
            model_bytes=self._layout.file_bytes,
            train=recipe.train,
            mu=recipe.strategy.mu,
            weighting=recipe.strategy.weighting,
            max_weight=recipe.strategy.weight_cap,
            metrics=recipe.metrics,
            seed=recipe.seed,
            patience_s=recipe.cohort.patience_s,
            secure=terms,
            dp=recipe.dp,
        )


def _settle(
    recipe: Recipe | None,
    federation: Federation,
    strategy: Strategy | None,
    rounds: int | None,
    seed: int | None,
    cohort: int | None,
    secure: Secure,
) -> Recipe:
    """The recipe with what the call says in place of what it says, fitted to the federation's size."""
    values: dict[str, Any] = {"name": "simulation", "task": "simulation", "secure": {"on": False}}
    if recipe:
        values = recipe.model_dump()
    if strategy:
        values["strategy"] = strategy.model_dump()
    values |= {name: value for name, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    masked = bool(values["secure"]["on"] if secure is None else secure)
    values["secure"]["on"] = masked
    asked: dict[str, Any] = values.setdefault("cohort", {})
    size = (min(asked.get("size", 0), len(federation)) if cohort is None else cohort) or len(federation)
    fewest = 3 if masked else 1
    if size > len(federation):
        raise OperatorError(f"{size} clients are to be asked in a round, the federation has {len(federation)}")
    if size < fewest:
        raise OperatorError(f"{size} clients in a round: secure aggregation needs 3, for of two each reads the other's")
    asked |= {"size": size, "min": max(fewest, min(asked.get("min", fewest), size))}
    return parse_recipe(values)


def _totals(assignment: Assignment, result: Result) -> Totals:
    return {name: (total.sum, total.count) for name, total in metrics_of(assignment, result).items()}


def _means(totals: Totals) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items() if count and name != TRAIN_LOSS}


def _memory_disk() -> str | None:
    """A folder in memory where there is one with room: models and updates are written and read once each."""
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2 << 30:
        return str(shm)
    return None
