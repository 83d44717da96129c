"""Heart disease from what a hospital measures anyway: the task of one hospital, and the four for a simulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from records import FEATURES, Scaling, prepare
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


class LogisticRegression(nn.Module):
    """(B, F) features to (B,) log-odds of heart disease; what README.md compares the network with."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).squeeze(-1)


class Perceptron(nn.Module):
    """The same with one hidden layer."""

    def __init__(self, hidden: int, features: int = FEATURES) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).squeeze(-1)


class Heart:
    """A `murmur.Task`: diagnosis 0 against 1 to 4 at one hospital.

    data: path to one hospital's processed file. seed: of the split into train (66 % of each diagnosis) and test rows.
    scaling: "agreed" scales measurements by round numbers that all hospitals share, "own" by the hospital's train rows.
    hidden: units of the hidden layer; 0 is a logistic regression. All hospitals need the same scaling and hidden.
    """

    def __init__(self, data: str, seed: int = 0, scaling: Scaling = "agreed", hidden: int = 16) -> None:
        self._rows, self._hidden = prepare(Path(data).expanduser(), seed, scaling), hidden

    def model(self) -> nn.Module:
        return Perceptron(self._hidden) if self._hidden else LogisticRegression()

    def data(self, split: str) -> TensorDataset:
        rows = self._rows[split]
        return TensorDataset(torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        """accuracy; sensitivity, the part of the ill that is found; specificity, the part of the well left alone."""
        ill, right = target > 0.5, (output > 0) == (target > 0.5)
        n_ill = int(ill.sum())
        return {
            "accuracy": (right.sum(), len(target)),
            "sensitivity": (right[ill].sum(), n_ill),
            "specificity": (right[~ill].sum(), len(target) - n_ill),
        }


def hospital_file(name: str) -> Path:
    """The file of one of the four hospitals, as it comes with this example."""
    return Path(__file__).parent / "data" / f"processed.{name}.data"


def federation(seed: int = 0, scaling: Scaling = "agreed", hidden: int = 16) -> dict[str, Callable[[], Heart]]:
    """The four hospitals for a simulation: what makes each one's task, by its name."""
    return {name: partial(Heart, str(hospital_file(name)), seed, scaling, hidden) for name in HOSPITALS}
