"""What a backend is: it trains a cohort on one version. Everything else of a round is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..aggregation.flower import looks_at_single
from ..aggregation.metrics import add_metrics
from ..aggregation.weighted_sum import round_half_even
from ..clients.job import Result
from ..privacy.masks import Array
from ..protocol.messages import Assignment, Kind
from ..protocol.recipe import Recipe
from ..protocol.tensors import FLOATS, Layout
from .history import Totals

Backend = Literal["auto", "vectorized", "sequential", "processes", "ray"]
PARTS = 64  # of a cohort at most
TOGETHER = 25  # clients of a part that are trained in one computation, at least
Summed = tuple[dict[str, Array], Totals]  # the mean update by tensor, none for an evaluation; the metrics' totals


class Unsuited(Exception):
    """A backend cannot do this; the text says why, as a user reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a cohort is asked: its clients in the order of their ids, and what each is told about the version's file."""

    assignment: Assignment
    cohort: Sequence[str]
    version: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a part of a cohort adds to a round: weighted sums by tensor, float64 or int64, and what they weigh.

    sums: none for an evaluation.
    """

    sums: dict[str, Array]
    weight: int
    measured: Totals

    def mean(self, wire: Layout, kind: Kind) -> Summed:
        """Of all parts together, as `RunningMean.mean`."""
        if kind is not Kind.TRAIN:
            return {}, self.measured
        found: dict[str, Array] = {}
        for t in wire.tensors:
            sums = self.sums[t.name]
            found[t.name] = sums / self.weight if t.dtype in FLOATS else round_half_even(sums, self.weight)
        return found, self.measured


def parts(cohort: Sequence[str], *, together: bool) -> list[Sequence[str]]:
    """A cohort in pieces for workers, which follow from its size alone. together: they are trained in one computation,
    which gains little beyond so many clients and loses much below."""
    size = max(TOGETHER if together else 1, -(-len(cohort) // PARTS))
    return [cohort[first : first + size] for first in range(0, len(cohort), size)]


def joined(found: Iterable[Part]) -> Part:
    """The sum of parts, in their order; the first one's arrays are copied, the others' only read."""
    sums, weight, measured = dict[str, Array](), 0, Totals()
    for part in found:
        for name, values in part.sums.items():
            if name in sums:
                sums[name] += values
            else:
                sums[name] = values.copy()
        weight += part.weight
        add_metrics(measured, part.measured)
    return Part(sums=sums, weight=weight, measured=measured)


class Trainer(Protocol):
    """A backend; `name` says which one trains."""

    @property
    def name(self) -> str: ...

    def mean(self, asked: Asked) -> Summed:
        """Evaluate the version, and train from it where the assignment says so: a plain round's weighted mean.

        The mean is that of `RunningMean` over the clients' updates, up to the rounding of floats.
        """
        ...

    def close(self) -> None:
        """End what it has begun; nothing more is asked."""
        ...

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        """What each client gave by itself, in order, for sums that are more than a mean: masked, clipped, robust.

        An update's file is its reader's, who may move it and deletes it before the next one is asked for. Raises what a
        client's task raises, with the client's name in a note.
        """
        ...


def plain(recipe: Recipe) -> bool:
    """Whether the recipe's rounds are weighted means of updates as they are, which `Trainer.mean` gives."""
    return not (recipe.secure.on or recipe.dp.mode != "off") and (
        recipe.strategy.combine == "mean" and recipe.train.wire == "fp32" and not looks_at_single(recipe)
    )
