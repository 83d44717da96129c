"""What a task's data(split) may give, as the engine reads it: rows by number, of one data set, several or a stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from ...protocol.errors import OperatorError
from ..task import Task, optional


def read(task: Task, split: str) -> Dataset[Any] | None:
    """The task's data of a split, with a length and rows by number; None where the site has none.

    Raises OperatorError for what is no data set, and for a stream that nobody knows the length of.
    """
    given: Any = task.data(split)
    where, told = f"the task's data({split!r})", bool(getattr(task, "mixed", False))
    if isinstance(given, Mapping):
        for name, one in given.items():
            if isinstance(one, IterableDataset) or not _has_rows(one):
                raise OperatorError(
                    f"{where} gave a {type(one).__name__} as {name!r}: only data sets with a length and an index can "
                    "be mixed. A stream comes alone"
                )
        return Sets({str(name): one for name, one in given.items()}, told=told)
    if told and given is not None:
        raise OperatorError(f"the task says mixed = True, and {where} gave a {type(given).__name__}: give a dict")
    if isinstance(given, IterableDataset) or _is_loader(given):
        workers = int(getattr(task, "workers", 0))
        if workers > 1:
            raise OperatorError(f"{where} is a stream, which one process reads in its order: set workers to 0 or 1")
        if _is_loader(given) and (workers or getattr(given, "batch_size", None) is not None):
            raise OperatorError(
                f"{where} gave a {type(given).__name__}, of which the engine takes single examples: make it with "
                "batch_size=None, give it its own num_workers, and leave the task's workers at 0"
            )
        return Stream(given, _length(task, split, given))
    if given is not None and not _has_rows(given):
        raise OperatorError(
            f"{where} gave a {type(given).__name__} without a length or an index: exact epochs need a map-style data "
            "set, a dict of such, or a torch IterableDataset whose length is known"
        )
    return given


def _has_rows(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _is_loader(value: object) -> bool:
    """Whether it reads by itself and can say where it is, as torchdata's StatefulDataLoader does."""
    return hasattr(value, "__iter__") and is_stateful(value) and not _has_rows(value)


def is_stateful(value: object) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _length(task: Task, split: str, stream: Any) -> int:
    own = optional(task, "examples")
    if own is None and not hasattr(stream, "__len__"):
        raise OperatorError(
            f"the task's data({split!r}) is a stream without a length: give the task examples(split), the number of "
            "examples that an epoch reads of it"
        )
    return int(own(split)) if own else len(stream)


class Items(list[Any]):
    """Items of one piece, with the name of the data set that they come from."""

    name = ""


class Sets(Dataset[Any]):
    """Several data sets under one numbering: all rows of the first, then those of the second, and so on.

    told: input and target of a piece come as (name, input) and (name, target).
    """

    def __init__(self, sets: Mapping[str, Dataset[Any]], *, told: bool = False) -> None:
        self.names, self.sets, self.told = tuple(sets), tuple(sets.values()), told
        self.sizes = tuple(len(one) for one in self.sets)  # pyright: ignore[reportArgumentType]: read() has checked it
        self.firsts = tuple(accumulate(self.sizes[:-1], initial=0))

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> Items:
        """The items of rows that are all of one set, as `by_set` divides them."""
        number = self.set_of(rows[0])
        one: Any = self.sets[number]
        own = [row - self.firsts[number] for row in rows]
        items = Items(one.__getitems__(own) if hasattr(one, "__getitems__") else [one[row] for row in own])
        items.name = self.names[number]
        return items

    def set_of(self, row: int) -> int:
        # An empty set begins where the next one does: the last that begins there is the one that has the row.
        return bisect_right(self.firsts, row) - 1

    def name_of(self, piece: Tensor) -> str:
        return self.names[self.set_of(int(piece[0]))]

    def by_set(self, rows: Tensor) -> list[Tensor]:
        """The rows of each set that has any, in the order they came in."""
        number = torch.bucketize(rows.contiguous(), torch.tensor(self.firsts[1:], dtype=torch.int64), right=True)
        return [rows[number == n] for n in range(len(self.sets)) if bool((number == n).any())]


class Stream(Dataset[Any]):
    """A stream as rows by position, which must be asked for in rising order: it is read forward, and once.

    Position p is example p % examples of the reading number p // examples. A data set that has `set_epoch(number)` is
    told the number before each reading, so that it can come in another order. What is held is the piece asked for.
    One with `state_dict()` and `load_state_dict(state)` is asked where it is when a training is kept, and a training
    that goes on begins there: the first `iter()` after `load_state_dict` goes on behind the last example, any other
    begins anew, as torchdata's loaders have it.
    """

    def __init__(self, source: Any, examples: int) -> None:
        self.source, self.examples = source, examples
        self._items: Iterator[Any] = iter(())
        self._next = -1  # position that the iterator gives next; -1: it was not begun
        self._held: dict[int, Any] = {}  # the last piece, by position: one that fills a batch up is asked for again
        self._resume: tuple[int, Any] | None = None  # the position to go on at, and the source's state there

    def __len__(self) -> int:
        return self.examples

    def rewind(self) -> None:
        """Begin anew at the next reading."""
        self._next, self._held = -1, {}

    def state(self) -> tuple[int, Any] | None:
        """The position that is read next, and the source's state there; None where it has none, or a reading ends."""
        return (self._next, self.source.state_dict()) if self._next > 0 and is_stateful(self.source) else None

    def resume(self, state: tuple[int, Any] | None) -> None:
        """Let the next reading begin at what `state` gave, where that is on the way to what is asked for."""
        self._resume = state

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        before, self._held = self._held, {}
        for position in positions:
            if position not in self._held:
                self._held[position] = before[position] if position in before else self._read(position)
        return [self._held[position] for position in positions]

    def _read(self, position: int) -> Any:
        """Raises OperatorError where the stream ends too early."""
        reading, wanted = divmod(position, self.examples)
        if self._next < 0 or position < self._next or reading != self._next // self.examples:
            if set_epoch := getattr(self.source, "set_epoch", None):
                set_epoch(reading)
            self._next = reading * self.examples
            (at, state), self._resume = self._resume or (-1, None), None
            if self._next < at <= position:
                self.source.load_state_dict(state)
                self._next = at
            self._items = iter(self.source)
        item: Any = None
        for at in range(self._next % self.examples, wanted + 1):
            try:
                item = next(self._items)
            except StopIteration:
                raise OperatorError(
                    f"the task's stream ended after {at} examples, and {self.examples} were promised: correct the "
                    "task's examples(split)"
                ) from None
        # At the end of a reading the next position belongs to the next one, which begins anew.
        self._next = position + 1 if wanted + 1 < self.examples else -1
        return item


def sizes(dataset: Dataset[Any]) -> tuple[int, ...]:
    """Rows of each data set under one numbering."""
    return dataset.sizes if isinstance(dataset, Sets) else (len(dataset),)  # pyright: ignore[reportArgumentType]: read() has checked it


def in_turn(dataset: Dataset[Any], size: int) -> Iterator[Tensor]:
    """All rows in batches of at most `size`, each of one data set."""
    first = 0
    for rows in sizes(dataset):
        for start in range(0, rows, size):
            yield torch.arange(first + start, first + min(start + size, rows))
        first += rows


def samples(dataset: Dataset[Any], count: int) -> list[Tensor]:
    """The first rows of each data set that has any."""
    starts = accumulate(sizes(dataset), initial=0)
    return [torch.arange(first, first + min(count, n)) for first, n in zip(starts, sizes(dataset), strict=False) if n]


def as_tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors that a data set consists of, and which of their rows (None: all); None for other data sets."""
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return dataset.dataset.tensors, torch.as_tensor(dataset.indices, dtype=torch.int64)
    return None


def rows_of(dataset: Dataset[Any]) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """What gives the tensors of some rows at once, for data sets that are tensors; None for others.

    The same bytes as one by one, about 20 times faster; small data sets in simulations live on this.
    """
    if (found := as_tensors(dataset)) is not None:
        kept, indices = found
        return lambda rows: tuple(tensor[rows if indices is None else indices[rows]] for tensor in kept)
    if isinstance(dataset, Sets):
        inner = [rows_of(one) for one in dataset.sets]
        if any(of is None for of in inner):
            return None

        def of_one_set(rows: Tensor) -> tuple[Tensor, ...]:
            number = dataset.set_of(int(rows[0]))
            of = inner[number]
            assert of is not None, "looked at above"
            return of(rows - dataset.firsts[number])

        return of_one_set
    return None


def classes(task: Task, split: str, dataset: Dataset[Any]) -> Tensor:
    """(rows,) int64: the class of each row, from the task's labels(split) or a data set's second tensor.

    Raises OperatorError where neither says it.
    """
    given: Any = own(split) if (own := optional(task, "labels")) else None
    if isinstance(dataset, Stream):
        raise OperatorError("train.balanced needs to know all classes beforehand, and the task's data is a stream")
    if isinstance(dataset, Sets):
        if given is not None and not isinstance(given, Mapping):
            raise OperatorError("the task's labels(split) must be a dict, as its data(split) is")
        parts = [
            _classes(one, None if given is None else given.get(name))
            for name, one in zip(dataset.names, dataset.sets, strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return _classes(dataset, given)


def _classes(dataset: Dataset[Any], given: Any) -> Tensor:
    rows: int = len(dataset)  # pyright: ignore[reportArgumentType]: read() has checked it
    if given is None:
        of = rows_of(dataset)
        found = of(torch.arange(rows)) if of else ()
        given = found[1] if len(found) == 2 else None
    if given is None:
        raise OperatorError("train.balanced needs the class of each example: give the task labels(split)")
    labels = torch.as_tensor(given)
    if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        raise OperatorError(
            f"train.balanced needs one whole number per example, ({rows},): the labels are "
            f"{tuple(labels.shape)}, {labels.dtype}. Give the task labels(split)"
        )
    return labels.to(torch.int64)
