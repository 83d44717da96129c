"""From the sum of clipped updates to what is published: noise, a fixed denominator, and the next round's bound."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ...protocol.sections import Dp
from ..masks import Array
from .mechanisms import Noise, add_noise


def release(
    sums: Iterable[Array], bits: float, dp: Dp, *, denominator: int, noise: Noise | None = None
) -> tuple[float | None, dict[str, float]]:
    """Turn the sum of clipped updates, flat float64 pieces, into the published mean, in place.

    In distributed mode the noise is in the sum already; in central mode it is added here, a fresh one for each sum that
    is taken. A worker that dies may so take one sum twice, under two noises; but an attempt publishes one result, in
    one transaction, and nobody sees the other.
    bits: as in `next_clip_norm`. dp: the round's. denominator: a number fixed before the run; how many really were in
    the sum would tell of who was not.
    Returns the next round's clip_norm, None where it is not adaptive, and facts for the log.
    """
    noise = noise or Noise()
    for piece in sums:
        if dp.mode == "central":
            add_noise(piece, dp.update_noise * dp.clip_norm, noise)
        np.divide(piece, denominator, out=piece)
    if not dp.adaptive:
        return None, {"clip_norm": dp.clip_norm}
    following, unclipped = next_clip_norm(bits, dp, denominator=denominator, noise=noise)
    return following, {"clip_norm": dp.clip_norm, "unclipped": unclipped}


def next_clip_norm(bits: float, dp: Dp, *, denominator: int, noise: Noise) -> tuple[float, float]:
    """(the next round's clip_norm, the noisy part of updates that needed no clipping).

    bits: the sum of b - 1/2 over the clients in the sum, b being 1 where the update was left as it was; one client
    moves it by 1/2, so noise of deviation bit_noise has a multiplier of 2 * bit_noise.
    The bound follows the quantile: C exp(-clip_lr (b - quantile)).
    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", algorithm 1, arXiv:1905.03871.
    """
    count = np.array([bits])
    if dp.mode == "central":
        add_noise(count, dp.bit_noise, noise)
    unclipped = 0.5 + float(count[0]) / denominator
    exponent = max(-50.0, min(50.0, -dp.clip_lr * (unclipped - dp.quantile)))
    return min(1e6, max(1e-6, dp.clip_norm * math.exp(exponent))), unclipped
