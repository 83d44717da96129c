"""Tasks with a training loop of their own, small enough to be followed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Hand:
    """Least squares whose loop descends on all data at once, `steps` times; `how` makes it misbehave."""

    def __init__(self, how: str = "", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(6 + seed, 3, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * seed
        self.how, self.seen = how, list[Any]()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(0))

    def data(self, split: str) -> TensorDataset:
        return TensorDataset(self.x, self.y) if split == "train" else TensorDataset(self.x[:2], self.y[:2])

    def train(self, context: Any) -> None:
        self.seen.append(context)
        x, y = context.data.tensors
        optimizer = torch.optim.SGD(context.model.parameters(), lr=context.lr)
        for step in range(1, context.steps + 1):
            loss = ((context.model(x) - y) ** 2).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            context.report(step, float(loss.detach()), len(x))
            if context.checkpoint is not None:
                Path(context.checkpoint, "step").write_text(str(step))
            if context.over:
                break
        if self.how == "grown":
            context.model.append(nn.Linear(1, 1))
        if self.how == "frozen":
            context.model.requires_grad_(False)
        if self.how == "ranks" and context.rank:  # what rank 0 has is the update
            context.model[0].weight.data.zero_()


class Measured(Hand):
    def evaluate(self, context: Any) -> dict[str, tuple[float, float]]:
        x, y = context.data.tensors
        assert not context.model.training and not torch.is_grad_enabled()
        return {"loss": (float(((context.model(x) - y) ** 2).sum()), float(len(x)))}


class Lossy(Hand):
    """Has the engine measure it, and count by nothing but examples."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).sum()
