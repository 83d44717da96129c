"""Fashion-MNIST divided among clients, and a small convolutional network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.simulation.partitioning import class_shares, divide

PATH_VARIABLE = "MURMUR_FASHION_MNIST"
SMALLEST = 20  # train images that every client has at least: two batches of ten
CLASSES = 10


class FashionMNIST:
    """A `murmur.Task`: client number `part` of `clients`.

    data: path to fashion_mnist.npz; else the environment variable MURMUR_FASHION_MNIST says it.
    alpha: of the Dirichlet distribution by which each class is divided; seed: of that division. All clients of a run
    need the same clients, alpha and seed, or some images stand at two of them.
    """

    def __init__(self, data: str = "", part: int = 0, clients: int = 1, alpha: float = 0.5, seed: int = 0) -> None:
        if not 0 <= part < clients:
            raise OperatorError(f"part = {part}: with {clients} clients it is 0 to {clients - 1}")
        self._splits = _division(str(find_data(data)), clients, alpha, seed)
        self._part = part

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def data(self, split: str) -> Subset[Any] | None:
        """This client's images: (1, 28, 28) float32 in 0 .. 1, and their classes; None where it has no test images."""
        images, held = self._splits[split]
        rows = held[self._part]
        return Subset(images, rows.tolist()) if len(rows) else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target))}


class Federation(Sequence[FashionMNIST]):
    """All clients of one division; the images are in memory once, whatever their number."""

    def __init__(self, clients: int, **options: Any) -> None:
        self._clients, self._options = clients, options
        self[0]  # reads the data now, so that a missing file is told at the start

    def __len__(self) -> int:
        return self._clients

    @overload
    def __getitem__(self, number: int) -> FashionMNIST: ...
    @overload
    def __getitem__(self, number: slice) -> list[FashionMNIST]: ...
    def __getitem__(self, number: int | slice) -> FashionMNIST | list[FashionMNIST]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return FashionMNIST(part=number, clients=self._clients, **self._options)


def federation(clients: int = 10, data: str = "", alpha: float = 0.5, seed: int = 0) -> Federation:
    """The clients for a simulation; options as of `FashionMNIST`."""
    return Federation(clients, data=data, alpha=alpha, seed=seed)


def find_data(data: str = "") -> Path:
    """The file that was named, or the one that the environment names; raises OperatorError saying where to get it."""
    named = data or os.environ.get(PATH_VARIABLE, "")
    path = Path(named).expanduser()
    if named and path.is_file():
        return path.resolve()
    found = f"there is no file {path}" if named else "no path was given"
    raise OperatorError(
        f"Fashion-MNIST: {found}. Name fashion_mnist.npz by the option data=... or the environment variable "
        f"{PATH_VARIABLE}; README.md of this example says how to make it from "
        "https://github.com/zalandoresearch/fashion-mnist"
    )


@lru_cache(maxsize=1)
def images_of(path: str) -> dict[str, TensorDataset]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: (file[f"x_{name}"], file[f"y_{name}"]) for name in ("train", "test")}
    except (OSError, ValueError, KeyError) as error:
        raise OperatorError(f"{path} does not hold x_train, y_train, x_test and y_test: {error}") from None
    found: dict[str, TensorDataset] = {}
    for name, (pixels, labels) in arrays.items():
        if pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
            raise OperatorError(f"{path}: x_{name} has the shape {pixels.shape}, images of 28 × 28 were expected")
        scaled = torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(1)
        found[name] = TensorDataset(scaled, torch.from_numpy(labels.astype(np.int64)))
    return found


@lru_cache(maxsize=4)
def _division(path: str, clients: int, alpha: float, seed: int) -> dict[str, tuple[TensorDataset, list[Any]]]:
    """By split: all images, and each client's rows of them. Train and test have the same class mix at a client."""
    images = images_of(path)
    shares_KC = class_shares(clients, CLASSES, alpha, seed)
    smallest = {"train": SMALLEST, "test": 0}
    return {
        name: (kept, divide(kept.tensors[1].numpy(), shares_KC, seed + number, smallest[name]))
        for number, (name, kept) in enumerate(images.items(), 1)
    }
