"""Updates as integers: fixed point in a 32-bit ring, wide enough that the sum over a whole cohort cannot wrap.

A value is clipped, multiplied by its client's weight and by one scale that all share, and rounded. Negative numbers
are two's complement, so the sum of the ring's words is the sum of the numbers without further bookkeeping.

    K = clients in the cohort, D = elements of the update, B = bits of one value with its sign
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from ..protocol.errors import BadUpdate
from .masks import CHUNK, RING, Array

RING_BITS = 32


def value_bits(n_clients: int) -> int:
    """B, the bits of one value: K values of B bits never leave 32 bits, as B = 32 - ceil(log2(K + 1))."""
    return RING_BITS - n_clients.bit_length()


def scale(clip_value: float, max_weight: int, n: int) -> float:
    """Ring units for a weighted delta of 1: the largest one, clip_value * max_weight, becomes 2^(B-1) - 1.

    The rounding error of one client's weighted delta is at most half a unit, `0.5 / scale`. So the mean of n updates
    of weight w is right to about `clip_value * max_weight / w` * 2^-B; bounds close to what occurs cost nothing.
    """
    return ((1 << (value_bits(n) - 1)) - 1) / (clip_value * max_weight)


class Encoder(Protocol):
    """What turns pieces of one update, in their order, into ring words: `Quantizer`, or `dp.ring.DpQuantizer`."""

    def quantize(self, values: Array, out: Array) -> None: ...


class Quantizer:
    """Turns pieces of one update, in their order, into ring words; its buffers are used again for each piece.

    Raises BadUpdate for a weight outside 0 .. max_weight and, in `quantize`, for a value that is not finite, naming
    its position in the whole update. `clipped` counts the values that were cut to +-clip_value.
    """

    def __init__(self, *, weight: int, clip_value: float, max_weight: int, n: int) -> None:
        if not 0 <= weight <= max_weight:
            raise BadUpdate(f"the update weighs {weight}, from 0 to {max_weight} is allowed", weight=weight)
        self.position = 0
        self.clipped = 0
        self._clip = clip_value
        self._factor = weight * scale(clip_value, max_weight, n)
        self._work = np.empty(CHUNK, np.float64)

    def quantize(self, values: Array, out: Array) -> None:
        """Write the words of a piece, (m,) float32 or float64, into `out`, (m,) uint32."""
        for first in range(0, len(values), CHUNK):
            self._piece(values[first : first + CHUNK], out[first : first + CHUNK])

    def _piece(self, values: Array, out: Array) -> None:
        self.clipped += _count_clipped(values, self._clip, self.position)
        # In float64 bound and product are exact to far less than half a unit, so nothing rounds beyond 2^(B-1) - 1;
        # in float32 the bound itself can lie above clip_value, by several units.
        work = self._work[: len(values)]
        work[...] = values
        np.clip(work, -self._clip, self._clip, out=work)
        np.multiply(work, self._factor, out=work)
        np.rint(work, out=work)
        out.view(np.int32)[...] = work
        self.position += len(values)


def words(values_D: Iterable[Array], quantizer: Encoder, dim: int) -> Iterator[Array]:
    """An update of D = dim elements as ring words, in new vectors of CHUNK elements however the update was cut.

    Raises BadUpdate when the pieces do not have D elements together; what was yielded before is then worthless.
    """
    out, filled, left = np.empty(min(CHUNK, dim), RING), 0, dim
    for values in values_D:
        if len(values) > left:
            raise BadUpdate(f"the update has more than the {dim} elements of its layout")
        left -= len(values)
        while len(values):
            part = values[: len(out) - filled]
            quantizer.quantize(part, out[filled : filled + len(part)])
            filled, values = filled + len(part), values[len(part) :]
            if filled == len(out):
                yield out
                out, filled = np.empty(min(CHUNK, left + len(values)), RING), 0
    if left:
        raise BadUpdate(f"the update has {dim - left} elements, its layout has {dim}")


def quantize(values_D: Array, *, weight: int, clip_value: float, max_weight: int, n: int) -> Array:
    """One whole update as ring words: (D,) float32 or float64 to (D,) uint32; see `Quantizer`."""
    words_D = np.empty(len(values_D), RING)
    Quantizer(weight=weight, clip_value=clip_value, max_weight=max_weight, n=n).quantize(values_D, words_D)
    return words_D


def count_clipped(values: Array, clip_value: float, *, start: int = 0) -> int:
    """How many values exceed clip_value; raises BadUpdate for one that is not finite.

    start: position of the first value in the whole update, for the message and the fact `element`.
    """
    pieces = range(0, len(values), CHUNK)
    return sum(_count_clipped(values[i : i + CHUNK], clip_value, start + i) for i in pieces)


def decode(sum_D: Array, *, clip_value: float, max_weight: int, n: int) -> Array:
    """The sum of the weighted deltas, (D,) float64, from the unmasked sum of the ring words, (D,) uint32.

    n: clients in the cohort, as at the clients, not how many of them were summed.
    """
    return sum_D.view(np.int32) * (1.0 / scale(clip_value, max_weight, n))


def _count_clipped(values: Array, clip_value: float, start: int) -> int:
    if values.dtype not in (np.float32, np.float64) or values.ndim != 1:
        raise ValueError(f"an update is a vector of float32 or float64, not {values.ndim} dimensions of {values.dtype}")
    if not len(values):
        return 0
    largest: Any = max(-values.min(), values.max())  # NaN anywhere makes both of them NaN
    if not np.isfinite(largest):
        element = start + int(np.argmin(np.isfinite(values)))
        raise BadUpdate(f"element {element} of the update is {values[element - start]}", element=element)
    if largest <= clip_value:
        return 0
    return int(np.count_nonzero(np.abs(values) > clip_value))
