"""From what a trainer gave to what is delivered: weight, metrics, and the update's numbers in the order of its file.

D = elements of all floating-point tensors, I = elements of all integer tensors
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..privacy.dp.mechanisms import Noise, check_model, clip_factor, l2_norm
from ..privacy.dp.plan import round_encoding
from ..privacy.dp.ring import DpQuantizer
from ..privacy.fixed_point import Encoder, count_clipped
from ..privacy.terms import block_of, context_of
from ..protocol.errors import BadUpdate
from ..protocol.messages import LOCAL_STEPS, Assignment, Kind, SecureTerms, Total
from ..protocol.tensors import DTYPES, FLOATS, Layout, check_file, map_file, masked_layout, write_chunks
from .job import Result

_PIECE = 1 << 18  # elements read at a time; read and not mapped, for mapped pages stay in the process's memory


def weight_of(assignment: Assignment, result: Result) -> int:
    """How much the update weighs in the sum; an evaluation has no update, so it weighs nothing."""
    if assignment.kind is Kind.EVALUATE:
        return 0
    if assignment.weighting == "uniform":
        return 1
    return min(result.examples, assignment.max_weight)


def metrics_of(assignment: Assignment, result: Result) -> dict[str, Total]:
    """The metrics that were asked for and no others; one that is not finite raises BadUpdate."""
    found: dict[str, Total] = {}
    given = dict(result.metrics)
    if result.effective_steps:  # the server needs their mean by weight
        weight = weight_of(assignment, result)
        given[LOCAL_STEPS] = (weight * result.effective_steps, weight)
    for name in assignment.reported:
        if name in given:
            total, count = given[name]
            if not (math.isfinite(total) and math.isfinite(count) and count >= 0):
                raise BadUpdate(f"the metric {name!r} came out as {total} over {count}", metric=name)
            found[name] = Total(sum=total, count=count)
    return found


def check_update(update: Path, layout: Layout) -> None:
    """Raise BadUpdate unless the file is an update to a model of this layout with finite numbers only."""
    position = 0
    for values in float_pieces(update, layout):
        largest = max(-values.min(), values.max())  # NaN anywhere makes both of them NaN
        if not math.isfinite(largest):
            element = position + int(np.argmin(np.isfinite(values)))
            value, name = values[element - position], _tensor_at(layout, element)
            raise BadUpdate(f"element {element} of the update is {value}, in the tensor {name}: training diverged")
        position += len(values)


def _tensor_at(layout: Layout, element: int) -> str:
    """The name of the floating-point tensor that holds this element of the update."""
    for t in layout.update().tensors:
        if t.dtype in FLOATS:
            if element < t.numel:
                return t.name
            element -= t.numel
    raise AssertionError(f"element {element} lies behind the update")


def float_pieces(update: Path, layout: Layout) -> Iterator[np.ndarray[Any, Any]]:
    """The update's floating-point tensors, flat and in pieces: D elements together, in the order of the update's file.

    layout: the model's. Each piece is an array of its own. Raises BadUpdate when the file is not an update to such a
    model.
    """
    wire = layout.update()
    check_file(update, wire)
    with update.open("rb", buffering=0) as file:
        file.seek(len(wire.header()))
        for dtype, tensors in groupby(wire.tensors, lambda t: t.dtype):  # of one dtype they lie side by side
            left = sum(t.numel for t in tensors)
            if dtype not in FLOATS:
                file.seek(left * DTYPES[dtype].itemsize, os.SEEK_CUR)
                continue
            while left:
                values = np.fromfile(file, DTYPES[dtype], min(_PIECE, left))
                if not len(values):
                    raise BadUpdate(f"the update ends {left} elements too early")
                yield values
                left -= len(values)


def weighted_integers(update: Path, layout: Layout, weight: int) -> np.ndarray[Any, Any]:
    """The update's integer tensors times the weight, (I,) int64, in the order of the update's file.

    Raises BadUpdate for a product that does not fit into 64 bits.
    """
    wire = layout.update()
    check_file(update, wire)
    arrays = map_file(update, wire)
    flat = [arrays[t.name].reshape(-1) for t in wire.tensors if t.dtype not in FLOATS]
    values_I = np.concatenate(flat) if flat else np.zeros(0, np.int64)
    if weight and len(values_I):
        limit = ((1 << 63) - 1) // weight
        beyond = (values_I > limit) | (values_I < -limit)
        if beyond.any():
            element = int(np.argmax(beyond))
            raise BadUpdate(f"integer element {element} of the update is {values_I[element]}, too large for its weight")
    return values_I * np.int64(weight)


def clip_update(update: Path, layout: Layout, clip_norm: float, out: Path) -> None:
    """Write the update with an L2 norm of at most clip_norm, over all of its values as one vector.

    layout: the model's. Raises OperatorError for a model of which more travels than trained parameters.
    """
    check_model(layout)
    factor = clip_factor(l2_norm(float_pieces(update, layout)), clip_norm)
    clipped = ((v * np.float64(factor)).astype(v.dtype).data.cast("B") for v in float_pieces(update, layout))
    with out.open("wb") as file:
        write_chunks(file, layout.update(), clipped)


class Masker(Protocol):
    """`privacy.client.ClientSession`, as far as an upload needs it."""

    def mask(
        self,
        values_D: Iterable[np.ndarray[Any, Any]],
        *,
        weight: int,
        aux: np.ndarray[Any, Any],
        rounding: bytes,
        encoder: Encoder | None,
    ) -> Iterator[memoryview]: ...


def write_masked(
    path: Path, session: Masker, assignment: Assignment, layout: Layout, result: Result, rounding: bytes = b""
) -> None:
    """Write what the trainer gave as the masked upload of this session; nothing in the file means anything alone.

    layout: the model's. rounding: see `ClientSession.mask`. Raises BadUpdate for an update that is not finite or has
    another layout than the model.
    """
    terms = assignment.secure
    assert terms is not None, "a plain round has no masks"
    weight, clipped, integers, encoder = weight_of(assignment, result), 0, None, None
    values: Iterable[np.ndarray[Any, Any]] = ()
    if result.update is not None and assignment.kind is Kind.TRAIN:
        values = float_pieces(result.update, layout)
        if assignment.dp.of_clients:
            encoder, clipped = private_words(result.update, assignment, layout, terms)
        else:
            clipped = sum(count_clipped(v, terms.clip_value) for v in float_pieces(result.update, layout))
            integers = weighted_integers(result.update, layout, weight)
    metrics = {name: (total.sum, total.count) for name, total in metrics_of(assignment, result).items()}
    context, block = context_of(assignment, layout, terms), block_of(assignment, layout, terms)
    aux = block.encode(weight=weight, clipped=clipped, metrics=metrics, integers=integers)
    masked = session.mask(values, weight=weight, aux=aux, rounding=rounding, encoder=encoder)
    with path.open("wb") as file:
        write_chunks(file, masked_layout(context.dim, context.aux, context.ring_bits), masked)


def private_words(update: Path, assignment: Assignment, layout: Layout, terms: SecureTerms) -> tuple[DpQuantizer, int]:
    """What makes ring words of a clipped update, with this client's noise where it adds some, and its adaptive bit."""
    encoding, noise = round_encoding(assignment, layout, terms), Noise()
    norm = l2_norm(float_pieces(update, layout))
    return DpQuantizer(encoding, norm, noise), encoding.bit(norm, noise) if assignment.dp.adaptive else 0
