"""A federation whose best learning rate is known: rate r leaves (1 - r)^2 of the loss 4.5 after each round.

Every row is x = 1, y = 3, a round is one step on all rows, the model is one weight that starts at 0; so the weight's
distance from 3 is multiplied by 1 - r, and the loss is 0.5 * 9 * (1 - r)^(2 rounds). Rate 1 is there in one round.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

RATES = [0.01, 0.03, 0.1, 0.3, 1.0, 1.5, 1.9, 2.5]
BASE = {
    "name": "planted",
    "task": "planted",
    "rounds": 4,
    "metrics": ["loss"],
    "train": {"batch_size": 4, "epochs": 1},
    "secure": {"on": False},
}


def loss_of(rate: float, rounds: int) -> float:
    return 4.5 * (1 - rate) ** (2 * rounds)


class Planted:
    def __init__(self, killed_at: int = 0) -> None:
        self.killed_at, self.trained = killed_at, 0

    def model(self) -> nn.Module:
        net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(net.weight)
        return nn.Sequential(net, nn.Flatten(0))

    def data(self, split: str) -> TensorDataset:
        return TensorDataset(torch.ones(4, 1), torch.full((4,), 3.0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.trained += torch.is_grad_enabled()
        if (
            self.killed_at
            and self.trained == self.killed_at
            and not (mark := Path(os.environ["MURMUR_TEST_MARK"])).exists()
        ):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5 * ((output - target) ** 2).sum()


def federation(killed_at: int = 0) -> list[Planted]:
    return [Planted(killed_at), Planted(), Planted()]
