"""The rounds of a simulation: who is asked, what their updates come to, and the server's step."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

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
from ..privacy.auxiliary import Totals as BlockTotals
from ..privacy.dp.accounting import Event
from ..privacy.dp.mechanisms import is_unclipped
from ..privacy.dp.plan import check_run, event_of
from ..privacy.dp.release import release
from ..privacy.dp.ring import BIT
from ..privacy.fixed_point import weight_bound
from ..privacy.masks import Array
from ..protocol.errors import BadUpdate, SumTooLarge
from ..protocol.messages import LOCAL_STEPS, OF_TRAINING, TRAIN_LOSS, Assignment, Kind
from ..protocol.recipe import Recipe
from ..protocol.sections import CLIPPED
from ..protocol.tensors import Layout, read_layout
from ..protocol.wire import narrow
from .choosing import trainer
from .cohorts import Asked, Backend, Summed, plain
from .federation import Federation
from .history import Round, Totals
from .living import Living, alike, mean_of, neighbours
from .masking import Keys, MaskedRound, terms_of
from .schedules import Plan
from .sequential import totals
from .storing import Progress
from .world import World

log = logging.getLogger(__name__)
Found = tuple[dict[str, Array], Totals, float, tuple[str, ...]]  # mean, totals, part of the values clipped, the cohort


class Simulation:
    """A run in progress: the newest version, the server's state, and what clients keep between their jobs."""

    def __init__(
        self,
        federation: Federation,
        recipe: Recipe,
        folder: Path,
        backend: Backend,
        *,
        workers: int,
        ray: str,
        keep: bool,
        ideal: bool,
        world: World | None = None,
    ) -> None:
        self._federation, self._recipe, self._folder, self._keep = federation, recipe, folder, keep
        self._keys = None if ideal else Keys()
        self._groups: dict[str, int] = {}
        self._state: Path | None = None
        self._single, self._replies = looks_at_single(recipe), list[Reply]()
        self._weighed: tuple[int, tuple[str, ...]] = 0, ()  # what the last cohort's updates weighed together
        self.spent: dict[str, list[Event]] = {}  # on local differential privacy, by client
        self.version = self._path(0)
        start = initial_model(federation.task(federation.ids[0]), recipe.seed, self.version)
        first_version(self.version, start, recipe.strategy, self.version)
        self._layout: Layout = read_layout(self.version)
        self._dp, self.ledger = recipe.dp_of_round(), list[Event]()
        check_run(recipe, self._layout)
        self.trainer = trainer(backend, federation, recipe, self._layout, folder, workers=workers, ray=ray)
        self.living: Living | None = None
        if world is not None:
            asked = self._asked(1, federation.ids[: recipe.asked or None], Kind.TRAIN).assignment
            self.living = Living(world, federation, recipe, told=asked, layout=self._layout)
        self.done: list[Round] = []
        self.start = Totals()  # the test of version 0, where there is one
        self._kept = 0  # the oldest version that is not deleted

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
            world=self.living.timeline.of_newest() if self.living else None,
            start=self.start,
            older={v: self._path(v) for v in range(self._kept, len(self.done))},
        )

    def go_on(self, at: Progress) -> None:
        """Stand where another process stood."""
        if at.version != self.version and 0 not in at.older:
            self.version.unlink()
        self.version, self._state, self._dp, self._groups, self._weighed = (
            at.version, at.state, at.dp, at.groups, at.weighed,
        )  # fmt: skip
        self.ledger, self.spent, self.done = at.ledger, at.spent, at.rounds
        self._kept = min(at.older, default=len(at.rounds))
        if self.living:
            self.living.go_on(at.rounds)

    def round(self, n: int) -> Round:
        """Select, train, sum, step; `version` is the new one afterwards."""
        started, dp = monotonic(), self._dp
        if self.living is None:
            mean, measured, clipped, cohort = self._attempts(n)
        else:
            (mean, measured, clipped), plan = self.living.first(n, self._heard)
            cohort = plan.cohort
        if clipped > CLIPPED:
            log.warning("values were cut: raise secure.clip_value", extra={"round": n, "clipped": clipped})
        steps, strategy = measured.pop(LOCAL_STEPS, (0.0, 0.0)), self._recipe.strategy
        rescale(mean, self._layout, strategy, summed=len(cohort), steps=steps)
        version, state = self._path(n), self._folder / f"state-{n}.safetensors"
        if strategy.flower:
            replies, self._replies = self._replies or [of_all(mean, measured)], []
            moved = self.version, self._layout, mean, replies, strategy, self._state
            kept = flower_step(*moved, version, state, round=n)
        else:
            kept = server_step(self.version, self._layout, mean, strategy, self._state, version, state)
        if self._state:
            self._state.unlink()
        oldest = self.living.oldest if self.living else None
        self._forget(n if oldest is None else oldest)
        self.version, self._state = version, state if kept else None
        total, count = measured.pop(TRAIN_LOSS, (0.0, 0.0))
        return Round(
            n=n,
            cohort=cohort,
            measured=measured,
            train_loss=total / count if count else 0.0,
            trained=count,
            clipped=clipped,
            seconds=monotonic() - started,
            clip_norm=dp.clip_norm if dp.of_clients else None,
        )

    def _attempts(self, n: int) -> Found:
        """What everybody gives who is asked, or a second attempt's cohort."""
        cohort = self._select(n)
        try:
            return (*self._ask(n, cohort, Kind.TRAIN), tuple(cohort))
        except SumTooLarge as error:  # as a coordinator does: a second attempt, without the bound on the weights' sum
            log.warning("a second attempt", extra={"round": n, "why": error.detail})
            self._weighed, cohort = (0, ()), self._select(n, attempt=2)
            return (*self._ask(n, cohort, Kind.TRAIN), tuple(cohort))

    def _heard(self, plan: Plan) -> tuple[dict[str, Array], Totals, float]:
        """What a plan's clients give; in asynchronous rounds each from the version that it began with."""
        assert self.living is not None, "a plan is a world's"
        n, buffered = plan.n, self.living.timeline.world.buffered
        if self._recipe.secure.on:
            if plan.attempt > 1:  # the bound on the weights' sum may have been why the first one failed
                self._weighed = 0, ()
            return self._masked(n, dict.fromkeys(plan.asked, 0), Kind.TRAIN, plan)
        if buffered is None:
            return (*self._plain(self._asked(n, plan.cohort, Kind.TRAIN), plan.partial), 0.0)
        parts = [
            (self._asked(v + 1, clients, Kind.TRAIN, self._path(v)), buffered.discount(plan.staleness(v)))
            for v, clients in plan.by_version.items()
        ]
        mean, trained = mean_of(self._plain, parts, self.living.weight)
        _, measured = self._plain(self._asked(n, plan.cohort, Kind.EVALUATE))
        return mean, measured | {name: total for name, total in trained.items() if name in OF_TRAINING}, 0.0

    def _path(self, n: int) -> Path:
        return self._folder / f"version-{n}.safetensors"

    def _forget(self, before: int) -> None:
        """Delete the versions before this one, where none are to be kept."""
        for n in range(self._kept, before if not self._keep else 0):
            self._path(n).unlink()
        self._kept = max(self._kept, before)

    def evaluate(self, n: int) -> Totals:
        """Measure the newest version, as a round that trains nobody; the server's state goes."""
        self._forget(n - 1)
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
        return (*self._plain(self._asked(n, tuple(cohort), kind)), 0.0)

    def _plain(self, asked: Asked, units: Mapping[str, int] | None = None) -> Summed:
        """units: of work, of those who do less than the recipe says."""
        if not plain(self._recipe):
            return self._one_by_one(asked, units)
        if not units or self.living is None:
            return self.trainer.mean(asked)
        return mean_of(self.trainer.mean, [(part, 1.0) for part in alike(asked, units)], self.living.weight)

    def _one_by_one(self, asked: Asked, units: Mapping[str, int] | None) -> Summed:
        """What comes of plain updates that are looked at one by one: clipped, narrowed, or under a robust rule."""
        assignment = asked.assignment
        wire, strategy = self._layout.update(assignment.train.wire), self._recipe.strategy
        mean, measured, kept, bits = RunningMean(wire), Totals(), list[Contribution](), 0.0
        for client, result in self._each(asked, units):
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

    def _each(self, asked: Asked, units: Mapping[str, int] | None = None) -> Iterator[tuple[str, Result]]:
        """What each client gave, noted in its ledger where it keeps one."""
        for part in neighbours(asked, units) if units else (asked,):
            train, dp = part.assignment.train, self._recipe.dp
            for client, result in self.trainer.each(part):
                if dp.mode == "local" and result.update is not None:
                    self.spent.setdefault(client, []).append(training_event(train, dp, result.examples))
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

    def _masked(
        self, n: int, cohort: Mapping[str, int], kind: Kind, plan: Plan | None = None
    ) -> tuple[dict[str, Array], Totals, float]:
        recipe, wire = self._recipe, self._layout.update()
        measured, clipped, mean = Totals(), 0, dict[str, Array]()
        means: dict[int, Path] = {}
        for group in sorted(set(cohort.values())):
            mean, totals = self._sum(n, tuple(name for name in cohort if cohort[name] == group), kind, plan)
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
        return mean, measured, clipped / max(1, self._layout.float_numel * len(plan.cohort if plan else cohort))

    def _sum(
        self, n: int, cohort: tuple[str, ...], kind: Kind, plan: Plan | None = None
    ) -> tuple[dict[str, Array], BlockTotals]:
        """The mean update of those who are summed together (empty where there is none), and their totals.

        plan: whom of the cohort the world lets deliver, after all have shared their masks.
        """
        asked, units = self._asked(n, cohort, kind), dict[str, int]()
        talk = MaskedRound(asked.assignment, self._layout, self._keys)
        if plan is not None:
            talk.expect(plan.cohort)
            asked, units, cohort = replace(asked, cohort=plan.cohort), plan.partial, plan.cohort
        for client, result in self._each(asked, units):
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

    def _asked(self, n: int, cohort: tuple[str, ...], kind: Kind, version: Path | None = None) -> Asked:
        """What the clients of the cohort are asked, in the words of a coordinator."""
        recipe, terms, version = self._recipe, None, version or self.version
        if recipe.secure.on:
            terms = terms_of(recipe, cohort, self._total_weight(cohort) if kind is Kind.TRAIN else 0)
        with version.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        assignment = Assignment(
            id=f"simulation.{n}.1",
            fence=1,
            run="simulation",
            round=n,
            attempt=1,
            kind=kind,
            model=digest,
            model_bytes=self._layout.file_bytes,
            secure=terms,
            dp=self._dp,
            **recipe.told,
        )
        return Asked(assignment=assignment, cohort=cohort, version=version)
