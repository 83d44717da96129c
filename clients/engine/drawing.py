"""Which rows an epoch takes and in which batches: each once, by shares of groups, or as a stream gives them.

All of it follows from the job and the number of the epoch: it is the same on every rank, and a training that goes on
needs to know its step and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ..job import Job
from .randomness import derive_seed
from .sources import Sets, Stream


class Drawing(Protocol):
    """The batches of an epoch."""

    @property
    def steps(self) -> int:
        """How many there are, the same in each epoch."""
        ...

    def batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """The rows of each, over all ranks, from batch number `first` on."""
        ...


def drawing(job: Job, dataset: Dataset[Any], classes: Tensor | None) -> Drawing:
    """How the job's recipe draws from this data set. classes: (rows,), where it asks for balanced ones.

    Raises OperatorError for what the data or the job's privacy does not allow.
    """
    train = job.train
    special = "train.balanced" if train.balanced else "train.mixture" if train.mixture != type(train.mixture)() else ""
    if train.mixture != type(train.mixture)() and not isinstance(dataset, Sets):
        raise OperatorError("train.mixture is for several data sets: the task's data(split) gives one, not a dict")
    several = "a stream" if isinstance(dataset, Stream) else "several data sets" if isinstance(dataset, Sets) else ""
    if job.dp.mode == "local" and (special or several):
        raise OperatorError(
            f"local differential privacy draws every example of one data set with the same chance; {special or several}"
            " would break what is accounted for"
        )
    examples: int = len(dataset)  # pyright: ignore[reportArgumentType]: read() has checked it
    if isinstance(dataset, Stream):
        return InOrder(job, examples)
    return Mixed(job, *_groups(job, dataset, classes)) if special else Once(job, examples)


def epoch_order(job: Job, epoch: int, examples: int) -> Tensor:
    """The permutation of an epoch, (examples,) int64: the same on every rank and for every number of ranks."""
    return order_of(job.seed, job.round, job.client, epoch, examples)


def order_of(seed: int, round: int, client: str, epoch: int, examples: int) -> Tensor:
    """`epoch_order` from what it is made of."""
    return _permutation(examples, "order", seed, round, client, epoch)


def _permutation(count: int, *seed: int | str) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed)))


@dataclass(frozen=True, slots=True)
class Once:
    """Every row once an epoch, in an order of its own for each."""

    job: Job
    examples: int

    @property
    def steps(self) -> int:
        return self.job.train.batches_of(self.examples)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        size = self.job.train.batch_size
        return iter(epoch_order(self.job, epoch, self.examples)[first * size :].split(size) if self.examples else ())


@dataclass(frozen=True, slots=True)
class InOrder:
    """The positions of a stream, as it comes; readings are numbered through the rounds, as if none was left out."""

    job: Job
    examples: int

    @property
    def steps(self) -> int:
        return self.job.train.batches_of(self.examples)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        train, size = self.job.train, self.job.train.batch_size
        readings = -(-train.steps // self.steps) if train.steps else train.epochs
        begin = (max(0, self.job.round - 1) * readings + epoch) * self.examples
        for start in range(first * size, self.examples, size):
            yield torch.arange(begin + start, begin + min(start + size, self.examples))


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are drawn alike: `share` of all that is drawn, in the batches of data set number `of`."""

    rows: Tensor
    share: float
    of: int


@dataclass(frozen=True, slots=True)
class Mixed:
    """As many rows an epoch as there are, of each group its share to the nearest whole number.

    A group's rows come without replacement until all of them were there, then in another order: with a share above
    its part of the rows it is gone through more than once in an epoch, with a lesser one the next epoch goes on where
    this one ended. sizes: of the batches of each data set where they take turns, else empty.
    """

    job: Job
    groups: tuple[Group, ...]
    sizes: tuple[int, ...] = ()

    @property
    def quotas(self) -> list[int]:
        return apportion([g.share for g in self.groups], sum(len(g.rows) for g in self.groups))

    @property
    def steps(self) -> int:
        if not self.sizes:
            return -(-sum(self.quotas) // self.job.train.batch_size)
        return sum(-(-drawn // size) for drawn, size in zip(self._by_set(self.quotas), self.sizes, strict=True))

    def batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        drawn = [self._drawn(number, epoch, quota) for number, quota in enumerate(self.quotas)]
        if not self.sizes:
            rows = torch.cat(drawn)
            size = self.job.train.batch_size
            return iter(rows[epoch_order(self.job, epoch, len(rows))][first * size :].split(size))
        turns: list[tuple[Fraction, int, Tensor]] = []
        for of, size in enumerate(self.sizes):
            rows = torch.cat([d for d, g in zip(drawn, self.groups, strict=True) if g.of == of] or [torch.zeros(0)])
            if len(rows):
                mixed = rows[_permutation(len(rows), "set", self.job.seed, self.job.round, self.job.client, of, epoch)]
                batches = mixed.split(size)
                turns += [(Fraction(2 * k + 1, 2 * len(batches)), of, batch) for k, batch in enumerate(batches)]
        return (batch for _, _, batch in sorted(turns, key=lambda turn: turn[:2])[first:])

    def _drawn(self, number: int, epoch: int, quota: int) -> Tensor:
        """The group's rows number epoch * quota and on, in an endless row of permutations."""
        rows, start = self.groups[number].rows, epoch * quota
        cycles = range(start // len(rows), -(-(start + quota) // len(rows)))
        seed = "group", self.job.seed, self.job.round, self.job.client, number
        found = [rows[_permutation(len(rows), *seed, cycle)] for cycle in cycles]
        return torch.cat(found)[start % len(rows) :][:quota] if quota else rows[:0]

    def _by_set(self, quotas: Sequence[int]) -> list[int]:
        return [sum(q for q, g in zip(quotas, self.groups, strict=True) if g.of == of) for of in range(len(self.sizes))]


def _groups(job: Job, dataset: Dataset[Any], classes: Tensor | None) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """What `Mixed` draws from: the classes of each data set, or the data sets; with it, the sizes of their batches."""
    mixture = job.train.mixture
    if not isinstance(dataset, Sets):
        assert classes is not None, "one data set is special by its classes only"
        return _by_class(torch.arange(len(classes)), classes, 1.0, 0), ()
    present = [number for number, size in enumerate(dataset.sizes) if size]
    for table, values in (("weights", mixture.weights), ("batch_sizes", mixture.batch_sizes)):
        if values and (missing := [dataset.names[n] for n in present if dataset.names[n] not in values]):
            raise OperatorError(f"train.mixture.{table} leaves out {missing[0]!r}, a data set of this site")
    groups: list[Group] = []
    for number in present:
        name, size = dataset.names[number], dataset.sizes[number]
        share = mixture.weights[name] if mixture.weights else size ** (1 / mixture.temperature)
        rows = torch.arange(dataset.firsts[number], dataset.firsts[number] + size)
        groups += _by_class(rows, classes, share, number) if classes is not None else [Group(rows, share, number)]
    if mixture.mode == "mixed":
        return tuple(groups), ()
    return tuple(groups), tuple(mixture.batch_sizes.get(name, job.train.batch_size) for name in dataset.names)


def _by_class(rows: Tensor, classes: Tensor, share: float, of: int) -> tuple[Group, ...]:
    here = classes[rows]
    kinds = here.unique().tolist()
    return tuple(Group(rows[here == kind], share / len(kinds), of) for kind in kinds)


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the shares that add up to `total`, each less than 1 off."""
    bounds = [Fraction(0)]
    for share in shares:
        bounds.append(bounds[-1] + Fraction(share))
    cuts = [round(total * bound / bounds[-1]) for bound in bounds]
    return [end - start for start, end in pairwise(cuts)]
