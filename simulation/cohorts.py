"""What a backend is: it trains a cohort on one version. Everything else of a round is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..aggregation.flower import looks_at_single
from ..clients.job import Result
from ..privacy.masks import Array
from ..protocol.messages import Assignment
from ..protocol.recipe import Recipe
from .history import Totals

Backend = Literal["auto", "vectorized", "sequential"]
Summed = tuple[dict[str, Array], Totals]  # the mean update by tensor, none for an evaluation; the metrics' totals


class Unsuited(Exception):
    """A backend cannot do this; the text says why, as a user reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a cohort is asked: its clients in the order of their ids, and what each is told about the version's file."""

    assignment: Assignment
    cohort: Sequence[str]
    version: Path


class Trainer(Protocol):
    """A backend; `name` says which one trains."""

    @property
    def name(self) -> str: ...

    def mean(self, asked: Asked) -> Summed:
        """Evaluate the version, and train from it where the assignment says so: a plain round's weighted mean.

        The mean is that of `RunningMean` over the clients' updates, up to the rounding of floats.
        """
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
