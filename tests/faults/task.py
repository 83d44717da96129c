"""A task that trains in milliseconds and whose update is large enough to be cut in the middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

WIDTH = 128  # an update of 66 kB


class Line:
    """Rows that a linear map made; each client has its own, and another number of them."""

    def __init__(self, client: int = 0) -> None:
        self.client = client

    def model(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)

    def data(self, split: str) -> Dataset | None:
        if split != "train":
            return None
        generator = torch.Generator().manual_seed(self.client)
        inputs = torch.randn(16 + 8 * self.client, WIDTH, generator=generator)
        return TensorDataset(inputs, inputs.roll(self.client, 1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()


def federation(clients: int = 3) -> dict[str, Line]:
    return {f"site-{n}": Line(n) for n in range(clients)}
