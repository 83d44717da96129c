"""The work of `benchmarks.simulation`: three models on Fashion-MNIST, and the bare loop that does nothing else.

1,000 clients of 60 images each, one epoch in the order of `epoch_order`, batches of 10, SGD of rate 0.1, the mean of
the clients' weights. K = clients of a round
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from murmur.clients.engine.drawing import order_of

from .simulated_models import CLASSES, cnn, logistic, mlp

CLIENTS, IMAGES, BATCH, RATE = 1000, 60, 10, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A model, and how many clients train it in a round."""

    name: str
    model: Callable[[], nn.Module]
    cohort: int
    at_least: float  # times the bare loop


WORKS = (
    Work(name="W1", model=cnn, cohort=50, at_least=2),
    Work(name="W2", model=logistic, cohort=100, at_least=20),
    Work(name="W3", model=mlp, cohort=50, at_least=8),
)


class Images:
    """A task: one client's images, or any other two tensors; it has no test data."""

    def __init__(self, model: Callable[[], nn.Module], inputs: Tensor, targets: Tensor) -> None:
        self.model = model
        self.dataset = TensorDataset(inputs, targets)

    def data(self, split: str) -> TensorDataset | None:
        return self.dataset if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Images (N, 1, 28, 28) in 0 .. 1 and classes, for training and for tests."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def clients(self, model: Callable[[], nn.Module], clients: int = CLIENTS, images: int = IMAGES) -> list[Images]:
        """Each with its own tensors, as data that lies apart would be."""
        x, y = self.train
        if clients * images > len(x):  # again from the start: only its amount matters
            x, y = (t.repeat(-(-clients * images // len(x)), *(1 for _ in t.shape[1:])) for t in (x, y))
        parts = zip(x.split(images), y.split(images), range(clients), strict=False)
        return [Images(model, a.clone(), b.clone()) for a, b, _ in parts]

    def accuracy(self, module: nn.Module) -> float:
        """Of the test images, the share whose class the model finds."""
        module.eval()
        with torch.no_grad():
            hits = [(module(x).argmax(1) == y).sum() for x, y in zip(*(t.split(1000) for t in self.test), strict=True)]
        return float(sum(hits)) / len(self.test[0])


def read(path: str) -> Data:
    """fashion_mnist.npz, or noise of its shapes where no path is given."""
    if not path:
        generator = torch.Generator().manual_seed(1)
        images, classes = torch.rand(60_000, 1, 28, 28, generator=generator), torch.arange(60_000) % CLASSES
        return Data(train=(images, classes), test=(images[:10_000], classes[:10_000]))
    with np.load(Path(path).expanduser(), allow_pickle=False) as file:
        found = [(_images(file[f"x_{name}"]), _classes(file[f"y_{name}"])) for name in ("train", "test")]
    return Data(train=found[0], test=found[1])


def _images(pixels: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(1)


def _classes(numbers: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64))


def bare_round(module: nn.Module, clients: Sequence[Images], names: Sequence[str], n: int, seed: int = 0) -> None:
    """One round of federated averaging and nothing else, in place: functional gradients, a multi-tensor update.

    names: the clients' ids, for the order of their batches.
    """
    start = {name: p.detach() for name, p in module.named_parameters()}
    total = [torch.zeros_like(p) for p in start.values()]
    for name, client in zip(names, clients, strict=True):
        weights = [p.clone().requires_grad_() for p in start.values()]
        x, y = client.dataset.tensors
        for batch in order_of(seed, n, name, 0, len(x)).split(BATCH):
            output = functional_call(module, dict(zip(start, weights, strict=True)), (x[batch],))
            loss = nn.functional.cross_entropy(output, y[batch])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=-RATE)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]: torch's optimizers are built on it
        with torch.no_grad():
            torch._foreach_add_(total, weights)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]: as above
    with torch.no_grad():
        for p, summed in zip(start.values(), total, strict=True):
            p.copy_(summed / len(clients))
