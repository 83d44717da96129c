"""The versions that a simulation has kept, measured afterwards on one task's data: a test set that no client holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..aggregation.local import CONTROL
from ..clients.task import Task
from ..protocol.errors import OperatorError
from .evaluation import evaluate
from .groups import Member

_VERSION = re.compile(r"version-(\d+)\.safetensors")


def measure(
    task: Task, folder: Path | str, *, split: str = "test", metrics: tuple[str, ...] = ("loss", "accuracy")
) -> dict[int, dict[str, float]]:
    """`measure_version` of each version that `simulate(..., folder=...)` has left, by its number.

    Raises OperatorError for a folder without versions, too.
    """
    found = {int(m[1]): path for path in Path(folder).glob("*") if (m := _VERSION.fullmatch(path.name))}
    if not found:
        raise OperatorError(f"{folder} holds no versions: name it as the folder of a simulation first")
    return {n: measure_version(task, path, split=split, metrics=metrics) for n, path in sorted(found.items())}


def measure_version(
    task: Task, version: Path | str, *, split: str = "test", metrics: tuple[str, ...] = ("loss", "accuracy")
) -> dict[str, float]:
    """Means of a version over all that the task has in a split.

    metrics: "loss", and names of the task's own. Raises OperatorError for a task without such data.
    """
    dataset = task.data(split)
    if dataset is None or isinstance(dataset, Mapping):
        raise OperatorError(f"the task has no data {split!r} to measure on, as one data set")
    module = task.model()
    module.load_state_dict({name: t for name, t in load_file(version).items() if not name.startswith(CONTROL)})
    nothing = torch.empty(0)
    everything = Member(name="", task=task, inputs=nothing, targets=nothing, rows=None, size=0, tests=[dataset])
    totals = evaluate(module, [everything], metrics, torch.device("cpu"))
    return {name: total / count for name, (total, count) in totals.items()}
