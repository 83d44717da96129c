"""A task cut down to a few examples, for a training that only shows that it works, how fast, and in how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..task import load_task


class Sampled:
    """The task that `reference` names with at most `train` and `test` of its examples; all else is the task's own.

    memory: a file's start; each process on a GPU writes the most that torch held there beside it, while it evaluates.
    """

    def __init__(self, reference: str, options: Mapping[str, Any], train: int, test: int, memory: str) -> None:
        self._task: Any = load_task(reference, options)
        self._most, self._memory = {"train": train, "test": test}, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def model(self) -> Any:
        return self._task.model()

    def data(self, split: str) -> Dataset[Any] | None:
        whole = self._task.data(split)
        if whole is None or not hasattr(whole, "__len__") or len(whole) <= self._most[split]:
            return whole
        return Subset(whole, range(self._most[split]))

    def loss(self, output: Any, target: Any) -> Tensor:
        if torch.cuda.is_available() and not torch.is_grad_enabled():
            device = torch.cuda.current_device()
            Path(f"{self._memory}.{device}").write_text(str(torch.cuda.max_memory_allocated(device)))
        return self._task.loss(output, target)
