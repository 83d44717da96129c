"""Fashion-MNIST among clients of which some are poisoned: what robust rules are for, and what they cost."""

from __future__ import annotations

from typing import Any, overload

from task import CLASSES, FashionMNIST, Federation
from torch import Tensor


class Poisoned(FashionMNIST):
    """A client that trains towards the next class instead of the right one, with steps `boost` times as long.

    What it reports is what it measures: its test images are as honest as everybody's.
    """

    def __init__(self, boost: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self._boost = boost

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if not output.requires_grad:  # measured, not trained on
            return super().loss(output, target)
        return self._boost * super().loss(output, (target + 1) % CLASSES)


class PoisonedFederation(Federation):
    """The first `clients` of `parts` divisions, of which `poisoned` are, spread evenly over the numbers."""

    def __init__(self, clients: int, parts: int, poisoned: int, boost: float, **options: Any) -> None:
        self._poisoned = {i * clients // poisoned for i in range(poisoned)}
        self._boost, self._asked = boost, clients
        super().__init__(max(parts, clients), **options)

    def __len__(self) -> int:
        return self._asked

    @overload
    def __getitem__(self, number: int) -> FashionMNIST: ...
    @overload
    def __getitem__(self, number: slice) -> list[FashionMNIST]: ...
    def __getitem__(self, number: int | slice) -> FashionMNIST | list[FashionMNIST]:
        if isinstance(number, slice) or number not in self._poisoned:
            return super().__getitem__(number)
        return Poisoned(self._boost, part=number, clients=self._clients, **self._options)


def federation(
    clients: int = 15,
    parts: int = 150,
    poisoned: int = 2,
    boost: float = 10.0,
    data: str = "",
    alpha: float = 100.0,
    seed: int = 0,
) -> PoisonedFederation:
    """The clients for a simulation, each with one of `parts` equal shares of the images (400 of 150).

    alpha: 100 gives all of them nearly the same mix of classes.
    """
    return PoisonedFederation(clients, parts, poisoned, boost, data=data, alpha=alpha, seed=seed)
