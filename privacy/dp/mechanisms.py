"""The two halves of a differentially private sum: every contribution is clipped, and noise is added.

Noise is made of AES-256-CTR bits, never by numpy's or torch's generators, whose state can be found from what they
gave. In masked rounds it is added as whole numbers, which leave none of float arithmetic's traces (Mironov 2012,
doi:10.1145/2382196.2382264).

    D = elements of the update
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import numpy as np

from ...protocol.errors import BadUpdate, OperatorError
from ...protocol.tensors import FLOATS, Layout
from ..masks import CHUNK, Array, Keystream

TAIL = math.sqrt(2 * 64 * math.log(2))  # 9.42: no standard normal of `Noise` lies further out
MARGIN = 1 - 2.0**-20  # clip to so much of the bound: rounding to float32 (2^-24) then stays within it
_BLOCK = 1 << 15  # standard normals made at once, from 256 KiB of keystream
_GRID = 2.0**-20  # of the noise's deviation: what a noisy sum is rounded to


def check_model(layout: Layout) -> None:
    """Raise OperatorError unless all that travels of such a model are trained parameters of floating point.

    Running statistics and counters are sums over a client's data that no clipping bounds and no noise covers; frozen
    at their first values they would make the model useless. So such a model is refused.
    """
    for t in layout.tensors:
        if t.dtype != "BOOL" and (t.dtype not in FLOATS or t.name in layout.buffers):
            raise OperatorError(
                f"differential privacy covers trained parameters, and {t.name!r} is none: use GroupNorm or LayerNorm "
                "in place of BatchNorm, and register what never changes as a buffer with persistent=False"
            )


class Noise:
    """A stream of standard normals from one key of 32 bytes; how it is cut into pieces does not change it.

    Box and Muller's transform in float64, from 64-bit uniforms: nothing lies beyond 9.42, which a normal does with a
    probability below 2^-67 (so D elements add less than D * 2^-64 to delta).
    """

    def __init__(self, key: bytes | None = None) -> None:
        """key: for tests and nothing else; a release takes a fresh one from the system."""
        self._stream = Keystream(key if key is not None else os.urandom(32))
        self._bits = bytearray(_BLOCK * 8)
        self._ready = np.empty(_BLOCK, np.float64)
        self._left = 0

    def add(self, values: Array, sigma: float, *, whole: bool = False) -> None:
        """Add noise of deviation sigma to a float64 vector in place; `whole` rounds each one's noise first."""
        done = 0
        while done < len(values):
            if not self._left:
                self._refill()
            piece = values[done : done + self._left]
            noise = self._ready[_BLOCK - self._left :][: len(piece)] * sigma
            np.add(piece, np.rint(noise, out=noise) if whole else noise, out=piece)
            done, self._left = done + len(piece), self._left - len(piece)

    def _refill(self) -> None:
        self._stream.into(memoryview(self._bits))
        words = np.frombuffer(self._bits, "<u8").astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((words[: _BLOCK // 2] + 1.0) * 2.0**-64))
        angle = words[_BLOCK // 2 :] * (2 * math.pi * 2.0**-64)
        np.multiply(radius, np.cos(angle), out=self._ready[: _BLOCK // 2])
        np.multiply(radius, np.sin(angle), out=self._ready[_BLOCK // 2 :])
        self._left = _BLOCK


def l2_norm(values_D: Iterable[Array]) -> float:
    """The L2 norm of an update that comes in pieces, in float64; raises BadUpdate where it is not finite."""
    squares: list[float] = []
    for values in values_D:
        for first in range(0, len(values), CHUNK):
            with np.errstate(over="ignore", invalid="ignore"):
                wide = values[first : first + CHUNK].astype(np.float64)
                squares.append(float(np.dot(wide, wide)))
    norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
    if not math.isfinite(norm):
        raise BadUpdate("the update holds NaN, infinity, or values whose squares overflow: training diverged")
    return norm


def clip_factor(norm: float, clip_norm: float) -> float:
    """By what an update is multiplied so that its norm, rounded to float32, is no more than clip_norm."""
    return min(1.0, clip_norm * MARGIN / norm) if norm else 1.0


def is_unclipped(norm: float, clip_norm: float) -> bool:
    """Whether an update of this norm was left as it was; told from what was sent just as from what was trained."""
    return norm < clip_norm * (MARGIN - 2.0**-22)


def add_noise(sum_D: Array, sigma: float, noise: Noise) -> None:
    """The Gaussian mechanism on a sum in float64, in place.

    The result is rounded to a grid a million times finer than the noise: that takes nothing from the guarantee, and
    takes away the low bits from which floating-point noise could be told.
    """
    grid = 2.0 ** math.floor(math.log2(sigma * _GRID))
    for first in range(0, len(sum_D), CHUNK):
        piece = sum_D[first : first + CHUNK]
        noise.add(piece, sigma)
        np.rint(piece / grid, out=piece)
        np.multiply(piece, grid, out=piece)
