"""Which backend trains a simulation's cohorts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from ..clients.job import Result
from ..protocol.errors import MurmurError, OperatorError
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout
from .cluster import Cluster
from .cohorts import Asked, Backend, Summed, Trainer, Unsuited
from .federation import Federation
from .processes import Processes
from .sequential import Sequential
from .vectorized import Vectorized

log = logging.getLogger(__name__)


def trainer(
    asked: Backend,
    federation: Federation,
    recipe: Recipe,
    layout: Layout,
    folder: Path,
    *,
    workers: int = 0,
    ray: str = "",
) -> Trainer:
    """The backend that was asked for; "auto" is the fastest in this process that can do what the recipe says.

    Raises OperatorError for one that cannot, and for one that there is not.
    """
    if asked not in get_args(Backend):
        raise OperatorError(f"there is no backend {asked!r}: {', '.join(get_args(Backend))}")
    if asked == "processes":
        return Processes(federation, recipe, layout, folder, workers)
    if asked == "ray":
        return Cluster(federation, recipe, layout, folder, ray, workers)
    sequential = Sequential(federation, recipe, layout, folder)
    if asked == "sequential":
        return sequential
    try:
        return Together(asked, Vectorized(federation, recipe, layout), sequential)
    except Unsuited as why:
        if asked == "vectorized":
            raise _refusal(str(why)) from None
        return _one_by_one(sequential, str(why))


class Together:
    """Clients together as long as they can be, and "auto" from then on one after the other."""

    def __init__(self, asked: Backend, vectorized: Vectorized, sequential: Sequential) -> None:
        self._asked, self._vectorized, self._sequential = asked, vectorized, sequential
        self._now: Trainer = vectorized

    @property
    def name(self) -> str:
        return self._now.name

    def mean(self, asked: Asked) -> Summed:
        try:
            return self._now.mean(asked)
        except Unsuited as why:
            if self._asked == "vectorized":
                raise _refusal(str(why)) from None
            reason = str(why)
        except MurmurError:
            raise
        except Exception as error:  # of the task, most likely: one after the other it is told with the client's name
            if self._now is self._sequential:
                raise
            if self._asked == "vectorized":
                error.add_note(
                    f"in round {asked.assignment.round}, at one of {len(asked.cohort)} clients that were trained "
                    "together"
                )
                raise
            reason = f"{type(error).__name__}: {error}"
        self._now = _one_by_one(self._sequential, reason)
        return self._now.mean(asked)

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        return self._sequential.each(asked)

    def close(self) -> None: ...


def _refusal(why: str) -> OperatorError:
    return OperatorError(f'backend = "vectorized" cannot do this: {why}. "auto" takes it one after the other')


def _one_by_one(sequential: Sequential, why: str) -> Sequential:
    log.info("clients are trained one after the other", extra={"why": why})
    return sequential
