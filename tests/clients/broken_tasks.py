"""One task that is right, and can be broken in every way that a check of a site looks for."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

SECRET = 1234.5  # stands for a patient's value: no check may show it
NAME = "Jane Doe"


class Listed(Dataset):
    """Rows one by one, as images come from files."""

    def __init__(self, rows: list[Any], columns: tuple[str, ...] = ()) -> None:
        self.rows = rows
        if columns:
            self.columns = columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Ward:
    """40 rows of 3 numbers in 2 classes; `fault` names what is wrong with it."""

    def __init__(self, fault: str = "", contract: dict[str, Any] | None = None) -> None:
        self.fault = fault
        if fault == "made":
            raise RuntimeError(NAME)  # in __init__
        if contract is not None:
            self.contract = contract

    def model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        match self.fault:
            case "model":
                return net[7]
            case "frozen":
                return net.requires_grad_(False)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return net

    def data(self, split: str) -> Any:
        inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        labels = (inputs[:, 0] > 0).long()
        inputs[3, 1] = SECRET
        rows = list(zip(inputs, labels, strict=True))
        match self.fault:
            case "data":
                raise ValueError(f"could not convert {NAME}")
            case "empty":
                return TensorDataset(inputs[:0], labels[:0])
            case "no test" if split == "test":
                return None
            case "not a number":
                inputs[[5, 9], 2] = torch.tensor([float("nan"), float("inf")])
            case "listed not a number":
                inputs[5] = float("nan")
                return Listed(rows)
            case "triples":
                return Listed([(x, y, x) for x, y in rows])
            case "ragged":
                return Listed([(x[: 3 - (n == 7)], y) for n, (x, y) in enumerate(rows)])
            case "label":
                labels[[11, 30]] = 2
            case "words":
                return Listed([(x, NAME if y else "John Roe") for x, y in rows])
            case "ages":
                labels = torch.arange(20, 60)
            case "columns":
                return Listed(rows, columns=("bp", "age", "sex"))
            case "new label" if split == "test":
                labels[0] = 5
        return TensorDataset(inputs, labels)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.fault == "raises":
            raise KeyError(NAME)
        if self.fault == "in training" and torch.is_grad_enabled():
            raise KeyError(NAME)
        if self.fault == "log":
            return torch.log(target - 0.5 * (target == 0)).sum() + 0 * output.sum()
        if self.fault == "vector":
            return nn.functional.cross_entropy(output, target, reduction="none")
        return nn.functional.cross_entropy(output, target, reduction="mean" if self.fault == "mean" else "sum")

    def metrics(self, output: Tensor, target: Tensor) -> Any:
        right = output.argmax(1) == target
        match self.fault:
            case "no pairs":
                return {"accuracy": right.sum()}
            case "mean metric":
                return {"accuracy": (right.float().mean(), len(target))}
            case "other metric":
                return {"f1": (right.sum(), len(target))}
        return {"accuracy": (right.sum(), len(target))}
