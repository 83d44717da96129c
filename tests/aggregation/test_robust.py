"""Robust rules against numpy on whole arrays, by hand, and against updates that are anything."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from murmur.aggregation import robust
from murmur.aggregation.robust import combined, combined_groups, cut_of, krum, write_group_mean
from murmur.aggregation.weighted_sum import Contribution
from murmur.protocol.errors import BadUpdate
from murmur.protocol.sections import Strategy
from murmur.protocol.tensors import Layout, TensorSpec, write_file

UPDATE = Layout((TensorSpec("w", "F32", (2,)), TensorSpec("steps", "I64", ())))
MIXED = Layout((TensorSpec("big", "F32", (7, 11)), TensorSpec("wide", "F64", (5,)), TensorSpec("n", "I64", (3,))))


def cohort(folder: Path, layout: Layout, updates: list[dict[str, Any]]) -> list[Contribution]:
    found = []
    for k, arrays in enumerate(updates):
        path = folder / f"{k:03}.safetensors"
        write_file(path, {name: np.asarray(a) for name, a in arrays.items()}, layout)
        found.append(Contribution(client=f"c{k:03}", path=path, weight=1.0 + k))
    return found


def drawn(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    return [
        {
            "big": (rng.standard_normal((7, 11)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32),
            "wide": rng.standard_normal(5) * 1e30,
            "n": rng.integers(-(1 << 62), 1 << 62, 3),
        }
        for _ in range(count)
    ]


def seeded() -> np.random.Generator:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return np.random.default_rng(seed)


def by_column(rows: list[Any], rule: Callable[[list[Any]], Any]) -> np.ndarray[Any, Any]:
    stacked = np.stack([np.ravel(r) for r in rows])
    return np.array([rule(sorted(column.tolist())) for column in stacked.T])


def test_the_median_is_the_middle_value_of_each_coordinate(tmp_path: Path) -> None:
    values = [([1.0, -5.0], 3), ([2.0, 9.0], 4), ([900.0, 1.0], -70)]
    given = cohort(tmp_path, UPDATE, [{"w": w, "steps": steps} for w, steps in values])
    found = combined(given, UPDATE, Strategy(combine="median"))
    assert (found["w"].tolist(), int(found["steps"])) == ([2.0, 1.0], 3)
    assert (found["w"].dtype, found["steps"].dtype, found["steps"].shape) == (np.float64, np.int64, ())


def test_the_trimmed_mean_cuts_the_ends_of_each_coordinate(tmp_path: Path) -> None:
    values = [([1.0, 2.0], 0), ([2.0, 4.0], 1), ([4.0, -8.0], 2), ([1e9, 6.0], 2), ([-1e9, 1e9], 900)]
    given = cohort(tmp_path, UPDATE, [{"w": w, "steps": steps} for w, steps in values])
    found = combined(given, UPDATE, Strategy(combine="trimmed_mean", trim=0.2))
    np.testing.assert_allclose(found["w"], [7 / 3, 4.0], rtol=1e-15)  # 1 2 4 of five, and 2 4 6
    assert int(found["steps"]) == 2  # (1 + 2 + 2) / 3 = 1.67


@pytest.mark.parametrize(("count", "share", "cut"), [(15, 0.2, 3), (5, 0.1, 1), (30, 0.1, 3), (3, 0.4, 1), (6, 0.4, 2)])
def test_the_share_is_rounded_up_and_leaves_a_value(count: int, share: float, cut: int) -> None:
    assert cut_of(count, share) == cut


@pytest.mark.parametrize("count", [1, 2, 3, 8, 15])
def test_the_rules_are_numpys_on_whole_arrays(tmp_path: Path, count: int) -> None:
    updates = drawn(seeded(), count)
    given = cohort(tmp_path, MIXED, updates)
    middle = combined(given, MIXED, Strategy(combine="median"))
    trimmed = combined(given, MIXED, Strategy(combine="trimmed_mean", trim=0.2))
    cut = cut_of(count, 0.2)
    for name in ("big", "wide"):
        rows = [u[name].astype(np.float64) for u in updates]
        assert np.array_equal(middle[name], np.median(rows, axis=0))
        oracle = by_column(rows, lambda c: math.fsum(c[cut : count - cut]) / (count - 2 * cut))
        scale = max(np.abs(r).max() for r in rows)
        np.testing.assert_allclose(trimmed[name].ravel(), oracle, rtol=1e-12, atol=scale * 1e-13)
    rows = [u["n"] for u in updates]
    exact = by_column(rows, lambda c: round(Fraction(c[(count - 1) // 2] + c[count // 2], 2)))
    assert middle["n"].tolist() == exact.tolist()
    exact = by_column(rows, lambda c: round(Fraction(sum(c[cut : count - cut]), count - 2 * cut)))
    assert trimmed["n"].tolist() == exact.tolist()


@pytest.mark.parametrize("combine", ["median", "trimmed_mean", "krum"])
def test_a_rule_has_the_same_bits_in_any_order_and_part_size(
    tmp_path: Path, combine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = seeded()
    given = cohort(tmp_path, MIXED, drawn(rng, 9))
    strategy = Strategy(combine=combine, byzantine=2, selected=3)
    first = combined(given, MIXED, strategy)
    for values in (9, 27, 9 * 50):
        monkeypatch.setattr(robust, "VALUES", values)
        mixed = [given[i] for i in rng.permutation(len(given))]
        found = combined(mixed, MIXED, strategy)
        assert all(found[t.name].tobytes() == first[t.name].tobytes() for t in MIXED.tensors)


def closest(vectors: list[np.ndarray[Any, Any]], f: int) -> list[int]:
    """Krum's order, as the paper writes it down."""
    scores = []
    for i, v in enumerate(vectors):
        apart = sorted(float(((v - u) ** 2).sum()) for j, u in enumerate(vectors) if j != i)
        scores.append(sum(apart[: len(vectors) - f - 2]))
    return sorted(range(len(vectors)), key=lambda i: (scores[i], i))


@pytest.mark.parametrize(("count", "f", "m"), [(3, 0, 1), (7, 2, 1), (7, 2, 5), (12, 3, 4)])
def test_krum_selects_as_the_paper_does(tmp_path: Path, count: int, f: int, m: int) -> None:
    rng = seeded()
    updates = [{"w": rng.standard_normal(2).astype(np.float32), "steps": k} for k in range(count)]
    given = cohort(tmp_path, UPDATE, updates)
    oracle = sorted(closest([u["w"].astype(np.float64) for u in updates], f)[:m])
    assert [given.index(c) for c in krum(given, UPDATE, byzantine=f, selected=m)] == oracle
    found = combined(given, UPDATE, Strategy(combine="krum", byzantine=f, selected=m))
    np.testing.assert_allclose(found["w"], np.mean([updates[i]["w"] for i in oracle], axis=0, dtype=np.float64))


def test_of_updates_that_lie_as_close_krum_takes_the_first_by_id(tmp_path: Path) -> None:
    given = cohort(tmp_path, UPDATE, [{"w": [1.0, 1.0], "steps": 0}] * 4)
    assert krum(given[::-1], UPDATE, byzantine=0) == [given[3]]  # as they are given: `combined` sorts them
    assert combined(given[::-1], UPDATE, Strategy(combine="krum"))["w"].tolist() == [1.0, 1.0]


def test_krum_needs_three_more_than_twice_the_poisoned(tmp_path: Path) -> None:
    given = cohort(tmp_path, UPDATE, [{"w": [1.0, 1.0], "steps": 0}] * 6)
    with pytest.raises(BadUpdate, match="6 updates are there, Krum needs 7"):
        combined(given, UPDATE, Strategy(combine="krum", byzantine=2))


@pytest.mark.parametrize("combine", ["median", "trimmed_mean", "krum"])
def test_two_poisoned_of_nine_stay_within_the_honest_range_and_ruin_the_mean(tmp_path: Path, combine: Any) -> None:
    rng = seeded()
    honest = [rng.standard_normal(2).astype(np.float32) for _ in range(7)]
    poisoned = [np.float32([1e6, -1e6]), np.float32([1e6, 1e6])]
    given = cohort(tmp_path, UPDATE, [{"w": w, "steps": 1} for w in (*honest, *poisoned)])
    found = combined(given, UPDATE, Strategy(combine=combine, trim=0.2, byzantine=2))["w"]
    assert np.all(found >= np.min(honest, axis=0)) and np.all(found <= np.max(honest, axis=0))
    assert np.abs(combined(given, UPDATE, Strategy())["w"]).max() > 1e4


def test_a_weight_buys_nothing_and_a_weight_of_zero_is_no_vote(tmp_path: Path) -> None:
    given = cohort(tmp_path, UPDATE, [{"w": [k, k], "steps": k} for k in (1, 2, 3, 90)])
    greedy = [*given[:3], Contribution(client="d", path=given[3].path, weight=1e6)]
    assert combined(greedy, UPDATE, Strategy(combine="median"))["w"].tolist() == [2.5, 2.5]
    silent = [*given[:3], Contribution(client="d", path=given[3].path, weight=0)]
    assert combined(silent, UPDATE, Strategy(combine="median"))["w"].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="nothing to combine"):
        combined([silent[3]], UPDATE, Strategy(combine="median"))


def test_narrow_updates_are_widened_first(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "BF16", (1,)),))
    bits = [0x3F80, 0x4000, 0x4080]  # 1, 2, 4
    given = cohort(tmp_path, layout, [{"w": np.array([b], np.uint16)} for b in bits])
    assert combined(given, layout, Strategy(combine="median"))["w"].tolist() == [2.0]


def test_an_update_of_another_layout_is_refused(tmp_path: Path) -> None:
    given = cohort(tmp_path, UPDATE, [{"w": [1.0, 1.0], "steps": 0}] * 3)
    given[1].path.write_bytes(b"short")
    with pytest.raises(BadUpdate):
        combined(given, UPDATE, Strategy(combine="median"))


def test_groups_means_count_alike_and_keep_their_float64(tmp_path: Path) -> None:
    means = {}
    for n, value in {1: 0.1, 2: 1 / 3, 10: 7.0}.items():
        means[n] = tmp_path / str(n)
        write_group_mean(means[n], {"w": np.full(2, value), "steps": np.int64(n)}, UPDATE)
    found = combined_groups(means, UPDATE, Strategy(combine="median"))
    assert (found["w"].tolist(), int(found["steps"])) == ([1 / 3, 1 / 3], 2)


def test_memory_is_that_of_a_model_and_a_part_of_each_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "VALUES", 20 * 1000)
    layout = Layout((TensorSpec("w", "F32", (100_000,)),))
    given = cohort(tmp_path, layout, [{"w": np.full(100_000, k, np.float32)} for k in range(20)])
    tracemalloc.start()
    found = combined(given, layout, Strategy(combine="median"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["w"][0] == 9.5
    assert peak < 800_000 + 2 * 20 * 1000 * 8 + 300_000  # the result, two kinds of rows, and what files and sorts take
