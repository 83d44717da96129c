"""The three models of `benchmarks.simulation`; of torch only, so that the peers' environments can import them."""

from __future__ import annotations

from torch import nn

CLASSES = 10


def cnn() -> nn.Module:
    """1,663,370 parameters: the CNN of McMahan et al. 2017, arXiv:1602.05629."""
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


def logistic() -> nn.Module:
    """7,850 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))


def mlp() -> nn.Module:
    """199,210 parameters: "2NN" of the same paper."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, CLASSES),
    )


MODELS = {"W1": cnn, "W2": logistic, "W3": mlp}
