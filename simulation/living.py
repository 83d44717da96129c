"""A simulation's rounds in a world: what they ask of each client, who does a part of it, and how parts add up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar, cast

import numpy as np

from ..aggregation.metrics import add_metrics
from ..clients.engine.sources import read, sizes
from ..clients.task import at_home, optional
from ..privacy.masks import Array
from ..privacy.terms import context_of
from ..protocol.errors import OperatorError, PrivacyRefusal, SumTooLarge
from ..protocol.messages import Assignment
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout, masked_layout
from .cohorts import Asked, Summed
from .devices import draw_devices
from .federation import Federation
from .history import Round, Totals
from .schedules import Plan, schedule
from .stints import Load
from .timeline import Timeline
from .world import World

log = logging.getLogger(__name__)
T = TypeVar("T")


class Ended(Exception):
    """The run cannot go on; the text says why. What was done before stands."""


class Living:
    """Plans the rounds of a run in a world, and keeps what happened in its `timeline`."""

    def __init__(
        self, world: World, federation: Federation, recipe: Recipe, *, told: Assignment, layout: Layout
    ) -> None:
        """told: what a cohort is told in round 1, layout: the model's; bytes follow from them.

        Raises OperatorError where recipe, trace and federation do not fit the world.
        """
        self._federation, self._recipe = federation, recipe
        self._bytes = layout.file_bytes, _sent(told, layout).file_bytes
        self._examples: dict[str, int] = {}
        devices = draw_devices(world, federation.ids, recipe.seed)
        self.timeline = Timeline(world=world, devices=devices)
        self._schedule = schedule(world, recipe, devices, self._load)

    def first(self, n: int, ask: Callable[[Plan], T]) -> tuple[T, Plan]:
        """What the first attempt at a round gives in which enough are heard, and its plan.

        ask: trains a plan's clients. Raises Ended after the last attempt that the recipe allows.
        """
        reason, attempts = "", self._recipe.cohort.attempts
        for attempt in range(1, attempts + 1):
            plan, found = self._schedule.plan(n, attempt), None
            try:
                found, reason = None if plan.reason else ask(plan), plan.reason
            except (SumTooLarge, PrivacyRefusal) as error:
                reason = error.detail
            self.timeline.add(plan, reason)
            if not reason:
                return cast("T", found), plan
            log.warning("an attempt failed", extra={"round": n, "attempt": attempt, "why": reason})
        raise Ended(f"round {n} failed {attempts} times (cohort.attempts), at last because {reason}")

    def go_on(self, done: Sequence[Round]) -> None:
        """Live once more through the rounds that another process has done.

        Raises OperatorError where they were not of this world.
        """
        for round in done:
            for attempt in range(1, self._recipe.cohort.attempts + 1):
                plan = self._schedule.plan(round.n, attempt)
                lived = not plan.reason and plan.cohort == tuple(round.cohort)
                self.timeline.add(plan, "" if lived else plan.reason or "it was tried again")
                if lived:
                    break
            else:
                raise OperatorError(f"round {round.n} is none of this world: go on in the one that the run began in")

    @property
    def oldest(self) -> int | None:
        """The oldest version from which somebody still trains; None where nobody does."""
        return self._schedule.oldest

    def weight(self, client: str) -> int:
        """What its update weighs, before it is discounted."""
        strategy = self._recipe.strategy
        return 1 if strategy.weighting == "uniform" else min(self._count(client), strategy.max_weight)

    def _count(self, client: str) -> int:
        """The client's training examples."""
        if client not in self._examples:
            task = self._federation.task(client)
            if optional(task, "work") is not None:
                raise OperatorError(
                    f"{client}'s task works by itself, and a world must know how much there is to do: leave the world "
                    "out, or give the task data and loss"
                )
            with at_home(task):
                train = read(task, "train")
            self._examples[client] = sum(sizes(train)) if train is not None else 0
        return self._examples[client]

    def _load(self, client: str) -> Load:
        train, count, (down, up) = self._recipe.train, self._count(client), self._bytes
        examples = train.steps * min(train.batch_size, count) if train.steps else train.epochs * count
        return Load(down_bytes=down, up_bytes=up, examples=examples, units=train.steps or train.epochs)


def _sent(told: Assignment, layout: Layout) -> Layout:
    """The layout of what a client sends."""
    if not told.secure:
        return layout.update(told.train.wire)
    context = context_of(told, layout, told.secure)
    return masked_layout(context.dim, context.aux, context.ring_bits)


def neighbours(asked: Asked, units: Mapping[str, int]) -> Iterator[Asked]:
    """The cohort in the order of ids, cut where a client is asked for other work than the one before it.

    units: epochs, or steps where the recipe counts these, of those who do less than it says.
    """
    for done, clients in groupby(asked.cohort, units.get):
        yield _doing(asked, tuple(clients), done)


def alike(asked: Asked, units: Mapping[str, int]) -> list[Asked]:
    """The cohort in parts that are asked for the same work."""
    found = dict.fromkeys(units.get(client) for client in asked.cohort)
    return [_doing(asked, tuple(c for c in asked.cohort if units.get(c) == done), done) for done in found]


def _doing(asked: Asked, cohort: Sequence[str], units: int | None) -> Asked:
    told = asked.assignment
    if units is not None:
        name = "steps" if told.train.steps else "epochs"
        told = told.model_copy(update={"train": told.train.model_copy(update={name: units})})
    return replace(asked, assignment=told, cohort=cohort)


def mean_of(
    mean: Callable[[Asked], Summed], parts: Sequence[tuple[Asked, float]], weight: Callable[[str], float]
) -> Summed:
    """The weighted mean over parts of a cohort, each of which may train from a version of its own.

    parts: each with what its updates count. These discount the sum but not what it is divided by, so that a mean of
    stale updates is a shorter step; integer tensors count in full.
    Source: Nguyen et al. 2022, section 5.1, with 1/K as the weights' part, arXiv:2106.06639.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return mean(parts[0][0])
    weights = [sum(map(weight, asked.cohort)) for asked, _ in parts]
    sums, measured = dict[str, Any](), Totals()
    for (asked, counts), weighs in zip(parts, weights, strict=True):
        update, told = mean(asked)
        add_metrics(measured, told)
        for name, values in update.items():
            whole = np.issubdtype(values.dtype, np.integer)
            part = np.multiply(values, weighs / sum(weights) * (1.0 if whole else counts), dtype=np.float64)
            sums[name] = (sums[name][0] + part, whole) if name in sums else (part, whole)
    found: dict[str, Array] = {
        n: np.rint(total).astype(np.int64) if whole else total for n, (total, whole) in sums.items()
    }
    return found, measured
