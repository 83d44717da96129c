"""The convolutions that a sequence begins with, one client after the other on each of torch's threads.

What one client's rows become in a layer stays in a core's cache until the next takes it; all clients' rows would not.
A = clients that still train, B = rows of one step, R = A · B
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .crew import by_clients

LAST = torch.channels_last  # how oneDNN computes fastest, and max_pool2d ten times as fast


Layer = Callable[..., Tensor]  # of its rows and its weights; it is called on several threads


class Front(nn.Module):
    """These layers, with each client's own weights, for examples that need no gradient."""

    def __init__(
        self, layers: Sequence[tuple[Layer, tuple[str, ...]]], values: Callable[[], tuple[int, Mapping[str, Tensor]]]
    ) -> None:
        """layers: each with the names of its weights. values: how many clients there are, and all weights by name."""
        super().__init__()
        self._layers, self._values = layers, values

    def forward(self, rows_R: Tensor) -> Tensor:
        active, values = self._values()
        own = [values[name] for _, names in self._layers for name in names]
        return _Apply.apply(self, active, rows_R, *own)  # pyright: ignore[reportReturnType]: untyped in torch

    def alone(self, rows_B: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What one client's rows become."""
        left = iter(weights)
        for layer, names in self._layers:
            rows_B = layer(rows_B, *islice(left, len(names)))
        return rows_B


class _Apply(torch.autograd.Function):
    """A Front as a step of autograd: each client has a graph of its own, which only its thread walks."""

    @staticmethod
    def forward(ctx: Any, front: Front, active: int, rows_R: Tensor, *values: Tensor) -> Tensor:
        rows_AB = rows_R.unflatten(0, (active, -1))
        made: list[tuple[Tensor, list[Tensor]]] = [(rows_R, [])] * active

        def run(part: range) -> None:
            for k in part:
                weights = [_last(value[k].detach()).requires_grad_() for value in values]
                with torch.enable_grad():
                    made[k] = front.alone(_last(rows_AB[k]), weights), weights

        by_clients(active, run)
        ctx.made, ctx.values = made, values
        return torch.cat([out.detach() for out, _ in made])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        made: list[tuple[Tensor, list[Tensor]]] = ctx.made
        found = [torch.empty_like(value) for value in ctx.values]
        gradient_AB = gradients[0].unflatten(0, (len(made), -1))

        def run(part: range) -> None:
            for k in part:
                out, weights = made[k]
                for into, gradient in zip(found, torch.autograd.grad(out, weights, gradient_AB[k]), strict=True):
                    into[k] = gradient

        by_clients(len(made), run)
        del ctx.made
        return None, None, None, *found


def _last(t: Tensor) -> Tensor:
    """The same with channels last; of one channel the memory is the same, and only the strides say which is meant."""
    if t.ndim != 4:
        return t
    _, channels, height, width = t.shape
    strides = channels * height * width, 1, channels * width, channels
    return t.contiguous(memory_format=LAST).as_strided(t.shape, strides)
