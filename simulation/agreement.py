"""Whether each client's own loss is what the cohort's joint loss says of its rows: compared once for every client.

A = clients, B = rows of each, R = A · B rows of a step, C = outputs of a row
"""

from __future__ import annotations

import dis
import warnings
from collections.abc import Callable, Sequence
from types import CodeType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..clients.task import Task
from .cohorts import Unsuited
from .groups import Member

Loss = Callable[[Tensor, Tensor], Tensor]
_LOOKS_AROUND = frozenset({"eval", "exec", "locals", "super", "vars"})  # by these it needs no name for its object


def compare(
    members: Sequence[Member],
    output_R: Tensor,
    target_R: Tensor,
    ranges: Sequence[slice],
    loss: Tensor,
    gradient_R: Tensor,
) -> None:
    """Raise Unsuited unless the joint loss has, for each client, the gradient of its own task's loss over its rows."""
    found = together([m.task for m in members], output_R.detach(), target_R, ranges)
    total, alone_R = found or one_by_one([m.task for m in members], output_R.detach(), target_R, ranges)
    near_R = torch.isclose(alone_R, gradient_R, rtol=1e-4, atol=1e-6, equal_nan=True).view(len(output_R), -1).all(1)
    if not near_R.all():
        for m, part in zip(members, ranges, strict=True):
            if not near_R[part].all():
                raise Unsuited(f"the loss of {m.name} is not the cohort's over its own examples")
    if not np.isclose(float(total), float(loss.detach()), rtol=1e-4, atol=1e-6, equal_nan=True):
        raise Unsuited("the cohort's loss is not the sum of the clients'")
    for m in members:
        m.agreed = True


def one_by_one(
    tasks: Sequence[Task], output_R: Tensor, target_R: Tensor, ranges: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """The sum of the clients' own losses and its gradient, zero for rows that are in no range."""
    own_R = output_R.detach().requires_grad_()
    total = torch.stack([t.loss(own_R[part], target_R[part]) for t, part in zip(tasks, ranges, strict=True)]).sum()
    return total.detach(), torch.autograd.grad(total, own_R)[0]


def together(
    tasks: Sequence[Task], output_R: Tensor, target_R: Tensor, ranges: Sequence[slice]
) -> tuple[Tensor, Tensor] | None:
    """The same in one computation, each client's loss over its own rows still by itself, by torch.func.vmap.

    None where it would not be that: batches of different sizes, a loss that looks at its client, or that cannot be
    mapped (what it does depends on values, it draws random numbers, …).
    """
    common = _common([t.loss for t in tasks])
    if common is None or len({part.stop - part.start for part in ranges}) > 1 or ranges[-1].stop != len(output_R):
        return None
    shape = len(tasks), -1
    try:
        with warnings.catch_warnings(action="error"):  # torch warns of what it maps one by one
            mapped: Any = vmap(grad_and_value(common))
            gradient_AB, losses_A = mapped(output_R.unflatten(0, shape), target_R.unflatten(0, shape))
    except Exception:  # whatever it is, one by one it is told as it is
        return None
    return losses_A.sum(), gradient_AB.flatten(0, 1)


def _common(losses: Sequence[Any]) -> Loss | None:
    """One of these where they are the same object, or one function as a method that does not look at its object."""
    first = losses[0]
    if all(loss is first for loss in losses):
        return first
    if not all(isinstance(loss, MethodType) and loss.__func__ is first.__func__ for loss in losses):
        return None
    code: Any = getattr(first.__func__, "__code__", None)
    if not isinstance(code, CodeType) or not code.co_argcount or _LOOKS_AROUND & {*code.co_names}:
        return None
    own, named = code.co_varnames[0], (step.argval for step in dis.get_instructions(code))
    if own in code.co_cellvars or any(name == own or (isinstance(name, tuple) and own in name) for name in named):
        return None
    return first
