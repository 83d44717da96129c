"""Sums over the cohort's uploads, from mapped files, in memory of the order of one model.

Every element is added up in the order of client ids, so the result is the same to the last bit whatever the order of
arrival, the chunk size, or a restart in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import BadUpdate
from ..protocol.tensors import FLOATS, Layout, check_file, map_file, masked_layout

# D = elements of a masked update's ring, A = elements of its auxiliary block

Array = np.ndarray[Any, Any]
CHUNK = 1 << 16  # elements; 512 KiB of float64 stay in the cache while one file's part is added
_INT64_SAFE = 1 << 62  # numerators and twice a remainder below this fit int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """One client's accepted update; `weight` is finite and not negative."""

    client: str
    path: Path
    weight: float


def weighted_mean(updates: Iterable[Contribution], layout: Layout, *, chunk: int = CHUNK) -> dict[str, Array]:
    """The weighted mean of plain updates, in whatever order they come; see `RunningMean`.

    Raises BadUpdate where a file has another layout, ValueError for a repeated client or weights that sum to nothing.
    """
    running = RunningMean(layout, chunk=chunk)
    for update in sorted(updates, key=lambda u: u.client):
        running.add(update)
    return running.mean()


class RunningMean:
    """The weighted mean of plain updates that are added one by one, in the order of client ids.

    layout: of the updates (`Layout.update()` of the model's), F32, F64 and I64. Memory is that of one model in 8-byte
    numbers, however many updates there are.
    """

    def __init__(self, layout: Layout, *, chunk: int = CHUNK) -> None:
        self._layout, self._chunk = layout, chunk
        self._last = ""
        self._weights: list[float] = []
        self._denominator = 1  # weights times this are whole numbers: every float is a fraction of two integers
        self._floats = {t.name: np.zeros(t.numel, np.float64) for t in layout.tensors if t.dtype in FLOATS}
        self._integers = {t.name: _ExactSum(t.numel) for t in layout.tensors if t.dtype not in FLOATS}

    def add(self, update: Contribution) -> None:
        """Add an update; raises BadUpdate for a file of another layout, ValueError for a weight that is none or an id
        that does not follow the last one.
        """
        if update.client <= self._last:
            raise ValueError(f"{update.client!r} after {self._last!r}: ids must ascend, and none may stand twice")
        if not (math.isfinite(update.weight) and update.weight >= 0):
            raise ValueError(f"the weight {update.weight} is not a finite number of 0 or more")
        check_file(update.path, self._layout)
        self._last = update.client
        self._weights.append(update.weight)
        whole = self._whole(update.weight)
        for name, part, values in _chunks(map_file(update.path, self._layout), self._chunk):
            if name in self._floats:
                self._floats[name][part] += values.astype(np.float64) * update.weight
            else:
                self._integers[name].add(part, values, whole)

    def mean(self) -> dict[str, Array]:
        """By name and in the tensors' shapes; the sum is used up.

        Floats come as float64: weight times value added up in float64 in the order of client ids, divided once at the
        end. Integers come as int64: the exact mean, rounded half to even.
        Raises ValueError when the weights sum to nothing.
        """
        total = math.fsum(self._weights)
        if not total > 0:
            raise ValueError("the weights sum to nothing: there is no mean")
        means: dict[str, Array] = {}
        for name, sums in self._floats.items():
            sums /= total
            means[name] = sums
        exact_total = sum(map(Fraction, self._weights)) * self._denominator
        means |= {name: sums.mean(int(exact_total)) for name, sums in self._integers.items()}
        return {t.name: means[t.name].reshape(t.shape) for t in self._layout.tensors}

    def _whole(self, weight: float) -> int:
        fraction = Fraction(weight)
        finer = math.lcm(self._denominator, fraction.denominator)
        for sums in self._integers.values():
            sums.scale(finer // self._denominator)
        self._denominator = finer
        return int(fraction * finer)


def ring_sum(paths: Iterable[Path], dim: int, aux: int, *, chunk: int = CHUNK) -> tuple[Array, Array]:
    """The sum of masked uploads: (uint32 (D,) modulo 2³², uint64 (A,) modulo 2⁶⁴).

    The order does not matter: addition modulo a power of two is exact. Raises BadUpdate for a file of another layout.
    """
    layout = masked_layout(dim, aux)
    sums: dict[str, Array] = {"ring": np.zeros(dim, np.uint32), "aux": np.zeros(aux, np.uint64)}
    for path in paths:
        check_file(path, layout)
        for name, part, values in _chunks(map_file(path, layout), chunk):
            sums[name][part] += values
    return sums["ring"], sums["aux"]


def check_finite(path: Path, layout: Layout, *, chunk: int = CHUNK) -> float:
    """The L2 norm of an update's floating-point tensors, found in one pass; integers do not count.

    Raises BadUpdate naming the first tensor that holds NaN or infinity, or whose values are so large (F64 above about
    1e154) that their squares overflow.
    """
    check_file(path, layout)
    dtypes = {t.name: t.dtype for t in layout.tensors}
    squares: dict[str, float] = {}
    for name, _, values in _chunks(map_file(path, layout), chunk):
        if dtypes[name] in FLOATS:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is caught by the sum below
                wide = values.astype(np.float64)
                squares[name] = squares.get(name, 0.0) + float(np.dot(wide, wide))
            if not math.isfinite(squares[name]):
                raise BadUpdate(f"{name!r} holds NaN, infinity, or values whose squares overflow")
    norm = math.sqrt(math.fsum(squares.values())) if squares else 0.0
    if not math.isfinite(norm):
        raise BadUpdate("the norm of the update overflows")
    return norm


def round_half_even(numerator: Array, denominator: int) -> Array:
    """numerator / denominator to the nearest whole number, ties to even, exactly.

    numerator: int64 of which every value and twice the denominator stay below 2⁶², or Python integers (dtype object).
    """
    quotient = numerator // denominator
    twice = (numerator - quotient * denominator) * 2  # in [0, 2 · denominator): // rounds down
    up = (twice > denominator) | ((twice == denominator) & (quotient % 2 == 1))
    return quotient + up.astype(np.int64)


class _ExactSum:
    """Weighted sum of int64 tensors; goes over to Python's integers where int64 might not hold it."""

    def __init__(self, numel: int) -> None:
        self.sums: Array = np.zeros(numel, np.int64)
        self.bound = 0

    def add(self, part: slice, values: Array, weight: int) -> None:
        if weight == 0 or values.size == 0:
            return
        self._allow(self.bound + weight * max(int(values.max()), -int(values.min())), weight)
        wide = values.astype(object) if self.sums.dtype == object else values
        self.sums[part] += wide * weight

    def scale(self, factor: int) -> None:
        """Multiply the sum, as weights turn out to need finer units."""
        if factor != 1:
            self._allow(self.bound * factor, factor)
            self.sums *= factor

    def _allow(self, bound: int, factor: int) -> None:
        self.bound = bound
        if self.sums.dtype != object and max(bound, factor) >= _INT64_SAFE:
            self.sums = self.sums.astype(object)

    def mean(self, total: int) -> Array:
        numerator = self.sums.astype(object) if total >= _INT64_SAFE else self.sums
        return round_half_even(numerator, total).astype(np.int64)


def _chunks(tensors: dict[str, Array], chunk: int) -> Iterator[tuple[str, slice, Array]]:
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, chunk):
            part = slice(start, start + chunk)
            yield name, part, flat[part]
