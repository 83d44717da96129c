"""One pass of a version over the test data of many clients: batches are filled from client to client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..clients.engine.batches import load, move
from ..clients.task import optional
from ..protocol.errors import BadUpdate, OperatorError
from .groups import Member
from .history import Totals

ROWS = 1024  # examples in one pass; a client's own are split where it has more

Piece = tuple[Member, Any, Any]  # a client, inputs, target


def evaluate(module: nn.Module, members: Iterable[Member], metrics: tuple[str, ...], device: torch.device) -> Totals:
    """Sums and counts of the metrics that were asked for, over all that these clients have for tests.

    Each client's own task measures its examples. Raises BadUpdate for one that comes out infinite or NaN.
    """
    names = tuple(dict.fromkeys(metrics))
    counts: dict[str, float] = dict.fromkeys(names, 0.0)
    sums: dict[str, list[Tensor | float]] = {name: [] for name in names}
    module.eval()
    with torch.no_grad():
        for pieces in _filled(members):
            outputs = _outputs(module, pieces, device)
            for (m, _, target), output in zip(pieces, outputs, strict=True):
                for name, (value, count) in _measured(m, output, move(target, device), names).items():
                    sums[name].append(value)
                    counts[name] += count
    totals = {name: math.fsum(_floats(sums[name])) for name in names if counts[name] > 0}
    for name, total in totals.items():
        if not math.isfinite(total) or not math.isfinite(counts[name]):
            raise BadUpdate(f"the metric {name!r} came out as {total} over {counts[name]}", metric=name)
    return {name: (total, counts[name]) for name, total in totals.items()}


def _filled(members: Iterable[Member]) -> Iterator[list[Piece]]:
    """Pieces of about ROWS examples together, in the order of the clients."""
    pieces, rows = list[Piece](), 0
    for m in members:
        if (dataset := m.test()) is None:
            continue
        parts = torch.arange(len(dataset)).split(ROWS)  # pyright: ignore[reportArgumentType]: map-style
        loaded = load(dataset, parts, collate=optional(m.task, "collate")) if len(parts[0]) else ()
        for part, (inputs, target) in zip(parts, loaded, strict=False):
            if rows and rows + len(part) > ROWS:
                yield pieces
                pieces, rows = list[Piece](), 0
            pieces.append((m, inputs, target))
            rows += len(part)
    if pieces:
        yield pieces


def _outputs(module: nn.Module, pieces: list[Piece], device: torch.device) -> Iterable[Any]:
    """The model's output for each piece, in one pass."""
    inputs = [move(inputs, device) for _, inputs, _ in pieces]
    if len(inputs) == 1 or not all(isinstance(part, Tensor) for part in inputs):
        return [module(part) for part in inputs]
    found = module(torch.cat(inputs))
    return found.split([len(part) for part in inputs])


def _measured(m: Member, output: Any, target: Any, names: tuple[str, ...]) -> dict[str, tuple[Tensor | float, float]]:
    found: dict[str, tuple[Tensor | float, float]] = {}
    if "loss" in names:
        count = optional(m.task, "count")
        loss = m.task.loss(output, target)
        found["loss"] = loss, float(count(target) if count else len(output))
    measure = optional(m.task, "metrics")
    if measure and set(names) - {"loss"}:
        measured: Any = measure(output, target)
        for name, pair in measured.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise OperatorError("the task's metrics must be a dict of pairs: {name: (sum, count)}")
            if name in names and name != "loss":
                found[name] = pair[0], float(pair[1])
    return found


def _floats(values: list[Tensor | float]) -> list[float]:
    """Read from the device once."""
    tensors = [v.double() for v in values if isinstance(v, Tensor)]
    read = torch.stack(tensors).tolist() if tensors else []
    return read + [float(v) for v in values if not isinstance(v, Tensor)]
