"""A small network that learns Fashion-MNIST from a released version of the large one: distillation, federated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from task import CLASSES, FashionMNIST
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from murmur.protocol.errors import OperatorError

BATCH = 1024  # images that the teacher looks at together


class Student(FashionMNIST):
    """A `murmur.Task` with an eighth of the channels, taught by a version of `FashionMNIST` that every client has.

    teacher: the version's file. temperature, weight: of the teacher's part in the loss; with weight 0 it has none.
    Other options as of `FashionMNIST`. The teacher looks at a client's images once, and what it says is their target:
    (11,) float32, its logits and then the image's class.
    """

    def __init__(self, teacher: str, temperature: float = 3.0, weight: float = 0.9, **options: Any) -> None:
        super().__init__(**options)
        if not temperature > 0 or not 0 <= weight <= 1:
            raise OperatorError(f"temperature = {temperature:g} is above 0, and weight = {weight:g} is 0 to 1")
        self._teacher = super().model().eval()
        self._teacher.load_state_dict(load_file(teacher))
        self._temperature, self._weight = temperature, weight

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, CLASSES),
        )

    @torch.no_grad()
    def data(self, split: str) -> TensorDataset | None:  # pyright: ignore[reportIncompatibleMethodOverride]: a Subset there
        found: Subset[Any] | None = super().data(split)
        if found is None:
            return None
        images, classes = (tensor[torch.as_tensor(found.indices)] for tensor in found.dataset.tensors)  # pyright: ignore[reportAttributeAccessIssue]: of a TensorDataset
        said = torch.cat([self._teacher(batch) for batch in images.split(BATCH)])
        return TensorDataset(images, torch.cat([said, classes[:, None].float()], 1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum over the batch of (1 - w) cross entropy + w T² KL(teacher, student at temperature T).

        Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
        """
        said, wanted = target[:, :CLASSES] / self._temperature, target[:, CLASSES].long()
        hard = nn.functional.cross_entropy(output, wanted, reduction="sum")
        soft = nn.functional.kl_div(
            (output / self._temperature).log_softmax(1), said.log_softmax(1), reduction="sum", log_target=True
        )
        return (1 - self._weight) * hard + self._weight * self._temperature**2 * soft

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return super().metrics(output, target[:, CLASSES].long())


def federation(clients: int = 10, **options: Any) -> list[Callable[[], Student]]:
    """The clients for a simulation; options as of `Student`."""
    return [partial(Student, part=number, clients=clients, **options) for number in range(clients)]
