"""What workers of any kind do with their part of a cohort, and how they tell of an error."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..clients.job import Result
from ..clients.own import Own
from ..protocol.errors import BadUpdate, OperatorError
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout
from .cohorts import Asked, Part, Unsuited
from .federation import Federation
from .sequential import Sequential
from .vectorized import Vectorized

Told = dict[str, Any]  # a value that JSON takes


class Either:
    """Both ways to train clients in a worker's process, on one thread."""

    def __init__(
        self,
        federation: Federation,
        recipe: Recipe,
        layout: Layout,
        home: Path,
        *,
        own: Own | None = None,
        on_client: Callable[[int], None] = lambda _: None,
    ) -> None:
        """As of `Sequential`."""
        torch.set_num_threads(1)
        self._federation, self._recipe, self._layout = federation, recipe, layout
        self._sequential = Sequential(federation, recipe, layout, home, own=own, on_client=on_client)
        self._vectorized: Vectorized | None = None

    def part(self, asked: Asked, *, together: bool) -> Part:
        """What these clients add to a plain round; raises Unsuited where they cannot be trained together."""
        if not together:
            return self._sequential.part(asked)
        if self._vectorized is None:
            self._vectorized = Vectorized(self._federation, self._recipe, self._layout)
        return self._vectorized.part(asked)

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        """As `Trainer.each`."""
        return self._sequential.each(asked)


def suits_vectorized(federation: Federation, recipe: Recipe, layout: Layout) -> bool:
    """Whether workers begin by training clients together."""
    try:
        Vectorized(federation, recipe, layout)
    except Unsuited:
        return False
    return True


def told_error(error: Exception) -> Told:
    """An error as a worker tells of it."""
    notes: list[str] = getattr(error, "__notes__", [])
    trace = "".join(traceback.format_exception(error))
    return {"error": type(error).__name__, "text": getattr(error, "detail", str(error)), "notes": notes, "trace": trace}


def error_of(told: Told) -> Exception:
    """The error that a worker told of; one of the task's own kinds is a RuntimeError that has its name."""
    known: dict[str, Callable[[str], Exception]] = {
        kind.__name__: kind for kind in (OperatorError, BadUpdate, Unsuited)
    }
    if told["error"] in known:
        error = known[told["error"]](told["text"])
    else:
        error = RuntimeError(f"{told['error']}: {told['text']}")
    for note in told["notes"]:
        error.add_note(note)
    if told["error"] not in known:
        error.add_note(f"in a worker process:\n{told['trace']}")
    return error
