"""The rounds of a simulation: who is asked, what their updates come to, the server's step, the versions and metrics."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from ..aggregation.flower import Reply, flower_step, looks_at_single, of_all, of_file
from ..aggregation.grouping import draw_cohort, place
from ..aggregation.local import first_version, rescale
from ..aggregation.metrics import add_metrics
from ..aggregation.robust import combined, combined_groups, write_group_mean
from ..aggregation.selection import select
from ..aggregation.server import server_step, unflatten
from ..aggregation.weighted_sum import Contribution, RunningMean, check_finite, round_half_even
from ..clients.engine.state import initial_model
from ..clients.job import Result
from ..clients.ledger import training_event
from ..clients.updates import clip_update, weight_of
from ..coordinator.store.simulations import Simulated
from ..privacy.auxiliary import Totals as BlockTotals
from ..privacy.dp.accounting import Event
from ..privacy.dp.mechanisms import is_unclipped
from ..privacy.dp.plan import check_run, event_of
from ..privacy.dp.release import release
from ..privacy.dp.ring import BIT
from ..privacy.fixed_point import weight_bound
from ..privacy.masks import Array
from ..protocol.errors import BadUpdate, SumTooLarge
from ..protocol.messages import LOCAL_STEPS, OF_TRAINING, TRAIN_LOSS, Assignment, Kind, SecureTerms
from ..protocol.recipe import Recipe
from ..protocol.sections import CLIPPED, Dp, Strategy
from ..protocol.tensors import Layout, read_layout
from ..protocol.wire import narrow
from .choosing import trainer
from .cohorts import Asked, Backend, Summed, plain
from .ending import ended_by_sigterm
from .federation import Federation, as_federation, find_federation
from .history import History, Round, Totals
from .masking import Keys, MaskedRound
from .places import in_folder
from .sequential import totals
from .settling import Secure, settle
from .storing import Progress, Stored, opened

log = logging.getLogger(__name__)


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
    dp: Dp | None = None,
    options: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    workers: int = 0,
    on_round: Callable[[Round], None] | None = None,
    folder: Path | str | None = None,
    store: Stored | Path | str | None = None,
    resume: str = "",
) -> History:
    """Train virtual clients on this machine, with the training loop, sums and server steps of a real run.

    federation: a mapping of names to tasks, a sequence of tasks, a function that makes one of these (it is given
    `options`, and `clients` where it takes it), a folder such as "examples/hospitals", or "file.py:function".
    recipe: the one in that folder, or all defaults, when absent. strategy, rounds, seed, cohort (clients asked in a
    round, 0 for all) take the place of what it says.
    secure: "real" or True masks every update as real clients do, which costs time that grows with the square of the
    cohort and moves the mean by the fixed point's rounding only; "ideal" adds the same integers without the masks, to
    the same model; "off" or False adds plain updates; None follows the recipe.
    dp: differential privacy for clients, in the recipe's place; `History.epsilon` says what it comes to.
    backend: "sequential" trains the clients one after the other, "vectorized" many in one computation, with the same
    result up to the rounding of floats; "auto" does that where it can be done, docs/simulation.md says where.
    "processes" forks `workers` processes that train parts of a cohort either way, by default one for each core.
    on_round is called after each round. folder: where the versions are kept; without it only the final one, for as
    long as the History lives.
    store: a coordinator's data folder, in which the simulation is a run beside the real ones, round by round; resume:
    the id of one there that was killed, and goes on from its last round with its own recipe, to the same model.
    The same arguments give the same model, bit for bit on one machine, masked or plain alike from run to run; not so
    under differential privacy, whose noise nobody may know and is fresh each time.
    Raises OperatorError for a federation or settings that cannot work, and whatever a client's task raises, with the
    client's name in a note: nothing is dropped silently here.
    """
    found: Recipe | None = None
    if isinstance(federation, str | Path):
        made, found = find_federation(str(federation), clients, options)
    else:
        made = as_federation(federation, clients, options)
    settled = settle(recipe or found, made, strategy, rounds, seed, cohort, secure, dp)

    def run(place: Path, stored: Stored | None = None, taken: Simulated | None = None) -> History:
        masks = (
            taken.about["secure"]
            if taken
            else "off"
            if not settled.secure.on
            else "ideal"
            if secure == "ideal"
            else "real"
        )
        simulation = _Simulation(
            made, settled, place, backend, workers=workers, keep=folder is not None, ideal=masks == "ideal"
        )
        if stored and taken:
            simulation.go_on(stored.recall(taken))
        elif stored:
            stored.begin(simulation.version, clients=len(made), backend=simulation.trainer.name, secure=masks)
        return _run(simulation, len(made), settled, on_round, stored)

    with ended_by_sigterm(), opened(store, resume, folder) as stored:
        if stored is None:
            return in_folder(folder, run)
        if not resume:
            with stored.new(settled) as place:
                return run(place, stored)
        with stored.taken_over(resume, len(made)) as taken:
            settled = taken.recipe
            return run(stored.place, stored, taken)


def _run(
    simulation: _Simulation,
    clients: int,
    recipe: Recipe,
    on_round: Callable[[Round], None] | None,
    stored: Stored | None,
) -> History:
    done = simulation.done
    with closing(simulation.trainer):
        for n in range(len(done) + 1, recipe.rounds + 1):
            done.append(simulation.round(n))
            if stored:
                stored.commit(done[-1], simulation.progress())
            if on_round:
                on_round(done[-1])
        measured = simulation.evaluate(recipe.rounds + 1)
    versions = (*(r.metrics for r in done), _means(measured))
    return History(
        recipe=recipe,
        clients=clients,
        backend=simulation.trainer.name,
        rounds=tuple(done),
        versions=versions,
        model=stored.finish(recipe.rounds + 1, measured) if stored else simulation.version,
        ledger=tuple(simulation.ledger),
        spent={client: tuple(events) for client, events in sorted(simulation.spent.items())},
        run=stored.id if stored else "",
    )


class _Simulation:
    """A run in progress: the newest version, the server's state, and what clients keep between their jobs."""

    def __init__(
        self,
        federation: Federation,
        recipe: Recipe,
        folder: Path,
        backend: Backend,
        *,
        workers: int,
        keep: bool,
        ideal: bool,
    ) -> None:
        self._federation, self._recipe, self._folder, self._keep = federation, recipe, folder, keep
        self._keys = None if ideal else Keys()
        self._groups: dict[str, int] = {}
        self._state: Path | None = None
        self._single, self._replies = looks_at_single(recipe), list[Reply]()
        self._weighed: tuple[int, tuple[str, ...]] = 0, ()  # what the last cohort's updates weighed together
        self.spent: dict[str, list[Event]] = {}  # on local differential privacy, by client
        self.version = folder / "version-0.safetensors"
        start = initial_model(federation.task(federation.ids[0]), recipe.seed, self.version)
        first_version(self.version, start, recipe.strategy, self.version)
        self._layout: Layout = read_layout(self.version)
        self._dp, self.ledger = recipe.dp_of_round(), list[Event]()
        check_run(recipe, self._layout)
        self.trainer = trainer(backend, federation, recipe, self._layout, folder, workers)
        self.done: list[Round] = []

    def progress(self) -> Progress:
        """Where it stands, between two rounds."""
        return Progress(
            version=self.version,
            state=self._state,
            dp=self._dp,
            groups=self._groups,
            weighed=self._weighed,
            ledger=self.ledger,
            spent=self.spent,
        )

    def go_on(self, at: Progress) -> None:
        """Stand where another process stood."""
        if at.version != self.version:
            self.version.unlink()
        self.version, self._state, self._dp, self._groups, self._weighed = (
            at.version, at.state, at.dp, at.groups, at.weighed,
        )  # fmt: skip
        self.ledger, self.spent, self.done = at.ledger, at.spent, at.rounds

    def round(self, n: int) -> Round:
        """Select, train, sum, step; `version` is the new one afterwards."""
        started = monotonic()
        cohort, dp = self._select(n), self._dp
        try:
            mean, measured, clipped = self._ask(n, cohort, Kind.TRAIN)
        except SumTooLarge as error:  # as a coordinator does: a second attempt, without the bound on the weights' sum
            log.warning("a second attempt", extra={"round": n, "why": error.detail})
            self._weighed, cohort = (0, ()), self._select(n, attempt=2)
            mean, measured, clipped = self._ask(n, cohort, Kind.TRAIN)
        if clipped > CLIPPED:
            log.warning("values were cut: raise secure.clip_value", extra={"round": n, "clipped": clipped})
        steps, strategy = measured.pop(LOCAL_STEPS, (0.0, 0.0)), self._recipe.strategy
        rescale(mean, self._layout, strategy, summed=len(cohort), steps=steps)
        version, state = self._folder / f"version-{n}.safetensors", self._folder / f"state-{n}.safetensors"
        if strategy.flower:
            replies, self._replies = self._replies or [of_all(mean, measured)], []
            moved = self.version, self._layout, mean, replies, strategy, self._state
            kept = flower_step(*moved, version, state, round=n)
        else:
            kept = server_step(self.version, self._layout, mean, strategy, self._state, version, state)
        if self._state:
            self._state.unlink()
        if not self._keep:
            self.version.unlink()
        self.version, self._state = version, state if kept else None
        total, count = measured.pop(TRAIN_LOSS, (0.0, 0.0))
        return Round(
            n=n,
            cohort=tuple(cohort),
            measured=measured,
            train_loss=total / count if count else 0.0,
            trained=count,
            clipped=clipped,
            seconds=monotonic() - started,
            clip_norm=dp.clip_norm if dp.of_clients else None,
        )

    def evaluate(self, n: int) -> Totals:
        """Measure the newest version, as a round that trains nobody; the server's state goes."""
        if self._state:
            self._state.unlink()
        with suppress(OSError):  # what clients kept for themselves stays with the versions
            (self._folder / "clients").rmdir()
        return self._ask(n, self._select(n), Kind.EVALUATE)[1]

    def _select(self, n: int, *, attempt: int = 1) -> dict[str, int]:
        """Who is asked, each with its group; 0 without groups."""
        recipe, ids = self._recipe, self._federation.ids
        if recipe.secure.groups:
            placed = place(ids, self._groups, recipe.secure.groups, recipe.seed)
            asked = draw_cohort(placed, recipe, round=n, attempt=attempt)
            self._groups |= asked
            return asked
        return dict.fromkeys(select(ids, recipe.cohort.size, seed=recipe.seed, round=n, attempt=attempt), 0)

    def _total_weight(self, cohort: tuple[str, ...]) -> int:
        """What the weights of a masked round may add up to, known from the round before; 0: no such bound."""
        if not self._recipe.bounds_total_weight:
            return 0
        total, summed = self._weighed
        return weight_bound(total, summed, cohort, self._recipe.strategy.weight_cap)

    def _ask(self, n: int, cohort: Mapping[str, int], kind: Kind) -> tuple[dict[str, Array], Totals, float]:
        """The cohort's update by tensor (none for an evaluation), the metrics' totals, the part of values clipped."""
        if self._recipe.secure.on:
            return self._masked(n, cohort, kind)
        asked = self._asked(n, tuple(cohort), kind)
        found = self.trainer.mean(asked) if plain(self._recipe) else self._one_by_one(asked)
        return (*found, 0.0)

    def _one_by_one(self, asked: Asked) -> Summed:
        """What comes of plain updates that are looked at one by one: clipped, narrowed, or under a robust rule."""
        assignment = asked.assignment
        wire, strategy = self._layout.update(assignment.train.wire), self._recipe.strategy
        mean, measured, kept, bits = RunningMean(wire), Totals(), list[Contribution](), 0.0
        for client, result in self._each(asked):
            told = totals(assignment, result)
            add_metrics(measured, told)
            if result.update is not None:
                sent = self._sent(assignment, result.update)
                bits += is_unclipped(check_finite(sent, wire), self._dp.clip_norm) - 0.5
                weight = weight_of(assignment, result)
                if strategy.combine == "mean" and not self._single:
                    mean.add(Contribution(client=client, path=sent, weight=weight))
                    sent.unlink()
                else:  # a rule that looks at single updates needs them all at once
                    path = sent.rename(self._folder / f"update-{client}.safetensors")
                    kept.append(Contribution(client=client, path=path, weight=weight))
                    if self._single and weight:
                        self._replies.append(of_file(client, path, wire, weight, told))
        if assignment.kind is not Kind.TRAIN:
            return {}, measured
        if self._single:
            found = dict[str, Array]()
        else:
            found = mean.mean() if strategy.combine == "mean" else combined(kept, wire, strategy)
        for contribution in kept:
            contribution.path.unlink()  # a reply has its file mapped, and reads on
        if self._dp.of_clients:
            sums = [found[t.name].reshape(-1) for t in wire.tensors]
            for piece in sums:
                piece *= len(asked.cohort)  # each weighs 1
            self._release(sums, bits)
        return found, measured

    def _each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        """What each client gave, noted in its ledger where it keeps one."""
        recipe = self._recipe
        for client, result in self.trainer.each(asked):
            if recipe.dp.mode == "local" and result.update is not None:
                self.spent.setdefault(client, []).append(training_event(recipe.train, recipe.dp, result.examples))
            yield client, result

    def _release(self, sums: list[Array], bits: float) -> None:
        """Make of the sum of clipped updates the mean that a coordinator would publish, and note what it spends."""
        self.ledger.append(event_of(self._dp))
        following, _ = release(sums, bits, self._dp, denominator=self._recipe.cohort.size)
        self._dp = self._recipe.dp_of_round(following)

    def _sent(self, assignment: Assignment, update: Path) -> Path:
        """A plain update as it would have travelled; what it was made of is gone."""
        if assignment.dp.of_clients:
            clip_update(update, self._layout, assignment.dp.clip_norm, self._folder / "upload.safetensors")
        elif assignment.train.wire == "fp32":
            return update
        else:
            narrow(update, self._layout, self._folder / "upload.safetensors")
        update.unlink()
        return self._folder / "upload.safetensors"

    def _masked(self, n: int, cohort: Mapping[str, int], kind: Kind) -> tuple[dict[str, Array], Totals, float]:
        recipe, wire = self._recipe, self._layout.update()
        measured, clipped, mean = Totals(), 0, dict[str, Array]()
        means: dict[int, Path] = {}
        for group in sorted(set(cohort.values())):
            mean, totals = self._sum(n, tuple(name for name in cohort if cohort[name] == group), kind)
            add_metrics(measured, totals.metrics)
            clipped += 0 if self._dp.of_clients else totals.clipped  # there it is the adaptive bit
            if group and mean:
                means[group] = self._folder / f"group-{group}.safetensors"
                write_group_mean(means[group], mean, wire)
        if recipe.secure.groups and kind is Kind.TRAIN:
            if len(means) < recipe.secure.fewest_groups:
                needed = recipe.secure.fewest_groups
                raise BadUpdate(f"{len(means)} groups trained on an example, {needed} are needed")
            mean = combined_groups(means, wire, recipe.strategy)
            for path in means.values():
                path.unlink()
        if kind is Kind.TRAIN and not mean:
            raise BadUpdate("no client trained on a single example")
        return mean, measured, clipped / max(1, self._layout.float_numel * len(cohort))

    def _sum(self, n: int, cohort: tuple[str, ...], kind: Kind) -> tuple[dict[str, Array], BlockTotals]:
        """The mean update of those who are summed together (empty where there is none), and their totals."""
        asked = self._asked(n, cohort, kind)
        talk = MaskedRound(asked.assignment, self._layout, self._keys)
        for client, result in self._each(asked):
            talk.upload(client, asked.assignment, result, self._folder / "upload.safetensors")
            if result.update is not None:
                result.update.unlink()
        found_D, totals = talk.unmask()
        if kind is Kind.EVALUATE or not totals.weight:
            return {}, totals
        if self._dp.of_clients:
            self._release([found_D], totals.clipped / BIT)
            return unflatten(found_D, totals.integers, self._layout), totals
        self._weighed = totals.weight, cohort
        return unflatten(found_D, round_half_even(totals.integers, totals.weight), self._layout), totals

    def _asked(self, n: int, cohort: tuple[str, ...], kind: Kind) -> Asked:
        """What the clients of the cohort are asked, in the words of a coordinator."""
        recipe, terms = self._recipe, None
        if recipe.secure.on:
            graph = recipe.mask_graph(len(cohort))
            terms = SecureTerms(
                cohort=cohort,
                degree=graph.degree,
                threshold=graph.threshold,
                min_clients=recipe.fewest,
                clip_value=recipe.secure.clip_value,
                ring_bits=recipe.secure.ring_bits,
                total_weight=self._total_weight(cohort) if kind is Kind.TRAIN else 0,
            )
        with self.version.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        assignment = Assignment(
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
            dp=self._dp,
            parallel=recipe.parallel,
            algorithm=recipe.strategy.algorithm,
        )
        return Asked(assignment=assignment, cohort=cohort, version=self.version)


def _means(totals: Totals) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items() if count and name not in OF_TRAINING}
