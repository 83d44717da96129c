"""Clients from what Hugging Face `datasets` and `flwr-datasets` give: their data sets, told by what they can do.

Neither package is imported here, so neither has to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..protocol.errors import OperatorError
from .federation import Federation
from .partitioning import Partition, by_group

Array = np.ndarray[Any, Any]
Loss = Callable[[Any, Tensor], Tensor]


def from_huggingface(
    source: Any,
    model: Callable[[], nn.Module],
    *,
    features: str | Sequence[str],
    label: str,
    transform: Callable[[Array], Any] | None = None,
    loss: Loss | None = None,
    metrics: Callable[[Any, Tensor], Mapping[str, tuple[Any, Any]]] | None = None,
    by: str | Partition | None = None,
    split: str = "train",
    test: float = 0.0,
    seed: int = 0,
) -> Federation:
    """Clients whose tasks have these data, for `simulate`; a client's columns are read when it is first asked.

    source: a `datasets.Dataset` with `by`; a mapping of clients' names to data sets, or to dicts of them with "train"
        and perhaps "test", or a sequence of either; a partitioner of flwr-datasets, or a `FederatedDataset` of it, of
        which `split` is taken.
    model: makes the module that all clients train.
    features: the column that goes into the model, or several columns of numbers, side by side as float32 (N, F).
    transform: of the features' array (N, …) to a tensor or an array. Without it images, which come as
        bytes, become float32 in 0 .. 1, other whole numbers int64 (tokens), the rest float32.
    label: the column of targets: class numbers, or float32 numbers.
    loss: the SUM over the batch, by default cross entropy, then with the metric "accuracy".
    metrics: of (output, target), pairs {name: (sum, count)}.
    by: the column whose every value is a client (writer, hospital), or a `Partition` of `partitioning`.
    test: the share of each client's examples that it keeps for tests, drawn by `seed`.
    Raises OperatorError, which says what to change: here for the source, at a client's first turn for its columns.
    """
    if not 0 <= test < 1:
        raise OperatorError(f"test = {test:g}: a share of each client's examples, from 0 to below 1")
    wanted = (features,) if isinstance(features, str) else tuple(features)
    if loss is None:
        loss, metrics = _cross_entropy, metrics or _accuracy
    common = partial(
        _Columns, features=wanted, label=label, model=model, loss=loss, metrics=metrics, transform=transform, test=test,
        seed=seed,
    )  # fmt: skip
    loads = _clients(source, by, split)
    tasks: dict[str, Callable[[], Any]] = {name: partial(common, name=name, load=load) for name, load in loads}
    return Federation(tasks)


def _clients(source: Any, by: str | Partition | None, split: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each client's name, and what gives its data set."""
    if _is_dataset(source):
        yield from _divided(source, by)
        return
    if by is not None:
        raise OperatorError("by divides one data set, and this source is divided already: leave it out")
    if isinstance(source, Mapping):
        given = cast(Mapping[str, Any], source)
        if given.keys() <= {"train", "test", "validation"}:
            raise OperatorError('this is one data set in splits: give source["train"], and by= to divide it')
        yield from zip(_named(given), (partial(given.__getitem__, key) for key in given), strict=True)
        return
    if not hasattr(source, "load_partition"):
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise OperatorError(
                f"a {type(source).__name__} is no data set, partitioner, mapping or sequence of data sets; "
                "a streamed one has to be read first"
            )
        yield from zip(
            _numbered(len(source)), (partial(source.__getitem__, n) for n in range(len(source))), strict=True
        )
        return
    load, partitioner = source.load_partition, source
    if (each := getattr(source, "partitioners", None)) is not None:
        if split not in each:
            raise OperatorError(f"the data set is divided in {', '.join(each) or 'no split'}, not in {split!r}")
        load, partitioner = partial(load, split=split), each[split]
    count = int(partitioner.num_partitions)
    ids = getattr(partitioner, "partition_id_to_natural_id", None) or {}
    names = _named([ids[n] for n in range(count)]) if ids else _numbered(count)
    yield from zip(names, (partial(load, n) for n in range(count)), strict=True)


def _divided(dataset: Any, by: str | Partition | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    if by is None:
        raise OperatorError("one data set is one client: give by, a column with the clients or a Partition")
    if isinstance(by, str):
        column = _read(dataset, (by,))[by]
        if column.dtype == object and any(value is None for value in column):
            raise OperatorError(f"column {by!r} has rows without a value, which belong to no client: filter them out")
        by = by_group(column)
    names = _named(by.names) if by.names else _numbered(len(by))
    yield from zip(names, (partial(dataset.select, part) for part in by.parts), strict=True)


@dataclass(kw_only=True)
class _Columns:
    """A task over one client's columns; they are read when one of its splits is first asked for."""

    name: str
    load: Callable[[], Any]
    features: tuple[str, ...]
    label: str
    model: Callable[[], nn.Module]
    loss: Loss
    metrics: Any
    transform: Callable[[Array], Any] | None
    test: float
    seed: int

    def data(self, split: str) -> TensorDataset | None:
        return self._splits.get(split)

    @cached_property
    def _splits(self) -> dict[str, TensorDataset]:
        try:
            given = self.load()
            if isinstance(given, Mapping):
                return self._ready(cast(Mapping[str, Any], given))
            if not _is_dataset(given):
                raise OperatorError(f"a {type(given).__name__} is no data set")
            whole = self._tensors(given)
        except OperatorError as error:
            raise OperatorError(f"{self.name}: {error}") from None
        kept = round(self.test * len(whole))
        if not kept:
            return {"train": whole}
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(whole)))
        tests, trains = (part.sort().values for part in (order[:kept], order[kept:]))
        return {"train": TensorDataset(*whole[trains]), "test": TensorDataset(*whole[tests])}

    def _ready(self, given: Mapping[str, Any]) -> dict[str, TensorDataset]:
        if "train" not in given:
            raise OperatorError(f"its splits are {', '.join(given)}: one has to be 'train'")
        if self.test and "test" in given:
            raise OperatorError("it has a split 'test' already: leave test= out")
        return {split: self._tensors(given[split]) for split in ("train", "test") if split in given}

    def _tensors(self, dataset: Any) -> TensorDataset:
        columns = _read(dataset, (*self.features, self.label))
        for name, values in columns.items():
            if values.dtype.kind not in "biuf" and not (self.transform and name != self.label):
                raise OperatorError(f"column {name!r} {_what_is_wrong(values)}")
        parts = [columns[name] for name in self.features]
        held = parts[0] if len(parts) == 1 else np.stack(parts, 1).astype(np.float32)
        inputs = torch.as_tensor(self.transform(held)) if self.transform else _plain(held)
        targets = torch.from_numpy(np.array(columns[self.label]))
        if len(inputs) != len(targets):
            raise OperatorError(f"transform made {len(inputs)} inputs of {len(targets)} rows")
        if targets.is_floating_point() and not targets.isfinite().all():
            raise OperatorError(f"column {self.label!r} has rows without a value: filter them out")
        return TensorDataset(inputs, targets.float() if targets.is_floating_point() else targets.long())


def _read(dataset: Any, names: tuple[str, ...]) -> dict[str, Array]:
    if missing := [name for name in names if name not in dataset.column_names]:
        raise OperatorError(f"there is no column {missing[0]!r}; there are {', '.join(dataset.column_names)}")
    rows = dataset.select_columns(list(dict.fromkeys(names))).with_format("numpy")[:]
    return {name: np.asarray(rows[name]) for name in names}


def _plain(values: Array) -> Tensor:
    tensor = torch.from_numpy(np.array(values))
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _what_is_wrong(values: Array) -> str:
    if values.dtype.kind in "US":
        return "holds text: make numbers of it first, as class_encode_column or a tokenizer does, or by transform"
    return "has rows of different shapes, or without a value: pad, crop or filter them first, or by transform"


def _is_dataset(value: Any) -> bool:
    return not isinstance(value, Mapping) and hasattr(value, "column_names") and hasattr(value, "select_columns")


def _numbered(count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"client-{n:0{width}d}" for n in range(count)]


def _named(values: Any) -> list[str]:
    """Clients' names, as the coordinator takes them, from any values; they have to stay apart."""
    names: dict[str, Any] = {}
    for value in values:
        name = re.sub(r"[^a-z0-9_.-]", "-", str(value).lower()).lstrip("_.-")[:64]
        if not name:
            raise OperatorError(f"{value!r} leaves no name for a client, of letters, digits, '.', '-' and '_'")
        if name in names:
            raise OperatorError(f"{names[name]!r} and {value!r} would both be the client {name!r}: rename one")
        names[name] = value
    return list(names)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="sum")


def _accuracy(output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
    return {"accuracy": ((output.argmax(-1) == target).sum(), target.numel())}
