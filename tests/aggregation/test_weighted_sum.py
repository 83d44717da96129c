"""Sums of updates: numbers to check by hand, the same bits in any order, memory that the cohort does not grow."""

from __future__ import annotations

import math
import os
import random
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from murmur.aggregation import weighted_sum
from murmur.aggregation.weighted_sum import (
    Contribution,
    RunningMean,
    check_finite,
    ring_sum,
    round_half_even,
    weighted_mean,
)
from murmur.protocol.errors import BadUpdate
from murmur.protocol.tensors import DTYPES, Layout, TensorSpec, masked_layout, write_file
from murmur.protocol.wire import pack_ring

MODEL = Layout((TensorSpec("w", "F32", (2,)), TensorSpec("steps", "I64", ())))
UPDATE = MODEL.update()


def contribution(folder: Path, client: str, weight: float, layout: Layout = UPDATE, **arrays: Any) -> Contribution:
    path = folder / f"{client}.safetensors"
    write_file(path, {name: np.asarray(a) for name, a in arrays.items()}, layout)
    return Contribution(client=client, path=path, weight=weight)


def test_mean_is_weighted_by_examples(tmp_path: Path) -> None:
    a = contribution(tmp_path, "a", 1, w=[1.0, -2.0], steps=1)
    b = contribution(tmp_path, "b", 3, w=[5.0, 2.0], steps=3)
    mean = weighted_mean([a, b], UPDATE)
    assert mean["w"].dtype == np.float64
    assert mean["w"].tolist() == [4.0, 1.0]  # (1·1 + 3·5)/4, (−2·1 + 2·3)/4
    assert mean["steps"].dtype == np.int64
    assert int(mean["steps"]) == 2  # 10/4 = 2.5 goes to the even neighbour
    assert mean["steps"].shape == ()


def test_mean_of_one_update_is_that_update(tmp_path: Path) -> None:
    values = np.float32([0.1, 1 / 3])
    mean = weighted_mean([contribution(tmp_path, "a", 7, w=values, steps=5)], UPDATE)
    assert mean["w"].tolist() == values.astype(np.float64).tolist()


def test_a_weight_of_zero_counts_for_nothing(tmp_path: Path) -> None:
    a = contribution(tmp_path, "a", 0, w=[9.0, 9.0], steps=9)
    b = contribution(tmp_path, "b", 2, w=[1.0, 2.0], steps=3)
    mean = weighted_mean([a, b], UPDATE)
    assert (mean["w"].tolist(), int(mean["steps"])) == ([1.0, 2.0], 3)


def test_mean_has_the_same_bits_in_any_order_and_chunk_size(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    layout = Layout((TensorSpec("big", "F32", (7, 11)), TensorSpec("wide", "F64", (5,)), TensorSpec("n", "I64", (3,))))
    cohort = [
        contribution(
            tmp_path,
            f"c{i}",
            float(rng.integers(1, 100)) / 7,
            layout,
            big=(rng.standard_normal((7, 11)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32),
            wide=rng.standard_normal(5) * 1e30,
            n=rng.integers(-(1 << 62), 1 << 62, 3),
        )
        for i in range(20)
    ]
    first = weighted_mean(cohort, layout)
    for chunk in (1, 3, 77, 1 << 16):
        random.Random(seed + chunk).shuffle(cohort)
        again = weighted_mean(cohort, layout, chunk=chunk)
        assert all(first[name].tobytes() == again[name].tobytes() for name in first), (seed, chunk)


def test_the_sum_over_blocks_of_files_is_the_sum_one_by_one_to_the_last_bit(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    clients = 2 * weighted_sum.TOGETHER + 3
    cohort, slow, total = [], np.zeros(2), 0.0
    for i in range(clients):
        values, weight = rng.standard_normal(2).astype(np.float32), float(rng.integers(1, 1000)) / 7
        cohort.append(contribution(tmp_path, f"c{i:03}", weight, w=values, steps=i))
        slow += values.astype(np.float64) * weight
    total = math.fsum(c.weight for c in cohort)
    whole = sum(i * Fraction(c.weight) for i, c in enumerate(cohort)) / sum(Fraction(c.weight) for c in cohort)
    mean = weighted_mean(cohort, UPDATE)
    assert mean["w"].tobytes() == (slow / total).tobytes(), seed
    assert int(mean["steps"]) == round(whole), seed


def test_a_file_that_is_cut_short_while_it_is_summed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = contribution(tmp_path, "a", 1, w=[1.0, 1.0], steps=1)
    monkeypatch.setattr(weighted_sum, "check_file", lambda path, layout: os.truncate(path, path.stat().st_size - 1))
    with pytest.raises(BadUpdate, match="ends within"):
        weighted_mean([a], UPDATE)


def test_float32_alone_would_lose_what_the_mean_keeps(tmp_path: Path) -> None:
    # 1e8 + 1 − 1e8 is 0 in float32
    big = contribution(tmp_path, "a", 1, w=[1e8, 0.0], steps=0)
    one = contribution(tmp_path, "b", 1, w=[1.0, 0.0], steps=0)
    less = contribution(tmp_path, "c", 1, w=[-1e8, 0.0], steps=0)
    assert weighted_mean([big, one, less], UPDATE)["w"][0] == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "weights", "mean"),
    [
        ([1, 2], [1, 1], 2),  # 1.5
        ([2, 3], [1, 1], 2),  # 2.5
        ([-1, -2], [1, 1], -2),  # −1.5
        ([-1, 0], [1, 1], 0),  # −0.5
        ([0, 1], [2, 1], 0),
        ([0, 1], [1, 2], 1),
        ([1, 2], [0.5, 0.25], 1),  # 4/3
        ([(1 << 63) - 1, (1 << 63) - 1], [1 << 31, 1 << 31], (1 << 63) - 1),
        ([-(1 << 63), -(1 << 63)], [3, 1 << 31], -(1 << 63)),
        ([(1 << 62) + 1, (1 << 62) + 2], [1, 1], (1 << 62) + 2),  # ….5: float64 could not tell
        ([4, 8], [1e-300, 3e-300], 7),
    ],
)
def test_integers_are_averaged_exactly(tmp_path: Path, values: list[int], weights: list[float], mean: int) -> None:
    cohort = [
        contribution(tmp_path, f"c{i}", w, w=[0.0, 0.0], steps=np.int64(v))
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    ]
    assert int(weighted_mean(cohort, UPDATE)["steps"]) == mean


def test_rounding_agrees_with_fractions() -> None:
    numerators = np.arange(-50, 51)
    for denominator in range(1, 12):
        expected = [round(Fraction(int(n), denominator)) for n in numerators]  # Python rounds fractions half to even
        assert round_half_even(numerators, denominator).tolist() == expected
        assert round_half_even(numerators.astype(object), denominator).tolist() == expected


def test_a_client_that_stands_twice_is_refused(tmp_path: Path) -> None:
    a = contribution(tmp_path, "a", 1, w=[1.0, 1.0], steps=0)
    with pytest.raises(ValueError, match="twice"):
        weighted_mean([a, a], UPDATE)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], []])
def test_weights_that_give_no_mean_are_refused(tmp_path: Path, weights: list[float]) -> None:
    cohort = [contribution(tmp_path, f"c{i}", w, w=[1.0, 1.0], steps=0) for i, w in enumerate(weights)]
    with pytest.raises(ValueError, match="weight"):
        weighted_mean(cohort, UPDATE)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    other = Layout((TensorSpec("w", "F32", (3,)), TensorSpec("steps", "I64", ())))
    a = contribution(tmp_path, "a", 1, other, w=[1.0, 1.0, 1.0], steps=0)
    with pytest.raises(BadUpdate, match="shape"):
        weighted_mean([a], UPDATE)


def test_bf16_f16_and_bool_travel_as_f32_or_not_at_all(tmp_path: Path) -> None:
    specs = (("h", "F16"), ("b", "BF16"), ("d", "F64"), ("mask", "BOOL"), ("u", "U8"))
    update = Layout(tuple(TensorSpec(name, dtype, (1,)) for name, dtype in specs)).update()
    values = {"h": [0.5], "b": [0.25], "d": [1e-300], "u": [2]}
    mean = weighted_mean([contribution(tmp_path, "a", 1, update, **values)], update)
    assert {name: array.tolist() for name, array in mean.items()} == values


def test_updates_can_be_added_as_they_are_made_and_deleted_at_once(tmp_path: Path) -> None:
    given = [(0.5, [1.0, 2.0], 3), (0.125, [5.0, -2.0], 4), (2.0, [0.0, 1.0], 9)]
    cohort = [contribution(tmp_path, f"c{i}", w, w=x, steps=n) for i, (w, x, n) in enumerate(given)]
    whole, running = weighted_mean(cohort, UPDATE), RunningMean(UPDATE)
    for part in cohort:
        running.add(part)
        part.path.unlink()
    mean = running.mean()
    assert all(whole[name].tobytes() == mean[name].tobytes() for name in whole)
    assert int(mean["steps"]) == 8  # (1.5 + 0.5 + 18) / 2.625 = 7.6


def test_one_pass_has_the_bits_of_three_and_is_not_asked_where_it_could_round_otherwise() -> None:
    wire = Layout((TensorSpec("wide", "F64", (500,)), TensorSpec("w", "F32", (500,)))).update()
    asked: list[tuple[str, float]] = []

    def rounded_once(total: np.ndarray[Any, Any], values: np.ndarray[Any, Any], weight: float) -> None:
        asked.append((str(values.dtype), weight))
        exact = (Fraction(float(t)) + Fraction(float(v)) * Fraction(weight) for t, v in zip(total, values, strict=True))
        total[:] = np.array([float(sum_) for sum_ in exact])

    rng = np.random.default_rng(5)
    plain, fused = RunningMean(wire), RunningMean(wire, fused=rounded_once)
    for k, weight in enumerate((60, 1, 7.0, 0.1, (1 << 29) - 1, (1 << 29) + 1)):
        parts = [(t.name, slice(0, 500), rng.standard_normal(500).astype(DTYPES[t.dtype])) for t in wire.tensors]
        for mean in (plain, fused):
            mean.add_parts(f"client-{k}", weight, parts)
    assert asked == [("float32", 60), ("float32", 1), ("float32", 7.0), ("float32", (1 << 29) - 1)]
    one, other = plain.mean(), fused.mean()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_ids_must_ascend_so_that_the_sum_has_one_order(tmp_path: Path) -> None:
    running = RunningMean(UPDATE)
    running.add(contribution(tmp_path, "b", 1, w=[1.0, 1.0], steps=0))
    with pytest.raises(ValueError, match="ascend"):
        running.add(contribution(tmp_path, "a", 1, w=[1.0, 1.0], steps=0))


def test_memory_is_that_of_one_model_however_many_updates(tmp_path: Path) -> None:
    numel = 500_000
    layout = Layout((TensorSpec("w", "F32", (numel,)),))
    peaks: list[int] = []
    for clients in (2, 24):
        folder = tmp_path / str(clients)
        folder.mkdir()
        one = np.ones(numel, np.float32)
        cohort = [contribution(folder, f"c{i}", 1, layout, w=one) for i in range(clients)]
        tracemalloc.start()
        weighted_mean(cohort, layout)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < numel * 8 + 4_000_000  # the float64 sum, and a few chunks
    assert abs(peaks[1] - peaks[0]) < 500_000


def masked(folder: Path, name: str, ring: list[int], aux: list[int]) -> Path:
    path = folder / name
    arrays = {"ring": np.array(ring, np.uint32), "aux": np.array(aux, np.uint64)}
    write_file(path, arrays, masked_layout(len(ring), len(aux)))
    return path


def test_masked_uploads_add_modulo_powers_of_two(tmp_path: Path) -> None:
    a = masked(tmp_path, "a", [(1 << 32) - 1, 5, 0], [(1 << 64) - 1, 3])
    b = masked(tmp_path, "b", [2, 6, 0], [4, 4])
    for paths in ([a, b], [b, a]):
        ring, aux = ring_sum(paths, 3, 2, chunk=2)
        assert (ring.dtype, aux.dtype) == (np.uint32, np.uint64)
        assert (ring.tolist(), aux.tolist()) == ([1, 11, 0], [3, 7])


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
@pytest.mark.parametrize("dim", [0, 1, 9, 10, 11, 31])
def test_rings_of_every_width_add_alike_in_any_number_of_threads(tmp_path: Path, ring_bits: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    words = rng.integers(0, 1 << ring_bits, (40, dim), np.uint32)  # more files than are open at a time
    layout = masked_layout(dim, 2, ring_bits)
    for i, row in enumerate(words):
        packed = pack_ring(row, ring_bits).view(DTYPES[layout.tensors[1].dtype])
        write_file(tmp_path / str(i), {"ring": packed, "aux": np.array([i, 1], np.uint64)}, layout)
    for threads in (1, 3):
        ring, aux = ring_sum([tmp_path / str(i) for i in range(40)], dim, 2, ring_bits, chunk=10, threads=threads)
        low = np.uint32((1 << ring_bits) - 1)
        assert np.array_equal(ring & low, words.sum(0, dtype=np.uint32) & low)
        assert aux.tolist() == [780, 40]


@pytest.mark.parametrize("ring_bits", [16, 24])
def test_an_upload_of_another_ring_is_refused(tmp_path: Path, ring_bits: int) -> None:
    path = masked(tmp_path, "a", [1, 2], [1])
    with pytest.raises(BadUpdate, match="ring"):
        ring_sum([path], 2, 1, ring_bits)


def test_a_masked_upload_of_another_length_is_refused(tmp_path: Path) -> None:
    a, b = masked(tmp_path, "a", [1, 2], [1]), masked(tmp_path, "b", [1, 2, 3], [1])
    with pytest.raises(BadUpdate, match="ring"):
        ring_sum([a, b], 2, 1)


def test_norm_of_an_update_counts_floats_only(tmp_path: Path) -> None:
    a = contribution(tmp_path, "a", 1, w=[3.0, 4.0], steps=1000)
    assert check_finite(a.path, UPDATE, chunk=1) == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_nan_and_infinity_are_refused_by_the_tensors_name(tmp_path: Path, bad: float, at: int) -> None:
    layout = Layout((TensorSpec("fine", "F32", (5,)), TensorSpec("layer.bias", "F32", (5,))))
    values = np.ones(5, np.float32)
    values[at] = bad
    a = contribution(tmp_path, "a", 1, layout, fine=np.ones(5), **{"layer.bias": values})
    with pytest.raises(BadUpdate, match=r"layer\.bias"):
        check_finite(a.path, layout, chunk=2)


def test_the_largest_float32_is_finite_but_squares_beyond_float64_are_refused(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("s", "F32", (1,)), TensorSpec("d", "F64", (1,))))
    a = contribution(tmp_path, "a", 1, layout, s=[3.4e38], d=[0.0])
    assert check_finite(a.path, layout) == pytest.approx(3.4e38)
    b = contribution(tmp_path, "b", 1, layout, s=[0.0], d=[1e200])
    with pytest.raises(BadUpdate, match="'d'"):
        check_finite(b.path, layout)
