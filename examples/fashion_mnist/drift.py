"""Fashion-MNIST among clients that each see two of ten classes: what drifting apart costs, and what helps.

python examples/fashion_mnist/drift.py picture.svg        draws the accuracy after each round, and prints it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from task import CLASSES, FashionMNIST, find_data, images_of
from torch import nn, set_num_threads

Array = np.ndarray[Any, Any]
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"name": "fedprox", "mu": 0.1},
    "SCAFFOLD": {"name": "scaffold"},
}


class TwoClasses(FashionMNIST):
    """Client number `part`: `images` of the classes part and part + 1, and a tenth as many to test on.

    No two clients share an image. The model is multinomial logistic regression, as in SCAFFOLD's own experiments.
    """

    def __init__(self, part: int, images: int, data: str) -> None:
        self._part, self._splits = 0, {}
        for split, count in (("train", images // 2), ("test", images // 20)):
            found = images_of(str(find_data(data)))[split]
            labels = found.tensors[1].numpy()
            of_class = (np.flatnonzero(labels == (part + k) % CLASSES)[k * count : (k + 1) * count] for k in (0, 1))
            self._splits[split] = found, [np.concatenate([*of_class])]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, CLASSES))


def federation(clients: int = CLASSES, images: int = 600, data: str = "") -> list[TwoClasses]:
    """The clients for a simulation; images: to train on, at each."""
    return [TwoClasses(part, images, data) for part in range(clients)]


def accuracies(strategy: dict[str, Any], rounds: int = 30) -> list[float]:
    """Of each version, on the test images of all clients."""
    from murmur.protocol.recipe import parse_recipe
    from murmur.simulation import simulate

    train = {"epochs": 5, "batch_size": 60, "lr": 0.05}
    values = {"name": "drift", "task": "drift", "rounds": rounds, "train": train, "secure": {"on": False}}
    return [v["accuracy"] for v in simulate(federation(), parse_recipe(values | {"strategy": strategy})).versions]


def picture(found: dict[str, list[float]]) -> str:
    """The curves as an SVG that stands alone."""
    from murmur.web.svg import INKS, Point, Series, line

    inks = dict(zip(found, INKS, strict=False))
    points = {name: [Point(x=n, y=100 * y) for n, y in enumerate(ys)] for name, ys in found.items()}
    series = [Series(name=name, points=points[name], ink=inks[name]) for name in found]
    last = max(len(ys) for ys in found.values()) - 1
    chart = str(line(series, label="accuracy in % by round", x_range=(0, last), x_label="round", height=300))
    names = "".join(
        f'<text x="{70 + 130 * k}" y="330" fill="{INKS[ink]}" font-size="14">{name} {found[name][-1]:.1%}</text>'
        for k, (name, ink) in enumerate(inks.items())
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="345" font-family="sans-serif">'
        "<style>.area, .point { display: none }</style>"
        f'<rect width="640" height="345" fill="white"/>{chart}{names}</svg>\n'
    )


if __name__ == "__main__":
    set_num_threads(1)
    curves = {name: accuracies(strategy) for name, strategy in STRATEGIES.items()}
    for name, ys in curves.items():
        sys.stdout.write(f"{name:10}" + " ".join(f"{100 * y:5.1f}" for y in ys[::5]) + "\n")
    Path(sys.argv[1]).write_text(picture(curves))
