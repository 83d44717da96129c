"""Sums over the cohort's uploads, read part by part, in memory of the order of one model.

Every element is added up in the order of client ids, so the result is the same to the last bit whatever the order of
arrival, the chunk size, or a restart in between.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import BadUpdate
from ..protocol.tensors import DTYPES, FLOATS, Layout, TensorSpec, check_file, masked_layout
from ..protocol.threads import in_order
from ..protocol.wire import from_bf16, unpack_24

# D = elements of a masked update's ring, A = elements of its auxiliary block

Array = np.ndarray[Any, Any]
CHUNK = 1 << 16  # elements; 512 KiB of the float64 sum stay in the cache while the files' parts are added to it
TOGETHER = 32  # files added to a part of the sum before the next part; so many are open at a time
_F32_EXACT = 1 << 29  # a float32's 24 bits times a whole weight below this fit the 53 bits of a float64
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
    ordered = sorted(updates, key=lambda u: u.client)
    for start in range(0, len(ordered), TOGETHER):
        running.add(*ordered[start : start + TOGETHER])
    return running.mean()


class RunningMean:
    """The weighted mean of plain updates that are added one by one, in the order of client ids.

    layout: of the updates (`Layout.update()` of the model's), F32, BF16, F64 and I64. Memory is that of one
    model in 8-byte numbers, however many updates there are.
    fused: adds values times a weight to float64 sums in one pass. It is asked only where the products are exact, so
    that nothing depends on how it rounds them.
    """

    def __init__(
        self, layout: Layout, *, chunk: int = CHUNK, fused: Callable[[Array, Array, float], None] | None = None
    ) -> None:
        self._layout, self._chunk, self._fused = layout, chunk, fused
        self._last = ""
        self._weights: list[float] = []
        self._product = np.empty(chunk, np.float64)
        self._denominator = 1  # weights times this are whole numbers: every float is a fraction of two integers
        self._floats = {t.name: np.zeros(t.numel, np.float64) for t in layout.tensors if t.dtype in FLOATS}
        self._integers = {t.name: _ExactSum(t.numel) for t in layout.tensors if t.dtype not in FLOATS}

    def add(self, *updates: Contribution) -> None:
        """Add updates; raises BadUpdate for a file of another layout, ValueError for a weight that is none or an id
        that does not follow the last one.

        Several at once are added part by part of the model: the sum passes through memory once for all of them.
        """
        last = self._last
        for update in updates:
            self._follows(last, update.client, update.weight)
            check_file(update.path, self._layout)
            last = update.client
        self._last = last
        weights = [update.weight for update in updates]
        self._weights += weights
        wholes = self._whole(weights)
        with Files([update.path for update in updates], self._layout) as files:
            for name, part, i, values in files.parts(self._chunk):
                self._add(name, part, values, weights[i], wholes[i])

    def add_parts(self, client: str, weight: float, parts: Iterable[tuple[str, slice, Array]]) -> None:
        """Add an update that is in memory: all of it in flat pieces of at most `chunk` elements, as `add` would.

        Raises what the pieces raise; the sum is then of no use.
        """
        self._follows(self._last, client, weight)
        self._last = client
        self._weights.append(weight)
        (whole,) = self._whole([weight])
        for name, part, values in parts:
            self._add(name, part, values, weight, whole)

    @staticmethod
    def _follows(last: str, client: str, weight: float) -> None:
        if client <= last:
            raise ValueError(f"{client!r} after {last!r}: ids must ascend, and none may stand twice")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight {weight} is not a finite number of 0 or more")

    def _add(self, name: str, part: slice, values: Array, weight: float, whole: int) -> None:
        if name in self._floats:
            total, scaled = self._floats[name][part], self._product[: values.size]
            if self._fused and values.dtype == np.float32 and weight < _F32_EXACT and weight % 1 == 0:
                self._fused(total, values, weight)
                return
            np.copyto(scaled, values)
            np.multiply(scaled, weight, out=scaled)
            np.add(total, scaled, out=total)
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

    @property
    def weight(self) -> float:
        """What the updates weigh together so far."""
        return math.fsum(self._weights)

    def sums(self) -> dict[str, Array]:
        """What `mean` divides, of whole weights: float64, and int64 or Python's integers; by name, in their shapes."""
        assert self._denominator == 1, "weights are whole"
        flat = self._floats | {name: sums.sums for name, sums in self._integers.items()}
        return {t.name: flat[t.name].reshape(t.shape) for t in self._layout.tensors}

    def _whole(self, weights: Sequence[float]) -> list[int]:
        """The weights in the unit that makes these and all before them whole; the sums go over to it."""
        fractions = [Fraction(weight) for weight in weights]
        finer = math.lcm(self._denominator, *(fraction.denominator for fraction in fractions))
        for sums in self._integers.values():
            sums.scale(finer // self._denominator)
        self._denominator = finer
        return [int(fraction * finer) for fraction in fractions]


def ring_sum(
    paths: Iterable[Path], dim: int, aux: int, ring_bits: int = 32, *, chunk: int = CHUNK, threads: int = 0
) -> tuple[Array, Array]:
    """The sum of masked uploads: (uint32 (D,) modulo 2³², uint64 (A,) modulo 2⁶⁴).

    ring_bits: 16, 24 or 32, as the uploads have them; the bits of the sum above them mean nothing. The order does not
    matter, nor how many threads add: addition modulo a power of two is exact. Raises BadUpdate for a file of another
    layout.
    """
    layout = masked_layout(dim, aux, ring_bits)
    sums: dict[str, Array] = {"ring": np.zeros(dim, np.uint32), "aux": np.zeros(aux, np.uint64)}
    per_element = {t.name: t.numel // max(len(sums[t.name]), 1) for t in layout.tensors}  # 3 of 24 bits' bytes
    pieces = [(t, first) for t in layout.tensors for first in range(0, t.numel, chunk * (per_element[t.name] or 1))]
    given = list(paths)
    for path in given:
        check_file(path, layout)
    for start in range(0, len(given), TOGETHER):
        with Files(given[start : start + TOGETHER], layout) as files:

            def worker(files: Files = files) -> Callable[[tuple[TensorSpec, int]], None]:
                raw, wide = np.empty(8 * chunk, np.uint8), np.empty(chunk, np.uint32)

                def work(piece: tuple[TensorSpec, int]) -> None:
                    t, first = piece
                    width = per_element[t.name]
                    total = sums[t.name][first // width : first // width + chunk]
                    for values in files.read(t, first, raw.view(DTYPES[t.dtype])[: width * len(total)]):
                        np.add(total, unpack_24(values, wide) if width == 3 else values, out=total)

                return work

            for _ in in_order(worker, pieces, threads=1 if dim <= chunk else threads):
                pass
    return sums["ring"], sums["aux"]


def check_finite(path: Path, layout: Layout, *, chunk: int = CHUNK) -> float:
    """The L2 norm of an update's floating-point tensors, found in one pass; integers do not count.

    Raises BadUpdate naming the first tensor that holds NaN or infinity, or whose values are so large (F64 above about
    1e154) that their squares overflow.
    """
    check_file(path, layout)
    dtypes = {t.name: t.dtype for t in layout.tensors}
    squares: dict[str, float] = {}
    with Files([path], layout) as files:
        for name, _, _, values in files.parts(chunk):
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


class Files:
    """Checked files of one layout, read part by part.

    Read and not mapped: mapped pages count as the process's own memory, a gigabyte for each update of that size, and
    touching one of a file that was cut short ends the process.
    """

    def __init__(self, paths: Sequence[Path], layout: Layout) -> None:
        self._layout = layout
        sizes = [len(layout.header()), *(t.nbytes for t in layout.tensors)]
        self._offsets = dict(zip((t.name for t in layout.tensors), accumulate(sizes), strict=False))
        with ExitStack() as stack:
            self._files = [stack.enter_context(path.open("rb", buffering=0)) for path in paths]
            self._stack = stack.pop_all()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, t: TensorSpec, first: int, values: Array) -> Iterator[Array]:
        """Fill `values` with a tensor's elements from `first` on, of each file in turn; several threads may.

        Raises BadUpdate where a file ends too early.
        """
        at = self._offsets[t.name] + first * values.itemsize
        for file in self._files:
            if os.preadv(file.fileno(), [values.view(np.uint8).data], at) != values.nbytes:
                raise BadUpdate(f"an update ends within {t.name!r}")
            yield values

    def parts(self, chunk: int) -> Iterator[tuple[str, slice, int, Array]]:
        """Tensor by tensor, part by part, the part's values in each file in turn: (name, part, file, values).

        The values are good until the next ones are asked for.
        """
        for t in self._layout.tensors:
            buffer = np.empty(min(chunk, t.numel), DTYPES[t.dtype])
            for start in range(0, t.numel, chunk):
                part = slice(start, min(start + chunk, t.numel))
                for i, values in enumerate(self.read(t, start, buffer[: part.stop - start])):
                    yield t.name, part, i, from_bf16(values) if t.dtype == "BF16" else values
