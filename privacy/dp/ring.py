"""A clipped and perhaps noisy update as whole numbers of the ring: what every client of a masked round adds up.

The bound C of an update's L2 norm is B ring units. A client clips to B - sqrt(D) / 2 of them, so that rounding, which
moves a vector by sqrt(D) / 2 at the most, leaves its *integers* within B: the sensitivity of the sum is exactly B.
In distributed mode each client adds a rounded Gaussian of z * B / sqrt(t - c): any t clients in the sum, of which c
keep their part to themselves, leave noise of z * B in it. From a deviation of 64 units on, a sum of rounded Gaussians
is one sampled at whole numbers, to within e^(-2 pi^2 64^2): no accountant sees the difference.
Source: Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism", arXiv:2102.06387, whose rotation and modular
clipping a ring wide enough makes unnecessary.

    D = elements of the update, n = clients of the cohort, t = fewest that may be summed, c = colluders
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...protocol.errors import OperatorError
from ...protocol.sections import Dp
from ..masks import CHUNK, Array
from .mechanisms import MARGIN, TAIL, Noise

LEAST_SIGMA = 64.0  # ring units of one client's noise; notes in the module's docstring
MOST_SHRINK = 0.25  # of clip_norm that rounding may take
BIT = 1 << 20  # units of a client's bit in the auxiliary block


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How the updates of one round become integers.

    bound: B, the ring units of clip_norm. sigma, bit_sigma: deviation of the noise that each client adds to its update,
    in ring units, and to its bit, in units of BIT; 0 where the coordinator adds it.
    """

    clip_norm: float
    bound: int
    dim: int
    ring_bits: int
    sigma: float
    bit_sigma: float

    @property
    def clipped_to(self) -> float:
        """The norm to which an update is clipped: a little below clip_norm, as rounding takes its part."""
        return self.clip_norm * MARGIN * (1 - math.sqrt(self.dim) / (2 * self.bound))

    def decode(self, sum_D: Array) -> Array:
        """The sum of the clipped updates, (D,) float64, from the unmasked sum of the ring words, (D,) uint32."""
        spare = 32 - self.ring_bits
        signed = (sum_D << np.uint32(spare)).view(np.int32) >> np.int32(spare)
        return signed * (self.clip_norm / self.bound)

    def bit(self, norm: float, noise: Noise) -> int:
        """What a client adds to the count of updates that needed no clipping: b - 1/2 in units of BIT, with noise."""
        value = np.array([BIT / 2 if norm <= self.clipped_to else -BIT / 2])
        noise.add(value, self.bit_sigma, whole=True)
        return int(value[0])


def encoding_of(dp: Dp, *, n: int, fewest: int, dim: int, ring_bits: int) -> Encoding:
    """The encoding of a round; raises OperatorError, with the numbers, where the ring has no room for one.

    The largest sum, n * (B + 9.42 sigma + 1), stays within the ring, so that no sum can wrap around.
    """
    honest = math.sqrt(fewest - dp.colluders)
    share = dp.update_noise / honest if dp.mode == "distributed" else 0.0
    bound = math.floor(((1 << (ring_bits - 1)) / n - 1) / (1 + TAIL * share))
    told = f"{n} clients in a ring of {ring_bits} bits leave {max(bound, 0):,} units for clip_norm"
    if bound < 1 or math.sqrt(dim) / (2 * bound) > MOST_SHRINK:
        raise OperatorError(
            f"{told}, and rounding the {dim:,} parameters takes {math.sqrt(dim) / 2:,.0f} of them: set "
            "secure.ring_bits higher, or ask fewer clients"
        )
    sigma, bit_sigma = share * bound, 0.0
    if dp.mode == "distributed" and dp.adaptive:
        bit_sigma = dp.bit_noise * BIT / honest
    if dp.mode == "distributed" and (least := min(sigma, bit_sigma or sigma)) < LEAST_SIGMA:
        raise OperatorError(
            f"{told}, and a client's noise would be {least:.1f} units, {LEAST_SIGMA:.0f} are needed: set "
            "dp.noise_multiplier or secure.ring_bits higher"
        )
    return Encoding(clip_norm=dp.clip_norm, bound=bound, dim=dim, ring_bits=ring_bits, sigma=sigma, bit_sigma=bit_sigma)


class DpQuantizer:
    """Turns pieces of one update, in their order, into ring words; in place of `fixed_point.Quantizer`."""

    def __init__(self, encoding: Encoding, norm: float, noise: Noise) -> None:
        """norm: of the whole update, which is clipped by it."""
        shrink = min(1.0, encoding.clipped_to / norm) if norm else 1.0
        self._factor = encoding.bound / encoding.clip_norm * shrink
        self._sigma, self._noise = encoding.sigma, noise
        self._work = np.empty(CHUNK, np.float64)

    def quantize(self, values: Array, out: Array, position: int = 0) -> None:
        """Write the words of a piece, (m,) float32 or float64, into `out`, (m,) uint32; wherever it lies."""
        for first in range(0, len(values), CHUNK):
            piece = values[first : first + CHUNK]
            work = self._work[: len(piece)]
            np.multiply(piece, self._factor, out=work, dtype=np.float64)
            np.rint(work, out=work)
            if self._sigma:
                self._noise.add(work, self._sigma, whole=True)
            out[first : first + CHUNK].view(np.int32)[...] = work
