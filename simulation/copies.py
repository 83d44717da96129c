"""A copy of each parameter for each client of a group, and the optimizer that moves them all.

K = clients of the group, A = those that still train
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..aggregation.optimizers import build
from ..protocol.sections import Train

Sums = dict[str, Tensor]  # by parameter: weighted sums of what the clients moved it by, float64

# Of torch.optim: each element moves by its own gradient alone, so the stacked copies may be one parameter.
ELEMENTWISE = frozenset({"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD"})


class Stacked:
    """A copy of each parameter for each client, moved by one optimizer of torch."""

    def __init__(self, start: Mapping[str, Tensor], clients: int, train: Train, mu: float) -> None:
        self._start = {name: t.detach() for name, t in start.items()}
        self._train, self._mu, self._active = train, mu, clients
        self.values = {n: nn.Parameter(t.repeat(clients, *(1 for _ in t.shape))) for n, t in self._start.items()}
        values, options = self.values.values(), train.optimizer_options
        self._optimizer = build(train.optimizer, values, train.lr, options, foreach=None) if start else None

    def narrow(self, active: int, weights: Sequence[float], sums: Sums) -> None:
        """Go on with the first `active` clients; the others are done, and what they moved by is added to the sums."""
        if active == self._active:
            return
        self._add(active, weights, sums)
        if self._optimizer is not None:
            # Anew: autograd keeps the shape that a tensor had when it was first asked for its gradient.
            for name, old in [*self.values.items()]:
                new = self.values[name] = nn.Parameter(old.detach()[:active])
                state: dict[str, Any] = self._optimizer.state.pop(old, {})
                like = {k: isinstance(v, Tensor) and v.shape == old.shape for k, v in state.items()}
                self._optimizer.state[new] = {k: v[:active] if like[k] else v for k, v in state.items()}
            self._optimizer.param_groups[0]["params"] = [*self.values.values()]
        self._active = active

    def step(self) -> None:
        """Move by the gradients that are there: pull, clip each client's, step, forget, as `Stepper.step` does."""
        if self._optimizer is None:
            return
        live = [(v, v.grad, self._start[n]) for n, v in self.values.items() if v.grad is not None]
        with torch.no_grad():
            if self._mu:
                for value, grad, start in live:
                    grad.add_(value, alpha=self._mu).sub_(start, alpha=self._mu)
            if self._train.clip_norm and live:
                squares_A = sum(grad.flatten(1).square().sum(1) for _, grad, _ in live)
                assert isinstance(squares_A, Tensor)
                factor_A = (self._train.clip_norm / (squares_A.sqrt() + 1e-6)).clamp(max=1.0)
                for _, grad, _ in live:
                    grad.mul_(factor_A.view(-1, *(1 for _ in grad.shape[1:])))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self, weights: Sequence[float], sums: Sums) -> None:
        """Add what those who were left moved by to the sums."""
        self._add(0, weights, sums)

    def _add(self, first: int, weights: Sequence[float], sums: Sums) -> None:
        for name, value in self.values.items():
            moved = (value.detach()[first:] - self._start[name]).double()
            weight = torch.tensor(weights[first : self._active], dtype=torch.float64, device=moved.device)
            sums[name] += torch.tensordot(weight, moved, 1)
