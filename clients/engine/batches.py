"""Which examples a rank takes at which step, as an epoch's batches have them or by lot, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ...protocol.errors import OperatorError
from ..job import Job
from .drawing import Drawing, Once
from .randomness import Keystream
from .ranks import Ranks
from .sources import Sets, Stream, rows_of

LINES = 4  # micro-batches per stage of a pipeline, where nobody says: less than a fifth of the time is lost at its ends


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

    def cut_each(self, parts: Sequence[Tensor], rank: int, world: int, largest: int) -> Step:
        """Rank `rank`'s part of a batch whose parts are of several data sets: no piece has examples of two."""
        steps = [self.cut(part, rank, world, largest) for part in parts]
        pieces, real = (tuple(chain(*found)) for found in zip(*((s.pieces, s.real) for s in steps), strict=True))
        return Step(sum(s.examples for s in steps), pieces, all(s.stand_in for s in steps), real)

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
            filler = pieces[-1] if pieces else stock[:size]  # what was read last, for a stream does not go back
            return Step(len(batch), (*pieces, *[filler] * missing), not len(mine), tuple(real))
        most = ceil(largest / world)
        lines = ceil(most / self.size / self.pipeline) if self.size else min(LINES, ceil(most / self.pipeline))
        count = lines * self.pipeline
        size = ceil(most / count)
        filler = stock[-1:].expand(count * size - len(mine))
        real = tuple(min(max(len(mine) - size * number, 0), size) for number in range(count))
        return Step(len(batch), torch.cat([mine, filler]).split(size), not len(mine), real)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The optimizer steps of a job on one rank: of each batch that is drawn, rank r takes [r::world].

    drawing: by default every example once an epoch. A piece has examples of one data set only, where `sets` has
    several: what is summed up is the same, and their shapes may differ.
    done: steps that were done before; the schedule begins behind them. Where train.steps is set, the last epoch may end
    in its midst. ranks: of which number and world count; where a model is split, those that share it take the same
    examples and are one. alike: see there; with a pipeline it takes no `sets`.
    in_company: no example may be alone, because the model's BatchNorm has no variance of one. Then a batch or piece of
    one goes with the one before it, and a batch is shared by no more ranks than leave each two or more.
    """

    job: Job
    examples: int
    ranks: Ranks
    done: int = 0
    drawing: Drawing | None = None
    sets: Sets | None = None
    in_company: bool = False
    alike: Alike | None = None

    def __post_init__(self) -> None:
        if self.in_company and 1 in (self.examples, self.job.train.batch_size, self.job.train.micro_batch):
            raise OperatorError(
                "the model's BatchNorm needs two examples at a time to train, and this job has one: give it a "
                "train.batch_size and a train.micro_batch of 2 or more, and a client 2 examples, or use GroupNorm"
            )

    @property
    def steps(self) -> int:
        """All of the job's, those that were done before among them."""
        return self.job.train.steps or self.job.train.epochs * self._per_epoch

    @property
    def _drawing(self) -> Drawing:
        return self.drawing or Once(self.job, self.examples)

    @property
    def _per_epoch(self) -> int:
        alone = self.in_company and isinstance(self._drawing, Once) and self.examples % self.job.train.batch_size == 1
        return self._drawing.steps - alone

    def __iter__(self) -> Iterator[Step]:
        left = self.steps - self.done
        first, skipped = divmod(self.done, self._per_epoch)
        for epoch in count(first):
            if not left:  # before the next epoch's order is drawn
                return
            for batch in self._together(self._drawing.batches(epoch, skipped if epoch == first else 0)):
                if not left:
                    return
                left -= 1
                if self.alike is not None:
                    largest = min(self.job.train.batch_size, self.examples)
                    parts = self.sets.by_set(batch) if self.sets else [batch]
                    yield self.alike.cut_each(parts, self.ranks.rank, self.ranks.world, largest)
                    continue
                mine = self._share(batch)
                stand_in = not len(mine)
                rows = batch if stand_in else mine
                parts = self.sets.by_set(rows) if self.sets else [rows]
                pieces = tuple(p for part in parts for p in self._cut(part, self.job.train.piece))
                yield Step(len(batch), pieces, stand_in)

    def _share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch."""
        rank, sharing = self.ranks.rank, self.ranks.world
        if sharing == 1:
            return batch
        if self.in_company:
            sharing = min(sharing, len(batch) // 2)
        return batch[rank::sharing] if rank < sharing else batch[:0]

    def _together(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same, but for a lone example at an epoch's end, which goes with the batch before it."""
        held: Tensor | None = None
        for batch in batches:
            if held is not None and self.in_company and len(batch) == 1:
                batch, held = torch.cat([held, batch]), None
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held

    def _cut(self, indices: Tensor, size: int) -> tuple[Tensor, ...]:
        if len(indices) <= size:
            return (indices,)
        parts = indices.split(size)
        if self.in_company and len(parts) > 1 and len(parts[-1]) == 1:
            parts = (*parts[:-2], torch.cat(parts[-2:]))
        return parts

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
        return self.job.train.steps_over(self.examples)

    @property
    def rate(self) -> float:
        return min(1.0, self.job.train.batch_size / self.examples)

    def __iter__(self) -> Iterator[Step]:
        ranks = self.ranks
        for number in range(self.done, self.steps):
            batch = self._batch(number)
            mine = batch[ranks.rank :: ranks.world]
            pieces = mine.split(self.job.train.piece) if len(mine) else ()
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
    if isinstance(dataset, Stream):
        dataset.rewind()
    told = isinstance(dataset, Sets) and dataset.told
    rows_at_once = rows_of(dataset) if collate is None else None
    if rows_at_once is not None:
        for piece in pieces:
            pair = _pair(rows_at_once(piece))
            yield _named(dataset.name_of(piece), pair) if isinstance(dataset, Sets) and told else pair
        return
    loader = DataLoader(
        dataset,
        batch_sampler=(piece.tolist() for piece in pieces),  # pyright: ignore[reportArgumentType]: any iterable is taken
        collate_fn=_Collate(collate) if told else collate,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(seed),
    )
    for batch in loader:
        yield _pair(batch)


@dataclass(frozen=True, slots=True)
class _Collate:
    """Collates the items of one data set and says which one it is."""

    inner: Callable[[list[Any]], Any] | None

    def __call__(self, items: Any) -> tuple[Any, Any]:
        return _named(items.name, _pair((self.inner or default_collate)(items)))


def _named(name: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return (name, pair[0]), (name, pair[1])


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
