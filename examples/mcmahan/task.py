"""McMahan et al. 2017 on images of 28 × 28: their two networks, divided evenly or so that a client sees two classes."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.simulation.partitioning import iid, shards

PATH_VARIABLE = "MURMUR_IMAGES"
CLASSES = 10
Network = Literal["2nn", "cnn"]


class Images:
    """A `murmur.Task`: one client, by the rows of its train and test images.

    network: "2nn", two hidden layers of 200 (199,210 parameters), or "cnn", two 5 × 5 convolutions of 32 and 64
    channels, each pooled by two, and a layer of 512 (1,663,370).
    """

    def __init__(self, path: str, network: Network, rows: dict[str, Any]) -> None:
        self._path, self._network, self._rows = path, network, rows

    def model(self) -> nn.Module:
        if self._network == "2nn":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(784, 200),
                nn.ReLU(),
                nn.Linear(200, 200),
                nn.ReLU(),
                nn.Linear(200, CLASSES),
            )
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, CLASSES),
        )

    def data(self, split: str) -> Subset[Any]:
        return Subset(images_of(self._path)[split], self._rows[split])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target))}


def federation(
    clients: int = 100, data: str = "", network: Network = "2nn", split: Literal["iid", "shards"] = "iid", seed: int = 0
) -> list[Images]:
    """The clients for a simulation; of the test images each has an equal part.

    data: path to the images, else the environment variable MURMUR_IMAGES says it. split: "shards" gives each client two
    of 200 pieces of the images in the order of their classes, so most see two classes.
    """
    if network not in ("2nn", "cnn") or split not in ("iid", "shards"):
        raise OperatorError(f"network = {network!r}, split = {split!r}: 2nn or cnn, and iid or shards")
    path = find_images(data)
    images = images_of(path)
    labels = images["train"].tensors[1].numpy()
    train = iid(len(labels), clients, seed=seed) if split == "iid" else shards(labels, clients, seed=seed)
    test = iid(len(images["test"]), clients, seed=seed)
    return [
        Images(path, network, {"train": a.tolist(), "test": b.tolist()})
        for a, b in zip(train.parts, test.parts, strict=True)
    ]


def everybody(data: str = "", network: Network = "2nn") -> Images:
    """All images as one task, to measure on."""
    path = find_images(data)
    return Images(path, network, {name: range(len(images)) for name, images in images_of(path).items()})


def find_images(data: str = "") -> str:
    """The file that was named, or the one that the environment names; raises OperatorError saying where to get it."""
    named = data or os.environ.get(PATH_VARIABLE, "")
    if named and (path := Path(named).expanduser()).is_file():
        return str(path.resolve())
    found = f"there is no file {named}" if named else "no path was given"
    raise OperatorError(
        f"images: {found}. Name mnist.npz or fashion_mnist.npz by the option data=... or the environment variable "
        f"{PATH_VARIABLE}; README.md of this example says where they come from"
    )


@lru_cache(maxsize=1)
def images_of(path: str) -> dict[str, TensorDataset]:
    """By split: (N, 1, 28, 28) float32 in 0 .. 1, and (N,) int64 classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: (file[f"x_{name}"], file[f"y_{name}"]) for name in ("train", "test")}
    except (OSError, ValueError, KeyError) as error:
        raise OperatorError(f"{path} does not hold x_train, y_train, x_test and y_test: {error}") from None
    return {
        name: TensorDataset(
            torch.from_numpy(pixels.astype(np.float32) / 255).reshape(-1, 1, 28, 28),
            torch.from_numpy(labels.astype(np.int64)),
        )
        for name, (pixels, labels) in arrays.items()
    }
