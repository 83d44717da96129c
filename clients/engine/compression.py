"""Smaller models: weights pruned, rounded to 8 bits or to bf16, in a file for release and while they train.

Weights are the floating-point parameters of two or more dimensions; biases, scales of normalization and buffers stay as
they are. An int8 file has, for a weight `name` of shape (C, …), `name` as I8 and `name.scale` as F32 (C,):

    weight[c] = scale[c] * int8[c],    scale[c] = max |weight[c]| / 127,    int8 in -127 .. 127

C = channels: the first dimension of a weight, its outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ...protocol.errors import OperatorError
from ...protocol.sections import Train
from ...protocol.tensors import read_layout
from .state import map_tensors

LEVELS = 127  # on each side of zero: symmetric, so that zero is a level and a sign costs nothing
SCALE = ".scale"
Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> tuple[Tensors, frozenset[str]]:
    """The tensors of a model's file by name, and which of them are buffers; int8 weights come back as F32.

    Raises BadUpdate for what is no canonical file.
    """
    layout = read_layout(path)
    found = map_tensors(path, layout)
    tensors = {name: tensor for name, tensor in found.items() if _scaled(name.removesuffix(SCALE), found) is None}
    for name in found:
        if (scale_C := _scaled(name, found)) is not None:
            tensors[name] = found[name].float() * _by_channel(scale_C, found[name])
    return tensors, layout.buffers


def _scaled(name: str, found: Mapping[str, Tensor]) -> Tensor | None:
    """The scales of an int8 weight; None for any other tensor."""
    weight, scale = found.get(name), found.get(name + SCALE)
    if weight is None or scale is None or weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
        return None
    return scale


def weights(tensors: Mapping[str, Tensor], buffers: frozenset[str] = frozenset()) -> list[str]:
    """The names of what is pruned and rounded."""
    return [n for n, t in tensors.items() if t.is_floating_point() and t.ndim > 1 and n not in buffers]


def pruned(tensors: Mapping[str, Tensor], buffers: frozenset[str], share: float) -> Tensors:
    """The tensors with that share of all their weights at zero, the smallest in magnitude over all layers together.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626.
    """
    names = weights(tensors, buffers)
    if not names:
        raise OperatorError("the model has no weights of two or more dimensions: there is nothing to prune")
    places = [(_Holder(tensors[name]), "weight") for name in names]
    torch_prune.global_unstructured(places, torch_prune.L1Unstructured, amount=float(share))
    for place in places:
        torch_prune.remove(*place)
    # The mask is multiplied in, which leaves negative zeros; adding zero makes them plain ones.
    cut = {name: holder.weight.detach() + 0.0 for (holder, _), name in zip(places, names, strict=True)}
    return {**tensors, **cut}


class _Holder(nn.Module):
    """A module around one weight: torch prunes modules."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())


def quantized(tensors: Mapping[str, Tensor], buffers: frozenset[str]) -> Tensors:
    """The tensors with their weights as int8 and a scale per channel; raises OperatorError for weights in NaN."""
    found = dict(tensors)
    for name in weights(tensors, buffers):
        if name + SCALE in tensors:
            raise OperatorError(f"the model has a tensor {name + SCALE!r}, which int8 needs for the scales of {name!r}")
        scale_C = _scale(tensors[name].float())
        if not scale_C.isfinite().all():
            raise OperatorError(f"{name!r} has values that are not finite")
        found[name] = (tensors[name].float() / _by_channel(scale_C, tensors[name])).round().to(torch.int8)
        found[name + SCALE] = scale_C
    return found


def narrowed(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors with all that is F32 or F64 as BF16."""
    wide = (torch.float32, torch.float64)
    return {name: t.to(torch.bfloat16) if t.dtype in wide else t for name, t in tensors.items()}


def _scale(weight: Tensor) -> Tensor:
    """(C,): the step between two levels; 1 for a channel of zeros, which it leaves at zero."""
    scale_C = weight.flatten(1).abs().amax(1) / LEVELS
    return torch.where(scale_C == 0, 1.0, scale_C)


def _by_channel(scale_C: Tensor, weight: Tensor) -> Tensor:
    return scale_C.view(-1, *[1] * (weight.ndim - 1))


def rounded(weight: Tensor) -> Tensor:
    """What an int8 file makes of a weight, in the weight's own dtype."""
    scale = _by_channel(_scale(weight.float()), weight)
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


class Shaping:
    """Keeps a training to weights that can be released small: `begin` before a step's forward passes, `end` after them.

    train.qat: forward and backward see weights as an int8 file has them, and the gradient moves the exact ones
    ("straight-through": Jacob et al. 2018, arXiv:1712.05877). Between steps the model holds the exact ones.
    train.keep_zeros: weights that are zero when training begins get no gradient, so that a pruned model stays pruned.
    """

    def __init__(self, module: nn.Module, train: Train) -> None:
        self.rounds = train.qat
        self.parameters = [p for p in module.parameters() if p.ndim > 1 and p.is_floating_point()]
        self.masks = [(p, p.detach() != 0) for p in self.parameters if train.keep_zeros and p.requires_grad]
        self._exact: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        if self.rounds:
            self._exact = [p.detach().clone() for p in self.parameters]
            for p in self.parameters:
                p.copy_(rounded(p))

    @torch.no_grad()
    def end(self) -> None:
        for p, exact in zip(self.parameters, self._exact, strict=self.rounds):
            p.copy_(exact)
        self._exact = []
        for p, mask in self.masks:
            if p.grad is not None:
                p.grad.mul_(mask)
