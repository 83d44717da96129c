"""Small tasks whose training can be followed by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Line:
    """Least squares without a bias: a row costs half its squared error, so its gradient is the error times x."""

    def __init__(self, seed: int, rows: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((rows, 3)).astype(np.float32)
        self.y = (self.x @ np.float32([1.0, -2.0, 0.5]) + 0.1 * seed).astype(np.float32)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(0))

    def data(self, split: str) -> TensorDataset:
        part = slice(None) if split == "train" else slice(0, 2)
        return TensorDataset(torch.from_numpy(self.x[part]), torch.from_numpy(self.y[part]))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * ((output - target) ** 2).sum()

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"accuracy": (((output - target).abs() < 0.5).sum(), len(target))}


class Normed(Line):
    """The same with a batch norm: running statistics and a counter travel too."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))


class Failing(Line):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("the disk with the scans is gone")


def lines(kind: type[Line] = Line, clients: int = 4) -> dict[str, Callable[[], Line]]:
    """Clients with 6, 7, 8, 6, 7, … rows."""
    return {f"site-{k}": partial(kind, k, 6 + k % 3) for k in range(clients)}


def federation(clients: int = 3, shift: int = 0) -> list[Line]:
    """What a target names: `clients` and one option of its own."""
    return [Line(shift + k, 5) for k in range(clients)]
