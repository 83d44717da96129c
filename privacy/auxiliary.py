"""The auxiliary block: what is summed beside the model, as 64-bit integers under their own masks.

In it lie the number of clients, the total weight, how many values were clipped, the metrics as sums and counts, and
the integer tensors of the model. Alone they would tell much about one client, so they are never sent in clear.

    A = elements of the block, I = elements of all integer tensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..protocol.errors import BadUpdate
from .masks import AUX, Array

METRIC_SCALE = 1 << 20  # fixed point of metric sums and counts: six decimal places
_HEAD = 3  # clients, weight, clipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """The block's sums over the clients of a round; `metrics` holds (sum, count), `integers` is (I,) int64."""

    clients: int
    weight: int
    clipped: int
    metrics: dict[str, tuple[float, float]]
    integers: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The layout of the block: which metrics it sums, how many integer elements, for how many clients at most.

    clients: the largest cohort whose sum cannot wrap; one client's numbers are bounded by 2^63 / clients. A smaller
    number allows larger metrics: 67 million each for the default, 9e11 for ten clients.
    """

    metrics: tuple[str, ...] = ()
    integers: int = 0
    clients: int = 1 << 17

    @property
    def size(self) -> int:
        """A, the elements of the block."""
        return _HEAD + 2 * len(self.metrics) + self.integers

    def encode(
        self, *, weight: int, clipped: int, metrics: Mapping[str, tuple[float, float]], integers: Array | None = None
    ) -> Array:
        """One client's block, (A,) uint64 in two's complement.

        metrics: (sum, count) by name; a name that the block sums but is absent here counts (0, 0), and one that the
        block does not sum does not travel. integers: (I,) int64, each tensor's weight * delta in the layout's order.
        Raises BadUpdate, naming what, for a number that is not finite or so large that the sum could wrap.
        """
        limit = ((1 << 63) - 1) // self.clients
        block = np.zeros(self.size, np.int64)
        block[:_HEAD] = (
            1,
            _bounded(weight, limit, "the weight"),
            _bounded(clipped, limit, "the count of clipped values"),
        )
        for i, name in enumerate(self.metrics):
            for j, (value, what) in enumerate(zip(metrics.get(name, (0.0, 0.0)), ("sum", "count"), strict=True)):
                if not math.isfinite(value):
                    raise BadUpdate(f"the {what} of the metric {name!r} is {value}", metric=name)
                block[_HEAD + 2 * i + j] = _bounded(
                    round(value * METRIC_SCALE), limit, f"the {what} of the metric {name!r}"
                )
        if integers is None:
            integers = np.zeros(0, np.int64)
        if integers.shape != (self.integers,) or integers.dtype != np.int64:
            raise ValueError(f"({self.integers},) int64 was asked for, got {integers.shape} {integers.dtype}")
        if self.integers:
            beyond = (integers > limit) | (integers < -limit)
            if beyond.any():
                at = int(np.argmax(beyond))
                raise BadUpdate(
                    f"integer element {at} of the update is {integers[at]}, at most {limit} fits", element=at
                )
            block[self.size - self.integers :] = integers
        return block.view(AUX)

    def decode(self, sum_A: Array) -> Totals:
        """The totals in an unmasked sum of blocks, (A,) uint64; the caller compares `clients` with whom it summed."""
        if sum_A.shape != (self.size,) or sum_A.dtype != AUX:
            raise ValueError(f"({self.size},) uint64 was asked for, got {sum_A.shape} {sum_A.dtype}")
        block = sum_A.view(np.int64)
        pairs = block[_HEAD : self.size - self.integers].reshape(-1, 2) / METRIC_SCALE
        return Totals(
            clients=int(block[0]),
            weight=int(block[1]),
            clipped=int(block[2]),
            metrics={name: (float(s), float(c)) for name, (s, c) in zip(self.metrics, pairs, strict=True)},
            integers=block[self.size - self.integers :].copy(),
        )


def _bounded(value: int, limit: int, what: str) -> int:
    if not -limit <= value <= limit:
        raise BadUpdate(f"{what} is too large to be summed: {value} of at most {limit}")
    return value
