"""Which examples a rank takes at which step, exactly once an epoch or by lot, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ...protocol.errors import OperatorError
from ..job import Job
from .randomness import Keystream, derive_seed
from .ranks import Ranks


def epoch_order(job: Job, epoch: int, examples: int) -> Tensor:
    """The permutation of an epoch, (examples,) int64: the same on every rank and for every number of ranks."""
    return order_of(job.seed, job.round, job.client, epoch, examples)


def order_of(seed: int, round: int, client: str, epoch: int, examples: int) -> Tensor:
    """`epoch_order` from what it is made of."""
    generator = torch.Generator().manual_seed(derive_seed("order", seed, round, client, epoch))
    return torch.randperm(examples, generator=generator)


@dataclass(frozen=True, slots=True)
class Step:
    """A rank's part of one optimizer step.

    examples: in the whole batch, over all ranks. pieces: indices, one tensor per micro-batch.
    stand_in: the batch has fewer examples than there are ranks and this one has none. It computes the others' examples
    and counts them zero times: every rank must take part in the exchange of gradients, and not every model can be
    given an empty batch.
    """

    examples: int
    pieces: tuple[Tensor, ...]
    stand_in: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """The optimizer steps of a job on one rank: batch i is a slice of the epoch's order, rank r takes [r::world].

    done: steps that were done before; the schedule begins behind them.
    """

    job: Job
    examples: int
    ranks: Ranks
    done: int = 0

    @property
    def steps(self) -> int:
        """All of the job's, those that were done before among them."""
        return self.job.train.epochs * self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return -(-self.examples // self.job.train.batch_size)

    def __iter__(self) -> Iterator[Step]:
        train, ranks = self.job.train, self.ranks
        first, skipped = divmod(self.done, self._per_epoch)
        for epoch in range(first, train.epochs):
            batches = epoch_order(self.job, epoch, self.examples).split(train.batch_size)
            for batch in batches[skipped if epoch == first else 0 :]:
                mine = batch[ranks.rank :: ranks.world]
                stand_in = not len(mine)
                pieces = (batch if stand_in else mine).split(train.micro_batch or train.batch_size)
                yield Step(len(batch), pieces, stand_in)

    def pieces(self) -> Iterator[Tensor]:
        """The same as one stream of micro-batches, for the loader."""
        return (piece for step in self for piece in step.pieces)


@dataclass(frozen=True, slots=True)
class PoissonSchedule:
    """The steps of DP-SGD on one rank: each takes every example with probability `rate`, independently of all others.

    key: the same on all ranks and told to nobody else: who knows which examples are in a batch has no use for the
    privacy that sampling gives. An epoch is as many steps as it has batches; a batch may be empty, or larger than
    batch_size, and is cut into pieces of batch_size at most. Fields as of `Schedule`.
    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3, arXiv:1607.00133.
    """

    job: Job
    examples: int
    ranks: Ranks
    key: bytes = field(repr=False)
    done: int = 0

    @property
    def steps(self) -> int:
        return self.job.train.epochs * -(-self.examples // self.job.train.batch_size)

    @property
    def rate(self) -> float:
        return min(1.0, self.job.train.batch_size / self.examples)

    def __iter__(self) -> Iterator[Step]:
        train, ranks = self.job.train, self.ranks
        for number in range(self.done, self.steps):
            batch = self._batch(number)
            mine = batch[ranks.rank :: ranks.world]
            pieces = mine.split(train.micro_batch or train.batch_size) if len(mine) else ()
            yield Step(len(batch), pieces, stand_in=False)

    def _batch(self, number: int) -> Tensor:
        if self.job.train.batch_size >= self.examples:
            return torch.arange(self.examples)
        below = np.uint64((self.job.train.batch_size << 64) // self.examples)
        return torch.from_numpy(np.flatnonzero(Keystream(self.key, number).words(self.examples) < below))

    def pieces(self) -> Iterator[Tensor]:
        return (piece for step in self for piece in step.pieces)


def load(
    dataset: Dataset[Any],
    pieces: Iterable[Tensor],
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int = 0,
    seed: int = 0,
    pin: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """(input, target) for each tensor of indices, in order.

    Nothing is drawn from the global generator, so that the number of batches does not move dropout: torch's own
    loader takes a seed from it at each start unless it is given one.
    """
    tensors = as_tensors(dataset) if collate is None else None
    if tensors is not None:
        # The same bytes as one by one, about 20 times faster; small data sets in simulations live on this.
        kept, indices = tensors
        for piece in pieces:
            rows = piece if indices is None else indices[piece]
            yield _pair(tuple(tensor[rows] for tensor in kept))
        return
    loader = DataLoader(
        dataset,
        batch_sampler=(piece.tolist() for piece in pieces),  # pyright: ignore[reportArgumentType]: any iterable is taken
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(seed),
    )
    for batch in loader:
        yield _pair(batch)


def as_tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors that a data set consists of, and which of their rows (None: all); None for other data sets."""
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return dataset.dataset.tensors, torch.as_tensor(dataset.indices, dtype=torch.int64)
    return None


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise OperatorError(f"the task's data gives {_shape(batch)} where a pair (input, target) belongs")
    return batch[0], batch[1]


def _shape(batch: Any) -> str:
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"a {type(batch).__name__}{size}"


def move(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move(v, device) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    return value
