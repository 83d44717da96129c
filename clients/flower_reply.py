"""What a Flower app answered, as an update, its weight and its metrics are made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..protocol.errors import OperatorError
from ..protocol.tensors import Layout

if TYPE_CHECKING:
    from flwr.app import Array, Message
    from torch import Tensor

WEIGHT = "num-examples"  # Flower's name for what a reply weighs


def measured(reply: Message, kind: str) -> tuple[int, dict[str, tuple[float, float]]]:
    """How many examples a reply is about, and its metrics as (sum, count); lists among them have no place here."""
    records = [*reply.content.metric_records.values()]
    if len(records) != 1 or WEIGHT not in records[0]:
        raise OperatorError(f"the app must answer {kind} with one MetricRecord that has {WEIGHT!r}")
    given: Any = records[0][WEIGHT]
    if isinstance(given, list) or not math.isfinite(given) or given < 0 or given != int(given):
        raise OperatorError(f"the app answered {kind} with {WEIGHT} = {given}: a whole number of examples is needed")
    values = {name: value for name, value in records[0].items() if name != WEIGHT and not isinstance(value, list)}
    return int(given), {name: (float(value) * given, float(given)) for name, value in values.items() if given}


def renamed(found: Mapping[str, tuple[float, float]], names: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Those of the metrics that have such names, under ours."""
    return {ours: found[theirs] for ours, theirs in names.items() if theirs in found}


def arrays_of(reply: Message, layout: Layout) -> dict[str, Array]:
    """The trained arrays, which are those of the model and no others; DDP's prefix is taken off."""
    records = [*reply.content.array_records.values()]
    if len(records) != 1:
        raise OperatorError(f"the app must answer train with one ArrayRecord, and not with {len(records)}")
    found, wanted = dict(records[0]), {t.name for t in layout.tensors}
    if found.keys() != wanted:
        found = {name.removeprefix("module."): array for name, array in found.items()}
    if differing := sorted(found.keys() ^ wanted):
        raise OperatorError(
            f"the app's arrays are not the model's: {differing[0]!r} is in one of them only. Arrays keep the names "
            "under which they came"
        )
    for t in layout.tensors:
        if tuple(found[t.name].shape) != t.shape:
            raise OperatorError(f"the app gave {t.name!r} as {[*found[t.name].shape]}, it came as {[*t.shape]}")
    return found


class Tensors(Mapping[str, "Tensor"]):
    """Arrays as tensors, each made when it is asked for: one at a time is held beside the reply."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Tensor:
        import torch

        return torch.from_numpy(self._arrays[name].numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
