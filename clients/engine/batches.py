"""Which examples a rank takes at which step, exactly once an epoch or by lot, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ...protocol.errors import OperatorError
from ..job import Job
from .randomness import Keystream, derive_seed
from .ranks import Ranks

LINES = 4  # micro-batches per stage of a pipeline, where nobody says: less than a fifth of the time is lost at its ends


def epoch_order(job: Job, epoch: int, examples: int) -> Tensor:
    """The permutation of an epoch, (examples,) int64: the same on every rank and for every number of ranks."""
    generator = torch.Generator().manual_seed(derive_seed("order", job.seed, job.round, job.client, epoch))
    return torch.randperm(examples, generator=generator)


@dataclass(frozen=True, slots=True)
class Step:
    """A rank's part of one optimizer step.

    examples: in the whole batch, over all ranks. pieces: indices, one tensor per micro-batch.
    stand_in: the batch has fewer examples than there are ranks and this one has none. It computes the others' examples
    and counts them zero times: every rank must take part in the exchange of gradients, and not every model can be
    given an empty batch.
    filled: where pieces were made alike on all ranks, how many examples of each count, the first ones; None: all do.
    """

    examples: int
    pieces: tuple[Tensor, ...]
    stand_in: bool
    filled: tuple[int, ...] | None = None

    @property
    def real(self) -> tuple[int, ...]:
        """How many examples of each piece count."""
        if self.filled is not None:
            return self.filled
        return tuple(0 if self.stand_in else len(piece) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Alike:
    """How batches are cut where ranks exchange something in each forward pass, and so must all run equally many.

    pipeline: stages in a line, which want a multiple of that many pieces, all of one size, in every batch; 1: no line.
    """

    pipeline: int
    size: int

    def cut(self, batch: Tensor, rank: int, world: int, largest: int) -> Step:
        """Rank `rank`'s part of a batch, filled up with examples that do not count.

        largest: examples of the largest batch there is.
        """
        mine = batch[rank::world]
        stock = mine if len(mine) else batch
        if self.pipeline == 1:
            size = self.size or largest
            pieces = [*mine.split(size)] if len(mine) else []
            missing = ceil(ceil(len(batch) / world) / size) - len(pieces)
            real = [len(piece) for piece in pieces] + [0] * missing
            return Step(len(batch), (*pieces, *[stock[:size]] * missing), not len(mine), tuple(real))
        most = ceil(largest / world)
        lines = ceil(most / self.size / self.pipeline) if self.size else min(LINES, ceil(most / self.pipeline))
        count = lines * self.pipeline
        size = ceil(most / count)
        filler = stock[:1].expand(count * size - len(mine))
        real = tuple(min(max(len(mine) - size * number, 0), size) for number in range(count))
        return Step(len(batch), torch.cat([mine, filler]).split(size), not len(mine), real)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The optimizer steps of a job on one rank: batch i is a slice of the epoch's order, rank r takes [r::world].

    done: steps that were done before; the schedule begins behind them. alike: see there. ranks: of which number and
    world count; where a model is split, those that share it take the same examples and are one.
    """

    job: Job
    examples: int
    ranks: Ranks
    done: int = 0
    alike: Alike | None = None

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
                if self.alike is not None:
                    yield self.alike.cut(batch, ranks.rank, ranks.world, len(batches[0]))
                    continue
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
    tensors = _as_tensors(dataset) if collate is None else None
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


def _as_tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
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
