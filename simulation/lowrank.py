"""Clients' copies of a linear layer that are never formed: under SGD they stay near the version's in a few directions.

After some steps client k has W_k = a W + C_kᵀ H_k and b_k = a b + C_kᵀ 1. H_k (T, I) are the rows that its layer was
given, C_k (T, O) a coefficient for each, made of the gradients of its outputs. Plain SGD leaves a = 1 and C_k = -lr
times those gradients; momentum, weight decay and the proximal pull are linear too, and move a and C by recursions of
their own. So a step is one product with W for all clients and small ones with H_k and C_k, and a round's sum of what
the clients moved by is Σ C_kᵀ H_k, one product. It is exact but for the order of float additions.

K = clients of a group, A = those that still train, B = rows of one step, R = A · B, T = rows of a client's whole
training, N = examples of the largest client, I = inputs of the layer, O = its outputs
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol.sections import Train
from .cohorts import Unsuited
from .copies import Sums
from .crew import by_clients
from .groups import Buffers, Group, Member, Step


@dataclass(frozen=True, slots=True)
class Sgd:
    """torch.optim.SGD and the proximal pull, in numbers."""

    lr: float
    momentum: float
    dampening: float
    decay: float
    nesterov: bool
    mu: float

    @staticmethod
    def of(train: Train, mu: float) -> Sgd | None:
        """None for another optimizer, and where gradients are clipped: their norms are not linear in them."""
        if train.optimizer != "SGD" or train.clip_norm:
            return None
        options = train.optimizer_options
        momentum, dampening, decay = (float(options.get(n, 0.0)) for n in ("momentum", "dampening", "weight_decay"))
        return Sgd(train.lr, momentum, dampening, decay, bool(options.get("nesterov", False)), mu)


class _LowRank(ABC):
    """What is common: the recursions, and the sum."""

    def __init__(self, name: str, layer: nn.Linear, sgd: Sgd, buffers: Buffers) -> None:
        self.name, self.layer, self._sgd, self._buffers = name, layer, sgd, buffers
        self._anchor = torch.zeros(0, requires_grad=True, device=layer.weight.device)  # so that backward comes by

    def _begin(self, clients: int, rows: int) -> None:
        """All at the version's weights."""
        self.weight = self.layer.weight.detach()
        bias: Any = self.layer.bias  # torch's types do not say that it may be None
        self.bias: Tensor | None = bias.detach() if bias is not None else None
        shape = clients, rows, self.layer.out_features
        self.coefficients_KTO = self._buffers.take(f"{self.name}.coefficients", shape, self.weight.dtype).zero_()
        self._momenta_KTO: Tensor | None = None
        self.kept, self._kept_momentum = 1.0, 0.0  # how much of the version's own weights: a, and in the momentum
        self._kept_K = torch.ones(clients, dtype=self.weight.dtype, device=self.weight.device)
        self.gradient_ABO: Tensor | None = None

    @abstractmethod
    def outputs(self, rows: Any) -> Tensor: ...

    @abstractmethod
    def backward(self, gradient_ABO: Tensor) -> Tensor: ...

    @abstractmethod
    def _add(self, to_ATO: Tensor, gradient_ABO: Tensor, factor: float) -> None:
        """Add the gradients of a step to the coefficients of its rows."""

    @abstractmethod
    def _summed(self, scaled_KTO: Tensor) -> Tensor:
        """(O, I): Σ C_kᵀ H_k for these coefficients."""

    def step(self) -> None:
        """Move by the gradients that came; as torch.optim.SGD, skip a layer that none came to."""
        gradient, self.gradient_ABO = self.gradient_ABO, None
        if gradient is None:
            return
        s, active = self._sgd, len(gradient)
        moved = self.coefficients_KTO[:active]
        decay, pull = s.mu + s.decay, s.mu * (self.kept - 1) + s.decay * self.kept
        if not s.momentum:
            if decay:
                moved.mul_(1 - s.lr * decay)
            self._add(moved, gradient, -s.lr)
            self.kept -= s.lr * pull
        else:
            fresh = 1 - s.dampening
            if self._momenta_KTO is None:
                self._momenta_KTO, fresh = torch.zeros_like(self.coefficients_KTO), 1.0
            momenta = self._momenta_KTO[:active].mul_(s.momentum)
            if decay:
                momenta.add_(moved, alpha=fresh * decay)
            self._add(momenta, gradient, fresh)
            self._kept_momentum = s.momentum * self._kept_momentum + fresh * pull
            if s.nesterov:
                moved.mul_(1 - s.lr * decay).add_(momenta, alpha=-s.lr * s.momentum)
                self._add(moved, gradient, -s.lr)
                self.kept -= s.lr * (pull + s.momentum * self._kept_momentum)
            else:
                moved.add_(momenta, alpha=-s.lr)
                self.kept -= s.lr * self._kept_momentum
        if self.kept != 1:
            self._kept_K[:active] = self.kept

    def finish(self, weights: Sequence[float], sums: Sums) -> None:
        """Add what the clients moved by, weighted, to the sums."""
        weight_K = torch.tensor(weights, dtype=self.weight.dtype, device=self.weight.device)
        scaled_KTO = self.coefficients_KTO.mul_(weight_K[:, None, None])
        left = float(((self._kept_K.double() - 1) * weight_K.double()).sum())
        prefix = f"{self.name}." if self.name else ""  # the layer may be the whole model
        sums[f"{prefix}weight"] += self._summed(scaled_KTO)
        if left:
            sums[f"{prefix}weight"] += left * self.weight.double()
        if self.bias is not None:
            sums[f"{prefix}bias"] += scaled_KTO.sum((0, 1)) + left * self.bias.double()


class LowRank(_LowRank):
    """A linear layer anywhere in a model; it learns its rows as they come."""

    def begin(self, clients: int, rows: int) -> None:
        """rows: T."""
        self._begin(clients, rows)
        shape = clients, rows, self.layer.in_features
        self._rows_KTI = self._buffers.take(f"{self.name}.rows", shape, self.weight.dtype).zero_()
        self._seen = self._width = 0

    def __call__(self, rows_ABI: Tensor) -> Tensor:
        return _Apply.apply(rows_ABI, self._anchor, self)  # pyright: ignore[reportReturnType]: untyped in torch

    def outputs(self, rows: Tensor) -> Tensor:
        rows_ABI = rows
        if self._width:
            raise Unsuited("a linear layer is used twice in one pass")
        active, self._width, _ = rows_ABI.shape
        out_ABO = nn.functional.linear(rows_ABI, self.weight, self.bias)
        if self.kept != 1:
            out_ABO *= self.kept
        if self._seen:
            known_ABT = torch.bmm(rows_ABI, self._rows_KTI[:active, : self._seen].mT)
            if self.bias is not None:
                known_ABT += 1
            out_ABO.baddbmm_(known_ABT, self.coefficients_KTO[:active, : self._seen])
        self._rows_KTI[:active, self._seen : self._seen + self._width] = rows_ABI
        return out_ABO

    def backward(self, gradient_ABO: Tensor) -> Tensor:
        active = len(gradient_ABO)
        found_ABI = gradient_ABO @ self.weight
        if self.kept != 1:
            found_ABI *= self.kept
        if self._seen:
            share_ABT = torch.bmm(gradient_ABO, self.coefficients_KTO[:active, : self._seen].mT)
            found_ABI.baddbmm_(share_ABT, self._rows_KTI[:active, : self._seen])
        return found_ABI

    def step(self) -> None:
        super().step()
        self._seen, self._width = self._seen + self._width, 0

    def _add(self, to_ATO: Tensor, gradient_ABO: Tensor, factor: float) -> None:
        to_ATO[:, self._seen : self._seen + self._width].add_(gradient_ABO, alpha=factor)

    def _summed(self, scaled_KTO: Tensor) -> Tensor:
        return scaled_KTO.flatten(0, 1).T @ self._rows_KTI.flatten(0, 1)


class FirstLayer(_LowRank):
    """The linear layer that takes the examples themselves: the same rows in each epoch, all known before the round.

    Its outputs under the version's weights come from one product for all examples of a group, and what the steps add
    to them from the products of a client's examples with each other, which are kept from round to round. T = N.
    """

    def begin(self, group: Group) -> None:
        self._group, k, n = group, len(group.members), max(group.sizes)
        self._begin(k, n)
        base_KNO = self._buffers.take(f"{self.name}.outputs", (k, n, self.layer.out_features), self.weight.dtype)
        base_XO, weight_IO = base_KNO.flatten(0, 1), self.weight.T.contiguous()
        self._blocks = [(where, rows.flatten(1)) for where, rows in group.blocks]

        own = len(self._blocks) == k  # a client is a block, whose rows are in the cache when they are multiplied

        def multiply(part: range) -> None:
            for number in part:
                where, rows_BI = self._blocks[number]
                torch.mm(rows_BI, weight_IO, out=base_XO[where])
                if own and group.members[number].gram is None:
                    self._multiply(group.members[number], rows_BI)

        by_clients(len(self._blocks), multiply)
        if self.bias is not None:
            base_XO += self.bias
        for m in group.members:
            if m.gram is None:
                self._multiply(m, m.given().flatten(1))
        self._base, self._gram, self._moved = base_XO, self._products(n).flatten(0, 1), False

    def _multiply(self, m: Member, rows_NI: Tensor) -> None:
        """Have the products of a client's examples with each other, and 1 more where there is a bias."""
        m.gram = rows_NI @ rows_NI.T
        if self.bias is not None:
            m.gram += 1

    def _products(self, n: int) -> Tensor:
        """(K, N, N): of each client's examples with each other, and 1 more where there is a bias."""
        grams = [m.gram for m in self._group.members if m.gram is not None]
        gram_KNN = self._buffers.take(f"{self.name}.gram", (len(grams), n, n), self.weight.dtype)
        if min(self._group.sizes) == n:
            return torch.stack(grams, out=gram_KNN)
        gram_KNN.zero_()
        for into_NN, gram in zip(gram_KNN, grams, strict=True):
            into_NN[: len(gram), : len(gram)] = gram
        return gram_KNN

    def __call__(self, step: Step) -> Tensor:
        """(R, O)"""
        found_ABO: Any = _Apply.apply(step, self._anchor, self)
        return found_ABO.flatten(0, 1)

    def outputs(self, rows: Step) -> Tensor:
        self._at_R, self._distinct, active = rows.at_R, rows.valid is None, rows.active
        out_ABO = self._base.index_select(0, self._at_R).unflatten(0, (active, -1))
        if self.kept != 1:
            out_ABO *= self.kept
        if self._moved:
            known_ABN = self._gram.index_select(0, self._at_R).unflatten(0, (active, -1))
            out_ABO.baddbmm_(known_ABN, self.coefficients_KTO[:active])
        return out_ABO

    def backward(self, gradient_ABO: Tensor) -> Tensor:
        raise AssertionError("examples need no gradient")

    def step(self) -> None:
        super().step()
        self._moved = True

    def _add(self, to_ATO: Tensor, gradient_ABO: Tensor, factor: float) -> None:
        to_XO, gradient_RO = to_ATO.flatten(0, 1), gradient_ABO.flatten(0, 1)
        if self._distinct:  # four times as fast
            to_XO.index_copy_(0, self._at_R, to_XO.index_select(0, self._at_R).add_(gradient_RO, alpha=factor))
        else:
            to_XO.index_add_(0, self._at_R, gradient_RO, alpha=factor)

    def _summed(self, scaled_KTO: Tensor) -> Tensor:
        scaled_XO, found = scaled_KTO.flatten(0, 1), dict[int, Tensor]()

        def add(part: range) -> None:
            sum_OI = found[part.start] = torch.zeros_like(self.weight)
            for where, rows_BI in self._blocks[part.start : part.stop]:
                sum_OI.addmm_(scaled_XO[where].T, rows_BI)

        by_clients(len(self._blocks), add)
        return torch.stack([found[first] for first in sorted(found)]).sum(0)


class _Apply(torch.autograd.Function):
    """A low-rank layer as a step of autograd; the layer keeps its outputs' gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Any, anchor: Tensor, layer: _LowRank) -> Tensor:
        ctx.layer = layer
        return layer.outputs(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        ctx.layer.gradient_ABO = gradients[0]
        return ctx.layer.backward(gradients[0]) if ctx.needs_input_grad[0] else None, None, None
