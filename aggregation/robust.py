"""How updates combine: the weighted mean, or a rule that bounds what a poisoned update can do to the result.

The robust rules count every update alike. A weight is what a client says of itself, and a poisoned one would say the
most; an update of weight 0 is left out, for its client trained on nothing. They read the files of the cohort side by
side, part by part, so memory is that of one model and of one part of each update, and all files are open at a time.
The order of arrival changes no bit: values are sorted, updates stand in the order of client ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import BadUpdate
from ..protocol.sections import Strategy
from ..protocol.tensors import FLOATS, Layout, TensorSpec, check_file, write_file
from .weighted_sum import CHUNK, Contribution, Files, round_half_even, weighted_mean

# K = updates, P = elements of a part of the model

Array = np.ndarray[Any, Any]
VALUES = 1 << 22  # of all updates' parts together, in 8 bytes each; small parts for large cohorts


def combined(updates: Iterable[Contribution], layout: Layout, strategy: Strategy) -> dict[str, Array]:
    """What a strategy makes of plain updates: by name, floats as float64, integers as int64, as `weighted_mean` does.

    layout: of the updates, F32, BF16, F64 and I64. Their values are finite, which the coordinator checks at the door.
    Raises BadUpdate where a file has another layout or updates are too few for the rule, ValueError without any.
    """
    if strategy.combine == "mean":
        return weighted_mean(updates, layout)
    given = sorted((u for u in updates if u.weight), key=lambda u: u.client)
    if not given:
        raise ValueError("the weights sum to nothing: there is nothing to combine")
    if strategy.combine == "krum":
        chosen = krum(given, layout, byzantine=strategy.byzantine, selected=strategy.selected)
        return weighted_mean([replace(u, weight=1.0) for u in chosen], layout)
    rule = median if strategy.combine == "median" else trimmed_by(strategy.trim)
    found = {t.name: np.empty(t.numel, np.float64 if t.dtype in FLOATS else np.int64) for t in layout.tensors}
    for name, part, rows_KP in _side_by_side(given, layout):
        rows_KP.sort(axis=0)
        found[name][part] = rule(rows_KP)
    return {t.name: found[t.name].reshape(t.shape) for t in layout.tensors}


def median(sorted_KP: Array) -> Array:
    """(P,) The middle one of each column; of two middle ones the mean, which for integers is rounded half to even.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", Definition 1, arXiv:1803.01498.
    """
    low, high = sorted_KP[(len(sorted_KP) - 1) // 2], sorted_KP[len(sorted_KP) // 2]
    if low.dtype.kind == "f":
        return low / 2 + high / 2
    down = (low & high) + ((low ^ high) >> 1)  # the mean rounded down, which never overflows
    return down + ((low ^ high) & down & 1)


def trimmed_by(share: float) -> Callable[[Array], Array]:
    """The rule that cuts this share of each column's values at each end, and takes the mean of the others.

    Of K values `cut_of(K)` are cut at each end. Integers: the exact mean, rounded half to even.
    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", Definition 2, arXiv:1803.01498.
    """

    def trimmed_mean(sorted_KP: Array) -> Array:
        cut = cut_of(len(sorted_KP), share)
        kept = sorted_KP[cut : len(sorted_KP) - cut]
        if kept.dtype.kind != "f":
            return round_half_even(kept.astype(object).sum(axis=0), len(kept)).astype(np.int64)
        total = kept[0].copy()
        for row in kept[1:]:  # numpy's own sum takes another order for narrow parts
            total += row
        return total / len(kept)

    return trimmed_mean


def cut_of(count: int, share: float) -> int:
    """How many of `count` values are cut at each end: the share rounded up, so long as one value is left."""
    return min(math.ceil(round(share * count, 9)), (count - 1) // 2)


def krum(given: Sequence[Contribution], layout: Layout, *, byzantine: int, selected: int = 1) -> list[Contribution]:
    """The `selected` updates that lie closest to their nearest n - byzantine - 2 others; multi-Krum for more than one.

    Close is the squared L2 distance over all floating-point tensors. Of two that are as close, the first by id.
    Raises BadUpdate for fewer than 2 · byzantine + 3 updates.
    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 4.
    """
    n = len(given)
    if n < 2 * byzantine + 3:
        raise BadUpdate(f"{n} updates are there, Krum needs {2 * byzantine + 3} where {byzantine} may be poisoned")
    squares_KK = np.zeros((n, n))
    for _, _, rows_KP in _side_by_side(given, layout):
        if rows_KP.dtype.kind == "f":
            for i in range(n - 1):
                apart = rows_KP[i + 1 :] - rows_KP[i]
                squares_KK[i, i + 1 :] += np.einsum("kp,kp->k", apart, apart)
    squares_KK += squares_KK.T
    np.fill_diagonal(squares_KK, np.inf)  # nobody is its own neighbour
    scores_K = np.sort(squares_KK, axis=1)[:, : n - byzantine - 2].sum(axis=1)
    order = np.argsort(scores_K, kind="stable")[: min(selected, n - byzantine)]
    return [given[i] for i in sorted(order)]


def write_group_mean(path: Path, mean: Mapping[str, Array], layout: Layout) -> None:
    """Keep a group's mean update (as `weighted_mean` and `unflatten` give it) for `combined_groups`."""
    write_file(path, mean, _wide(layout))


def combined_groups(means: Mapping[int, Path], layout: Layout, strategy: Strategy) -> dict[str, Array]:
    """What a strategy makes of groups' means, by group number, each group counting alike; layout: of an update."""
    given = [Contribution(client=f"{n:06}", path=path, weight=1.0) for n, path in means.items()]
    return combined(given, _wide(layout), strategy)


def _wide(layout: Layout) -> Layout:
    """A mean's layout: what is added up in float64 stays so."""
    return Layout(tuple(TensorSpec(t.name, "F64" if t.dtype in FLOATS else "I64", t.shape) for t in layout.tensors))


def _side_by_side(given: Sequence[Contribution], layout: Layout) -> Iterator[tuple[str, slice, Array]]:
    """Tensor by tensor, part by part: (name, part, (K, P) its values in each update, float64 or int64).

    The values may be changed, and are good until the next ones are asked for.
    """
    for update in given:
        check_file(update.path, layout)
    floats = {t.name for t in layout.tensors if t.dtype in FLOATS}
    chunk = min(CHUNK, max(1, VALUES // len(given)))
    rows = {kind: np.empty((len(given), chunk), kind) for kind in (np.float64, np.int64)}
    with Files([update.path for update in given], layout) as files:
        for name, part, i, values in files.parts(chunk):
            rows_KP = rows[np.float64 if name in floats else np.int64][:, : values.size]
            rows_KP[i] = values
            if i == len(given) - 1:
                yield name, part, rows_KP
