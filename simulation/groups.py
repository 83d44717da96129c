"""Which examples each client of a group takes at which step, and their data side by side.

K = clients of a group, most steps first; A = those that still train; S = steps; B = batch; N = examples of the largest
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..clients.engine.drawing import order_of
from ..clients.engine.parts import local_of
from ..clients.engine.sources import as_tensors
from ..clients.task import Task, optional
from ..protocol.sections import Train
from .cohorts import Unsuited


@dataclass(kw_only=True, slots=True)
class Member:
    """A client as the vectorized backend knows it, with its training data as tensors.

    size: examples. rows: of the tensors, None for all. gram: products of its inputs with each other, kept where they
    are needed.
    agreed: its loss over its own examples was compared with the cohort's loss over all.
    """

    name: str
    task: Task
    inputs: Tensor
    targets: Tensor
    rows: Tensor | None
    size: int
    gram: Tensor | None = None
    agreed: bool = False
    tests: list[Dataset[Any] | None] = field(default_factory=list[Dataset[Any] | None])

    def __len__(self) -> int:
        return self.size

    def given(self) -> Tensor:
        """(N, …), its training inputs; a copy where they are a part of a tensor."""
        return self.inputs if self.rows is None else self.inputs[self.rows]

    @property
    def nbytes(self) -> int:
        """Of its training inputs."""
        return len(self) * self.inputs[0].numel() * self.inputs.element_size()

    def test(self) -> Dataset[Any] | None:
        if not self.tests:
            given = self.task.data("test")
            if isinstance(given, Mapping):
                raise Unsuited(f"the test data of {self.name} are several data sets")
            self.tests.append(given)
        return self.tests[0]


def member(name: str, task: Task, device: torch.device) -> Member:
    """A client with its data, which lie on the device from then on; raises Unsuited where they are not tensors."""
    for own, why in (
        (optional(task, "collate"), "collates its batches itself"),
        (optional(task, "work"), "does its work itself"),
        (optional(task, "train"), "trains by itself"),
        (local_of(task), "has parts that stay at the site"),
    ):
        if own:
            raise Unsuited(f"the task {why}")
    dataset = task.data("train")
    found = as_tensors(dataset) if isinstance(dataset, Dataset) else None
    if found is None:
        raise Unsuited(f"the data of {name} is a {type(dataset).__name__}, no TensorDataset or Subset of one")
    tensors, rows = found
    if len(tensors) != 2:
        raise Unsuited(f"the data of {name} has {len(tensors)} tensors where (input, target) belongs")
    if rows is not None and device.type != "cpu":
        tensors, rows = tuple(t[rows] for t in tensors), None
    inputs, targets = (t.to(device) for t in tensors)
    size = len(inputs) if rows is None else len(rows)
    if not size:
        raise Unsuited(f"{name} has nothing to train on")
    return Member(name=name, task=task, inputs=inputs, targets=targets, rows=rows, size=size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step of the clients that take it, which are the first `active` of the group.

    at_R: (active · B,) int64, where the examples lie among the group's K · N; short batches repeat an example.
    sizes: examples of each client's batch. valid: which of the active · B are examples, None: all.
    """

    active: int
    at_R: Tensor
    sizes: tuple[int, ...]
    valid: Tensor | None


class Group:
    """Clients that are trained together in one round.

    inputs_KN, targets_KN: their examples as stored, each client's padded to N with zeros; inputs_KN when it is asked.
    """

    def __init__(
        self, members: Sequence[Member], train: Train, *, seed: int, round: int, buffers: Buffers, device: torch.device
    ) -> None:
        self.members = sorted(members, key=lambda m: -_steps(len(m), train))
        self.sizes = [len(m) for m in self.members]
        self.device, self.round, self._train = device, round, train
        self.steps_K = [_steps(size, train) for size in self.sizes]
        self._even = len(set(self.sizes)) == 1 and not self.sizes[0] % train.batch_size
        self._positions_KSB = self._positions(seed, round).to(device)
        self.agreed = all(m.agreed for m in self.members)
        self._buffers = buffers
        self.targets_KN = self._gather("targets")
        self._inputs_KN: Tensor | None = None

    @property
    def inputs_KN(self) -> Tensor:
        if self._inputs_KN is None:
            self._inputs_KN = self._gather("inputs")
        return self._inputs_KN

    @property
    def blocks(self) -> list[tuple[slice, Tensor]]:
        """All examples in few tensors, with where each lies among the K · N: on a CPU clients' own ones, not a copy."""
        n = max(self.sizes)
        if self.device.type != "cpu":
            return [(slice(0, len(self.members) * n), self.inputs_KN.flatten(0, 1))]
        apart = all(m.rows is None for m in self.members)
        given_K = [m.inputs for m in self.members] if apart else self.inputs_KN
        return [(slice(k * n, k * n + size), given_K[k][:size]) for k, size in enumerate(self.sizes)]

    def _gather(self, which: Literal["inputs", "targets"]) -> Tensor:
        """(K, N, …), padded with zeros."""
        parts = [(m.inputs if which == "inputs" else m.targets, m.rows) for m in self.members]
        shape, dtype = (len(parts), max(self.sizes), *parts[0][0].shape[1:]), parts[0][0].dtype
        into_KN = self._buffers.take(which, shape, dtype)
        _gather(parts, into_KN)
        return into_KN

    @staticmethod
    def shape(examples: int, train: Train) -> tuple[int, int]:
        """Steps of a client with so many examples, and examples in the longest of them."""
        return _steps(examples, train), min(train.batch_size, examples)

    def _positions(self, seed: int, round: int) -> Tensor:
        """(K, S, B), where the examples of each step lie; 0 of a client's own fill up what is short."""
        batch, largest = self._train.batch_size, max(self.sizes)
        width = min(batch, largest)
        epochs = range(self._train.epochs)
        names = [m.name for m in self.members]
        if self._even:
            orders = [order_of(seed, round, name, epoch, largest) for name in names for epoch in epochs]
            found_KP = torch.stack(orders).view(len(names), -1)
        else:
            found_KP = torch.zeros(len(names), self.steps_K[0] * width, dtype=torch.int64)
            for row_P, name, size in zip(found_KP.numpy(), names, self.sizes, strict=True):
                per_epoch = -(-size // batch) * width
                for epoch in epochs:
                    order = order_of(seed, round, name, epoch, size)
                    row_P[epoch * per_epoch : epoch * per_epoch + size] = order.numpy()
        found_KP += torch.arange(0, len(names) * largest, largest)[:, None]
        return found_KP.view(len(names), -1, width)

    def __iter__(self) -> Iterator[Step]:
        for number in range(self.steps_K[0]):
            active = sum(steps > number for steps in self.steps_K)
            at_AB = self._positions_KSB[:active, number]
            if self._even:
                sizes = (self._train.batch_size,) * active
            else:
                sizes = tuple(self._batch(k, number) for k in range(active))
            width, valid = max(sizes), None
            if min(sizes) < width:
                valid = (torch.arange(width) < torch.tensor(sizes)[:, None]).reshape(-1).nonzero().squeeze(1)
                valid = valid.to(self.device, non_blocking=True)
            yield Step(active=active, at_R=at_AB[:, :width].reshape(-1), sizes=sizes, valid=valid)

    def _batch(self, k: int, number: int) -> int:
        """Examples in the batch of a client's step."""
        batch = self._train.batch_size
        return min(batch, self.sizes[k] - number % -(-self.sizes[k] // batch) * batch)


class Buffers:
    """Memory that is taken once and used again: fresh pages cost as much as filling them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any contents; it is the same memory as the last one of this name."""
        size = torch.Size(shape).numel()
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            self._kept.pop(name, None)
            kept = self._kept[name] = torch.zeros(size, dtype=dtype, device=self._device)
        return kept[:size].view(shape)


def _steps(examples: int, train: Train) -> int:
    return train.epochs * -(-examples // train.batch_size)


def _gather(parts: list[tuple[Tensor, Tensor | None]], into_KN: Tensor) -> None:
    whole = all(rows is None and len(tensor) == into_KN.shape[1] for tensor, rows in parts)
    if whole and into_KN.device == parts[0][0].device:
        torch.stack([tensor for tensor, _ in parts], out=into_KN)
        return
    for k, (tensor, rows) in enumerate(parts):
        found = tensor if rows is None else tensor[rows]
        into_KN[k, : len(found)] = found
        into_KN[k, len(found) :] = 0
