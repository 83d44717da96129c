"""Losses of many rows with few classes, computed by columns: torch takes such rows one after the other.

R = rows, C = classes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW = 64  # classes: a column of rows fills a processor's registers, a row of so few does not


class ByColumns(TorchFunctionMode):
    """A task's loss inside of it is what it is outside, up to the rounding of floats; cross_entropy takes less time.

    Only that of class numbers (R,) and outputs (R, C) on a CPU, without its special options: else it is torch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # a sum, what it is of, and what backward needs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not functional.cross_entropy or not _is_plain(*args, **given):
            return func(*args, **given)
        output_RC, target_R = args
        each_R: Any = _CrossEntropy.apply(output_RC, target_R)
        how = given.get("reduction", "mean")
        if how != "sum":
            return each_R if how == "none" else each_R.mean()
        total = each_R.sum()
        self._last = total, output_RC, each_R.grad_fn.log_CR, target_R
        return total

    def gradient(self, loss: Tensor, output_RC: Tensor) -> Tensor:
        """Of a loss that was computed inside; without autograd where it is cross_entropy's sum and nothing else."""
        if self._last is not None:
            total, of, log_CR, target_R = self._last
            if loss is total and output_RC is of and not loss._version:
                return _gradient(log_CR, target_R).T.contiguous()
        return torch.autograd.grad(loss, output_RC)[0]


def _is_plain(output: Any = None, target: Any = None, *rest: Any, **options: Any) -> bool:
    special = options.get("ignore_index", -100) >= 0 or options.get("label_smoothing")
    if rest or special or any(options.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return False
    if options.get("reduction", "mean") not in ("none", "sum", "mean"):
        return False
    if not (torch.is_grad_enabled() and type(output) is type(target) is Tensor and output.requires_grad):
        return False
    if (
        output.device.type != "cpu"
        or output.dtype not in (torch.float32, torch.float64)
        or target.dtype is not torch.int64
    ):
        return False
    if output.ndim != 2 or target.shape != output.shape[:1] or not len(target) or output.shape[1] > FEW:
        return False
    least, most = target.aminmax()
    return int(least) >= 0 and int(most) < output.shape[1]  # others are left out, or are mistakes that torch tells


class _CrossEntropy(torch.autograd.Function):
    """(R,), the cross-entropy of each row."""

    @staticmethod
    def forward(ctx: Any, output_RC: Tensor, target_R: Tensor) -> Tensor:
        ctx.log_CR, ctx.target_R = functional.log_softmax(output_RC.T.contiguous(), 0), target_R
        return -ctx.log_CR.gather(0, target_R[None]).squeeze(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return (_gradient(ctx.log_CR, ctx.target_R) * gradients[0]).T.contiguous(), None


def _gradient(log_CR: Tensor, target_R: Tensor) -> Tensor:
    found_CR = log_CR.exp()
    return found_CR.scatter_add_(0, target_R[None], found_CR.new_full((1, 1), -1.0).expand(1, len(target_R)))
