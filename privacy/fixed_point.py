"""Updates as integers: fixed point in a ring of 16, 24 or 32 bits, wide enough that a cohort's sum cannot wrap.

A value is clipped, multiplied by its client's weight and by one scale that all share, and rounded. Negative numbers
are two's complement, so the sum of the ring's words is the sum of the numbers without further bookkeeping. Arithmetic
is modulo 2^32 in every ring: 2^16 and 2^24 divide it, so the top bytes may be left away at any time, and are on the
wire. Why the scale is what it is: docs/decisions/0009-fixed-point.md.

    K = clients in the cohort, D = elements of the update, R = bits of the ring, B = bits of one value with its sign
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

import numpy as np

from ..protocol.errors import BadUpdate, SumTooLarge
from ..protocol.sections import ring_room
from ..protocol.threads import in_order
from .masks import CHUNK, RING, Array, Keystream

RING_BITS = 32
EXACT_BITS = 20  # from so many bits of a value on, rounding to nearest is far below what training notices
_NOISE = np.dtype("<u2")
_ONE = 1 << 16  # of the rounding noise


class Bounds(TypedDict):
    """What all clients of a round share about numbers; as keyword arguments to the functions below.

    n: clients in the cohort. total_weight: what their weights add up to at most; 0 where only max_weight bounds each.
    """

    clip_value: float
    max_weight: int
    n: int
    ring_bits: NotRequired[int]
    total_weight: NotRequired[int]


def value_bits(n_clients: int, ring_bits: int = RING_BITS) -> int:
    """B, the bits of one value: K values of B bits never leave R bits, as B = R - ceil(log2(K + 1))."""
    return ring_room(n_clients, ring_bits)


def scale(clip_value: float, max_weight: int, n: int, ring_bits: int = RING_BITS, total_weight: int = 0) -> float:
    """Ring units for a weighted delta of 1.

    Without a bound on the weights' sum, the largest weighted delta, clip_value * max_weight, becomes 2^(B-1) - 1. With
    one, clip_value * total_weight becomes 2^(R-1) - 1 - K: room for the largest sum, and half a unit of each client.
    The rounding error of one client's weighted delta is at most half a unit, `0.5 / scale`, so the bounds should be
    close to what occurs.
    """
    if total_weight:
        return ((1 << (ring_bits - 1)) - 1 - n) / (clip_value * total_weight)
    return ((1 << (value_bits(n, ring_bits) - 1)) - 1) / (clip_value * max_weight)


def weight_bound(total: int, summed: Collection[str], cohort: Collection[str], max_weight: int) -> int:
    """A bound on the sum of a cohort's weights, from the sum of an earlier one's; 0 where max_weight bounds as well.

    total: of the updates of the clients `summed`. A cohort out of these has room for a quarter more, for their weights
    hardly change; one with others for four times as much. A power of two, since every client is told it, and the exact
    number would say what the others weigh together.
    """
    if not total or max_weight == 1:
        return 0
    quarters = 5 if set(cohort) <= set(summed) else 16
    expected = -(-total * max(len(cohort), len(summed)) * quarters // (4 * len(summed)))
    bound = 1 << (expected - 1).bit_length()
    return bound if bound < max_weight << len(cohort).bit_length() else 0


class Encoder(Protocol):
    """What turns pieces of one update into ring words: `Quantizer`, or `dp.ring.DpQuantizer`."""

    def quantize(self, values: Array, out: Array, position: int = 0) -> None: ...


class Quantizer:
    """Turns pieces of one update into ring words; its buffers are used again for each piece, so one thread has one.

    rounding: 32 bytes, a key used for nothing else, by which values of fewer than 20 bits are rounded up or down at
    random so that their expectation is exact; rounding to nearest would lose what is smaller than half a unit for good.
    Raises BadUpdate for a weight outside 0 .. max_weight and, in `quantize`, for a value that is not finite, naming
    its position in the whole update.
    """

    def __init__(
        self,
        *,
        weight: int,
        clip_value: float,
        max_weight: int,
        n: int,
        ring_bits: int = RING_BITS,
        total_weight: int = 0,
        rounding: bytes = b"",
    ) -> None:
        if not 0 <= weight <= max_weight:
            raise BadUpdate(f"the update weighs {weight}, from 0 to {max_weight} is allowed", weight=weight)
        self._factor = weight * scale(clip_value, max_weight, n, ring_bits, total_weight)
        # An update that alone exceeds the bound of the sum stays inside the ring; the server finds it in the total.
        self._clip = clip_value * min(1.0, total_weight / weight) if total_weight and weight else clip_value
        self._work = np.empty(CHUNK, np.float64)
        self._noise: Keystream | None = None
        if needs_rounding(n, ring_bits):
            self._noise = Keystream(rounding)
            self._random, self._drawn = np.empty(CHUNK, _NOISE), np.empty(CHUNK, np.float64)

    def quantize(self, values: Array, out: Array, position: int = 0) -> None:
        """Write the words of a piece, (m,) float32 or float64, into `out`, (m,) uint32.

        position: of the first value in the whole update.
        """
        for first in range(0, len(values), CHUNK):
            self._piece(values[first : first + CHUNK], out[first : first + CHUNK], position + first)

    def _piece(self, values: Array, out: Array, position: int) -> None:
        _count_clipped(values, self._clip, position)
        # In float64 bound and product are exact to far less than half a unit, so nothing rounds beyond 2^(B-1) - 1;
        # in float32 the bound itself can lie above clip_value, by several units.
        work = self._work[: len(values)]
        work[...] = values
        np.clip(work, -self._clip, self._clip, out=work)
        np.multiply(work, self._factor, out=work)
        if self._noise is None:
            np.rint(work, out=work)
        else:
            drawn, random = self._drawn[: len(values)], self._random[: len(values)]
            self._noise.seek(position * _NOISE.itemsize)
            self._noise.into(random.view(np.uint8).data)
            np.add(random, 0.5, out=drawn)
            np.multiply(drawn, 1 / _ONE, out=drawn)  # in (0, 1), with the mean 1/2
            np.add(work, drawn, out=work)
            np.floor(work, out=work)
        out.view(np.int32)[...] = work


def needs_rounding(n: int, ring_bits: int) -> bool:
    """Whether values have so few bits that they are rounded at random."""
    return value_bits(n, ring_bits) < EXACT_BITS


def chunks(values_D: Iterable[Array], dim: int) -> Iterator[tuple[int, Array]]:
    """An update of D = dim elements in vectors of CHUNK elements with their positions, however the update was cut.

    The vectors are views of what was given where they lie inside one piece. Raises BadUpdate when the pieces do not
    have D elements together; what was yielded before is then worthless.
    """
    parts: list[Array] = []
    position, filled = 0, 0
    for values in values_D:
        if position + filled + len(values) > dim:
            raise BadUpdate(f"the update has more than the {dim} elements of its layout")
        while len(values):
            part = values[: CHUNK - filled]
            parts.append(part)
            filled, values = filled + len(part), values[len(part) :]
            if filled == CHUNK:
                yield position, _joined(parts)
                position, filled, parts = position + CHUNK, 0, []
    if position + filled < dim:
        raise BadUpdate(f"the update has {position + filled} elements, its layout has {dim}")
    if filled:
        yield position, _joined(parts)


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def quantize(values_D: Array, *, weight: int, rounding: bytes = b"", **bounds: Unpack[Bounds]) -> Array:
    """One whole update as ring words: (D,) float32 or float64 to (D,) uint32; see `Quantizer`."""
    words_D = np.empty(len(values_D), RING)
    Quantizer(weight=weight, rounding=rounding, **bounds).quantize(values_D, words_D)
    return words_D


def count_clipped(values: Array, clip_value: float, *, start: int = 0) -> int:
    """How many values exceed clip_value; raises BadUpdate for one that is not finite.

    start: position of the first value in the whole update, for the message and the fact `element`.
    """
    pieces = range(0, len(values), CHUNK)
    return sum(_count_clipped(values[i : i + CHUNK], clip_value, start + i) for i in pieces)


def decode(
    sum_D: Array, *, clip_value: float, max_weight: int, n: int, ring_bits: int = RING_BITS, total_weight: int = 0
) -> Array:
    """The sum of the weighted deltas, (D,) float64, from the unmasked sum of the ring words, (D,) uint32.

    n: clients in the cohort, as at the clients, not how many of them were summed. Bits above the ring's do not count.
    """
    unused = RING_BITS - ring_bits  # shifted up and down again, the ring's top bit is the sign
    signed = (sum_D << np.uint32(unused)).view(np.int32) if unused else sum_D.view(np.int32)
    return signed * (1.0 / (scale(clip_value, max_weight, n, ring_bits, total_weight) * (1 << unused)))


def mean(sum_D: Array, *, weight: int, dtype: Any = np.float64, threads: int = 0, **bounds: Unpack[Bounds]) -> Array:
    """The weighted mean, (D,) of `dtype`, from the unmasked sum; computed in float64, a piece at a time.

    A float32 mean takes the sum's own place in memory: the sum is used up.

    weight: the sum of the weights, from the auxiliary block. Raises SumTooLarge where the sum may have wrapped: where
    the weights add up to more than `total_weight`.
    """
    limit = bounds.get("total_weight", 0)
    if limit and weight > limit:
        raise SumTooLarge(
            f"the weights add up to {weight}, {limit} were expected at most: the sum may have left the ring, and the "
            "next attempt is made without that bound"
        )
    mean_D = sum_D.view(dtype) if dtype == np.float32 else np.empty(len(sum_D), dtype)

    def work(first: int) -> None:
        piece = decode(sum_D[first : first + CHUNK], **bounds)
        np.divide(piece, weight, out=piece)
        mean_D[first : first + CHUNK] = piece

    for _ in in_order(lambda: work, range(0, len(sum_D), CHUNK), threads=1 if len(sum_D) <= CHUNK else threads):
        pass
    return mean_D


def rounding_error(mean_D: Array, *, weight: int, summed: int, **bounds: Unpack[Bounds]) -> float:
    """Deviation of the mean's rounding error over the root mean square of the mean; 0 for an update of zeros.

    Each of the `summed` clients rounds within half a unit, or within one at random: variances of 1/12, 1/6 on average.
    """
    size = float(np.linalg.norm(mean_D)) / max(len(mean_D), 1) ** 0.5
    variance = 1 / 6 if needs_rounding(bounds["n"], bounds.get("ring_bits", RING_BITS)) else 1 / 12
    return (summed * variance) ** 0.5 / (scale(**bounds) * weight * size) if size else 0.0


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
