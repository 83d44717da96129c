"""The versions that a simulation has kept, measured afterwards on one task's data: a test set that no client holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..aggregation.local import CONTROL
from ..clients.task import Task, at_home, optional
from ..protocol.errors import OperatorError
from .evaluation import evaluate
from .groups import Member
from .history import Totals, means

_VERSION = re.compile(r"version-(\d+)\.safetensors")


def measure(
    task: Task,
    folder: Path | str,
    *,
    split: str = "test",
    metrics: tuple[str, ...] = ("loss", "accuracy"),
    every: int = 1,
) -> dict[int, dict[str, float]]:
    """`measure_version` of each version that `simulate(..., folder=...)` has left, by its number.

    every: so many versions apart, from version 0, and the last in any case. Raises OperatorError for a folder without
    versions, too.
    """
    found = {int(m[1]): path for path in Path(folder).glob("*") if (m := _VERSION.fullmatch(path.name))}
    if not found:
        raise OperatorError(f"{folder} holds no versions: name it as the folder of a simulation first")
    chosen = sorted(n for n in found if n % every == 0 or n == max(found))
    return {n: measure_version(task, found[n], split=split, metrics=metrics) for n in chosen}


def rounds_to(measured: Mapping[int, float], target: float) -> float | None:
    """Rounds until the best accuracy so far is the target, on the straight line between two measurements.

    measured: accuracy by version, in order. None where it stays below.
    Source: McMahan et al. 2017, section 3, arXiv:1602.05629, which makes its curves monotonic in the same way.
    """
    last, best = 0, 0.0
    for n, accuracy in measured.items():
        if accuracy >= target:
            return n if not n else last + (n - last) * (target - best) / (accuracy - best)
        last, best = n, max(best, accuracy)
    return None


def measure_version(
    task: Task, version: Path | str, *, split: str = "test", metrics: tuple[str, ...] = ("loss", "accuracy")
) -> dict[str, float]:
    """Means of a version over all that the task has in a split.

    metrics: "loss", and names of the task's own. Raises OperatorError for a task without such data.
    """
    return means(totals_of(version, task.model(), [measured_on(task, split, "the task")], metrics))


def measured_on(task: Task, split: str, name: str) -> Member:
    """All that a task has in a split, to measure versions on; raises OperatorError where it has nothing there."""
    if optional(task, "work") is not None:
        raise OperatorError(f"{name} works by itself: only what has a loss is measured here")
    with at_home(task):
        dataset = task.data(split)
    if dataset is None or isinstance(dataset, Mapping):
        raise OperatorError(f"{name} has no data {split!r} to measure on, as one data set")
    nothing = torch.empty(0)
    return Member(name=name, task=task, inputs=nothing, targets=nothing, rows=None, size=0, tests=[dataset])


def totals_of(version: Path | str, module: nn.Module, members: Sequence[Member], metrics: tuple[str, ...]) -> Totals:
    """Sums and counts over the members' data; the module has the version's weights then."""
    values = {name: t for name, t in load_file(version).items() if not name.startswith(CONTROL)}
    try:
        module.load_state_dict(values)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise OperatorError(f"{members[0].name} has another model than that of the versions: {why}") from None
    with at_home(members[0].task):
        return evaluate(module, members, metrics, torch.device("cpu"))
