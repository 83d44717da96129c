"""A task cut down to a few examples, for a training that only shows that it works, how fast, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from ..task import load_task, optional


class Sampled:
    """The task that `reference` names with at most `train` and `test` of its examples; all else is the task's own.

    memory: a file's start; each process on a GPU writes the most that torch held there beside it, while it evaluates.
    """

    def __init__(self, reference: str, options: Mapping[str, Any], train: int, test: int, memory: str) -> None:
        self._task: Any = load_task(reference, options)
        if optional(self._task, "loss") is None:
            vars(self)["loss"] = None  # it trains by itself
        self._most, self._memory = {"train": train, "test": test}, memory

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._task, name)
        if name == "examples":
            return lambda split: min(own(split), self._most[split])
        if name == "labels":
            return lambda split: _each(own(split), lambda labels: labels[: self._most[split]])
        return own

    def model(self) -> Any:
        return self._task.model()

    def data(self, split: str) -> Any:
        return _each(self._task.data(split), lambda whole: self._cut(whole, self._most[split]))

    @staticmethod
    def _cut(whole: Any, most: int) -> Any:
        if whole is None or isinstance(whole, IterableDataset) or not hasattr(whole, "__len__"):
            return whole  # the engine says what is wrong with it, if anything is
        rows: Any = whole
        return rows if len(rows) <= most else Subset(rows, range(most))

    def loss(self, output: Any, target: Any) -> Tensor:
        if torch.cuda.is_available() and not torch.is_grad_enabled():
            device = torch.cuda.current_device()
            Path(f"{self._memory}.{device}").write_text(str(torch.cuda.max_memory_allocated(device)))
        return self._task.loss(output, target)


def _each(given: Any, change: Callable[[Any], Any]) -> Any:
    """One changed, or each of several under its name."""
    return {name: change(one) for name, one in given.items()} if isinstance(given, Mapping) else change(given)
