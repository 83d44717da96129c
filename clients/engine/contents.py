"""What a site's data look like: shapes, dtypes, labels and what is not finite, without a value of theirs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ...protocol.errors import OperatorError
from ..contract import Contract, Shape
from .batches import load

MANY_LABELS = 100  # different whole numbers: more are a quantity, whose values are nobody's business
SHOWN = 5  # examples that are named by their number
LOOK_S = 20.0  # that is spent on one split where each example is loaded by itself


@dataclass
class Side:
    """The inputs, or the targets, of the examples that were looked at."""

    kinds: Counter[tuple[str, str, tuple[int, ...]]] = field(default_factory=Counter)  # path, dtype, shape
    not_finite: list[int] = field(default_factory=list[int])
    labels: set[Any] | None = field(default_factory=set[Any])  # None: they are no labels
    words: bool = False

    @property
    def shapes(self) -> set[tuple[str, str, tuple[int, ...]]]:
        return set(self.kinds)

    def described(self) -> str:
        """float32[8], or one such for each part."""
        if len(self.kinds) > 4:
            return f"{len(self.kinds)} different shapes"
        parts = (f"{path}{dtype}[{', '.join(map(str, shape))}]" for path, dtype, shape in sorted(self.kinds))
        return ", ".join(parts) or "nothing"


@dataclass
class Contents:
    """A split of which `seen` examples were looked at, evenly spread over all `examples`."""

    examples: int
    indices: list[int] = field(default_factory=list[int])
    inputs: Side = field(default_factory=Side)
    targets: Side = field(default_factory=Side)
    outside: dict[str, list[int]] = field(default_factory=dict[str, list[int]])  # what the contract does not allow

    @property
    def seen(self) -> int:
        return len(self.indices)


def look(dataset: Dataset[Any], limit: int, contract: Contract | None) -> Contents:
    """Look at up to `limit` examples; at all of them, and quickly, where the data set is tensors."""
    examples: int = len(dataset)  # pyright: ignore[reportArgumentType]: data() has checked it
    found = Contents(examples)
    for indices, inputs, target in _pieces(dataset, examples, limit):
        found.indices += indices
        _note(found.inputs, indices, inputs, labels=False)
        _note(found.targets, indices, target, labels=True)
        if contract:
            _compare(found, indices, inputs, target, contract)
    return found


def numbered(indices: Sequence[int]) -> str:
    """How many examples, and the numbers of the first."""
    first = ", ".join(map(str, indices[:SHOWN]))
    return f"{len(indices)} example{'s' * (len(indices) > 1)} (number {first}{', …' if len(indices) > SHOWN else ''})"


def _pieces(dataset: Dataset[Any], examples: int, limit: int) -> Generator[tuple[list[int], Any, Any]]:
    """(numbers, inputs, targets), whose tensors have the examples as their first dimension."""
    inner = dataset.dataset if type(dataset) is Subset else dataset
    if type(inner) is TensorDataset:
        pieces = torch.arange(examples).split(8192)
        for piece, (inputs, target) in zip(pieces, load(dataset, pieces), strict=True):
            yield piece.tolist(), inputs, target
        return
    until = monotonic() + LOOK_S
    for index in dict.fromkeys(np.linspace(0, examples - 1, min(limit, examples)).astype(int).tolist()):
        item: Any = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            kind = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
            raise OperatorError(f"example {index} is {kind} where a pair (input, target) belongs")
        yield [index], _lifted(item[0]), _lifted(item[1])
        if monotonic() > until:
            return


def _lifted(value: Any) -> Any:
    """One example as a batch of one."""
    if isinstance(value, Tensor):
        return value[None]
    if isinstance(value, np.ndarray | np.generic | int | float | bool):
        return torch.as_tensor(value)[None]
    if isinstance(value, Mapping):
        return {key: _lifted(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_lifted(v) for v in value)
    return [value]


def _leaves(value: Any, path: str = "") -> Generator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}{key} ")
    elif isinstance(value, tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}{number} ")
    else:
        yield path, value


def _note(side: Side, indices: list[int], value: Any, *, labels: bool) -> None:
    for path, leaf in _leaves(value):
        if not isinstance(leaf, Tensor):
            side.words = side.words or isinstance(leaf[0], str)
            side.kinds[path, type(leaf[0]).__name__, ()] += 1
            if labels and side.labels is not None and isinstance(leaf[0], str):
                side.labels.update(leaf)
            continue
        side.kinds[path, str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape[1:])] += len(leaf)
        if leaf.is_floating_point() and (broken := _rows(~leaf.isfinite())):
            side.not_finite += [indices[row] for row in broken]
        if labels and side.labels is not None:
            whole = not leaf.is_floating_point() or bool((leaf == leaf.round()).all())
            side.labels = side.labels | set(leaf.unique().tolist()) if whole and leaf.ndim <= 1 else None
    if side.labels is not None and len(side.labels) > MANY_LABELS:
        side.labels = None


def _compare(found: Contents, indices: list[int], inputs: Any, target: Any, contract: Contract) -> None:
    """Note the examples that the contract does not allow, by what is wrong with them."""

    def note(what: str, rows: Sequence[int]) -> None:
        if len(rows):
            found.outside.setdefault(what, []).extend(indices[row] for row in rows)

    everyone = range(len(indices))
    sides = (("input", inputs, contract.input_shape, contract.input_dtype),
             ("target", target, contract.target_shape, contract.target_dtype))  # fmt: skip
    for name, value, shape, dtype in sides:
        if (shape is not None or dtype) and not isinstance(value, Tensor):
            note(f"{name}: a {type(value).__name__}, the contract says a tensor", everyone)
            continue
        if shape is not None and not _fits(tuple(value.shape[1:]), shape):
            note(f"{name}: shape {list(value.shape[1:])}, the contract says {list(shape)}", everyone)
        if dtype and str(value.dtype) != f"torch.{dtype}":
            note(f"{name}: {str(value.dtype).removeprefix('torch.')}, the contract says {dtype}", everyone)
    if contract.labels and isinstance(target, Tensor):
        allowed = torch.tensor(contract.labels, dtype=torch.float64)
        note("target: not one of the contract's labels", _rows(~torch.isin(target.double(), allowed)))
    elif contract.labels:
        note("target: not one of the contract's labels", [r for r in everyone if target[r] not in contract.labels])
    if contract.columns and (not isinstance(inputs, Tensor) or inputs.shape[-1:] != (len(contract.columns),)):
        note(f"input: not the contract's {len(contract.columns)} columns", everyone)
        return
    for name, (low, high) in contract.ranges.items():
        value = target if name == "target" else inputs if name == "input" else inputs[..., contract.columns.index(name)]
        if isinstance(value, Tensor):
            inside = (value >= (-math.inf if low is None else low)) & (value <= (math.inf if high is None else high))
            note(f"{name}: outside [{low}, {high}]", _rows(~inside & ~value.isnan()))


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))


def _rows(mask: Tensor) -> list[int]:
    """The examples of which anything is true."""
    return mask.reshape(len(mask), -1).any(1).nonzero().flatten().tolist()
