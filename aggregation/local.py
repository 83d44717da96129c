"""The server's part in local algorithms: what a version's file holds for them, and how the mean update is scaled.

SCAFFOLD's control variates lie in the version's file, one tensor `control/<parameter>` for each parameter: the server's
own c, zero in a run's first version. They are buffers of its layout, so the server's step adds the clients' mean to
them, and masks, manifests and checkpoints treat them as any other tensor. Only numpy is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import BadUpdate
from ..protocol.sections import Strategy
from ..protocol.tensors import DTYPES, FLOATS, Layout, TensorSpec, map_file, write_file

Array = np.ndarray[Any, Any]
CONTROL = "control/"


def controls(layout: Layout) -> tuple[TensorSpec, ...]:
    """The control variates that a version of this layout holds."""
    return tuple(t for t in layout.tensors if t.name.startswith(CONTROL) and t.name in layout.buffers)


def without_controls(layout: Layout) -> Layout:
    """The layout of the model alone."""
    names = {t.name for t in controls(layout)}
    kept = tuple(t for t in layout.tensors if t.name not in names)
    return replace(layout, tensors=kept, buffers=layout.buffers - names)


def with_controls(layout: Layout) -> Layout:
    """The layout of a model with a control variate for each of its parameters: F32, F64 where the parameter is."""
    added = tuple(
        replace(t, name=CONTROL + t.name, dtype="F64" if t.dtype == "F64" else "F32")
        for t in layout.tensors
        if t.dtype in FLOATS and t.name not in layout.buffers
    )
    return replace(layout, tensors=(*layout.tensors, *added), buffers=layout.buffers | {t.name for t in added})


def first_version(model: Path, layout: Layout, strategy: Strategy, out: Path) -> bool:
    """Write a run's first version to `out` where it is another file than the model it starts from; whether it was.

    Another run's control variates are left out, for this run's clients have none yet; SCAFFOLD's begin at zero.
    """
    alone = without_controls(layout)
    wanted = with_controls(alone) if strategy.name == "scaffold" else alone
    if wanted == layout and not controls(layout):
        return False
    given = map_file(model, layout)
    zeros = {t.name: np.zeros(t.shape, DTYPES[t.dtype]) for t in controls(wanted)}
    write_file(out, {t.name: given[t.name] for t in alone.tensors} | zeros, wanted)
    return True


def rescale(
    mean: Mapping[str, Array],
    layout: Layout,
    strategy: Strategy,
    *,
    summed: int,
    steps: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Make of the mean of what clients sent, in place, what the server steps by.

    layout: of the version. summed: updates in the mean. steps: the sums over clients of weight * effective steps and
    of weight.
    SCAFFOLD: the control variates move by the part of all clients that took part, |S| / N of their mean.
    FedNova: clients sent their updates per effective step, and the mean of these steps is what the parameters move by.
    Raises BadUpdate where clients have sent no such steps.
    Source: Karimireddy et al. 2020, algorithm 1, arXiv:1910.06378; Wang et al. 2020, section 4, arXiv:2007.07481.
    """
    if strategy.name == "scaffold" and strategy.population:
        for t in controls(layout):
            mean[t.name][...] *= min(1.0, summed / strategy.population)
    if strategy.name == "fednova":
        total, weight = steps
        if not (total > 0 and weight > 0):
            raise BadUpdate(f"the clients took {total:g} effective steps together: their updates cannot be scaled")
        for t in layout.tensors:
            if t.dtype in FLOATS and t.name not in layout.buffers:
                mean[t.name][...] *= total / weight
