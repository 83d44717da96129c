"""Synthetic(α, β) of Li et al. 2020: devices that differ in their models and in their inputs, by two numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur.protocol.errors import OperatorError

FEATURES, CLASSES = 60, 10
TEST = 0.1  # of each device's samples


class Synthetic:
    """A `murmur.Task`: one device, or several taken together; multinomial logistic regression.

    inputs: (N, 60), labels: (N,) by split.
    """

    def __init__(self, splits: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._splits = splits

    def model(self) -> nn.Module:
        layer = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def data(self, split: str) -> TensorDataset:
        return TensorDataset(*self._splits[split])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target))}


def federation(
    clients: int = 30, alpha: float = 1.0, beta: float = 1.0, iid: bool = False, seed: int = 0
) -> list[Synthetic]:
    """The devices for a simulation.

    alpha: how much the devices' true models differ, beta: how much their inputs do; iid: one model and one distribution
    of inputs for all.
    """
    rng = np.random.default_rng(seed)
    return [_device(*drawn) for drawn in _draw(rng, clients, alpha, beta, iid=bool(iid))]


def together(devices: list[Synthetic]) -> Synthetic:
    """All devices' samples as one task, to measure on."""
    parts = {split: [d.data(split).tensors for d in devices] for split in ("train", "test")}
    return Synthetic(
        {split: (torch.cat([x for x, _ in p]), torch.cat([y for _, y in p])) for split, p in parts.items()}
    )


def _draw(rng: np.random.Generator, devices: int, alpha: float, beta: float, *, iid: bool) -> list[Any]:
    """Each device's inputs (N, 60) and labels (N,): y = argmax(W x + b).

    Not iid: u ~ N(0, α), B ~ N(0, β); entries of W and b ~ N(u, 1), those of the mean v of the inputs ~ N(B, 1). iid:
    one W, b ~ N(0, 1) and v = 0. x ~ N(v, Σ), Σ diagonal, Σ_jj = j^-1.2. α and β are taken as standard deviations and
    sizes as 50 + exp(N(4, 2)), as the authors' own generator has them; the paper says "power law".
    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", section 5.1, arXiv:1812.06127.
    """
    if devices < 1 or alpha < 0 or beta < 0:
        given = f"clients = {devices}, alpha = {alpha:g}, beta = {beta:g}"
        raise OperatorError(f"{given}: a device at least, alpha and beta no less than 0")
    sizes = rng.lognormal(4, 2, devices).astype(int) + 50
    spread = np.arange(1, FEATURES + 1) ** -0.6  # square roots of Σ_jj
    shared = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    found: list[Any] = []
    for size in sizes:
        u, centre = rng.normal(0, alpha), rng.normal(0, beta)
        weight, bias = shared if iid else (rng.normal(u, 1, (FEATURES, CLASSES)), rng.normal(u, 1, CLASSES))
        mean = np.zeros(FEATURES) if iid else rng.normal(centre, 1, FEATURES)
        inputs = mean + spread * rng.normal(size=(size, FEATURES))
        found.append((inputs, (inputs @ weight + bias).argmax(1)))
    return found


def _device(inputs: Any, labels: Any) -> Synthetic:
    tests = max(1, int(TEST * len(labels)))
    x, y = torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)
    return Synthetic({"train": (x[tests:], y[tests:]), "test": (x[:tests], y[:tests])})
