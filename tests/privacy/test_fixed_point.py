"""Fixed point: no overflow for a whole cohort, no silent clipping, no NaN, and how exact the mean is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.fixed_point import Quantizer, chunks, count_clipped, decode, quantize, scale, value_bits
from murmur.privacy.masks import CHUNK
from murmur.protocol.errors import BadUpdate


def test_value_bits_leave_room_for_the_cohort():
    assert [value_bits(n) for n in (3, 4, 7, 8, 10, 1000)] == [30, 29, 29, 28, 28, 22]
    for n in range(1, 3000):
        bits = value_bits(n)
        assert bits == 32 - math.ceil(math.log2(n + 1))
        assert n * (2 ** (bits - 1) - 1) < 2**31


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(3, 300),
    clip=st.floats(1e-6, 1e6),
    max_weight=st.integers(1, 1 << 31),
    dtype=st.sampled_from([np.float32, np.float64]),
    sign=st.sampled_from([-1, 1]),
)
def test_the_largest_updates_of_a_whole_cohort_do_not_wrap(n, clip, max_weight, dtype, sign):
    largest = np.array([sign * 3e38, sign * clip, sign * np.nextafter(clip, 0)], dtype)
    word = quantize(largest, weight=max_weight, clip_value=clip, max_weight=max_weight, n=n)
    unit = 2 ** (value_bits(n) - 1) - 1
    assert np.abs(word.view(np.int32).astype(np.int64)).max() == unit
    total = np.zeros(3, np.uint32)
    for _ in range(n):
        total += word
    mean = decode(total, clip_value=clip, max_weight=max_weight, n=n) / (n * max_weight)
    assert mean == pytest.approx([sign * clip] * 3, rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), n=st.integers(3, 40), dim=st.integers(0, 50))
def test_the_sum_is_right_to_half_a_unit_per_client(seed, n, dim):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 500, n)
    updates = rng.normal(0, 1, (n, dim))
    total = np.zeros(dim, np.uint32)
    exact = np.zeros(dim)
    for update, weight in zip(updates, weights, strict=True):
        total += quantize(update, weight=int(weight), clip_value=2.0, max_weight=500, n=n)
        exact += np.clip(update, -2, 2) * weight
    error = np.abs(decode(total, clip_value=2.0, max_weight=500, n=n) - exact)
    assert (error <= 0.5001 * n / scale(2.0, 500, n)).all()


@pytest.mark.parametrize(
    ("clip", "max_weight", "weight", "worst"),
    [
        (0.08, 100, 100, 3e-8),  # bounds that fit: eight sigma, the weight that all have
        (8.0, 100, 100, 3e-6),  # a clip value a hundred times too wide costs a hundredfold
        (8.0, 65536, 600, 4e-4),  # the recipe's defaults with 600 examples each
    ],
)
def test_error_of_the_weighted_mean_for_ten_clients(clip, max_weight, weight, worst):
    """Updates of N(0, 0.01): rms error of the mean against its rms, measured."""
    rng = np.random.default_rng(7)
    n, dim = 10, 20_000
    total, exact = np.zeros(dim, np.uint32), np.zeros(dim)
    for _ in range(n):
        update = rng.normal(0, 0.01, dim).astype(np.float32)
        total += quantize(update, weight=weight, clip_value=clip, max_weight=max_weight, n=n)
        exact += update.astype(np.float64) * weight
    error = (decode(total, clip_value=clip, max_weight=max_weight, n=n) - exact) / (n * weight)
    relative = float(np.sqrt((error**2).mean()) / np.sqrt(((exact / (n * weight)) ** 2).mean()))
    print(f"clip {clip}, max_weight {max_weight}, weight {weight}: relative rms error of the mean {relative:.2e}")
    assert worst / 10 < relative < worst


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 65535, 65536, 70000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_not_finite_is_refused_with_its_position(bad, at, dtype):
    values = np.ones(70001, dtype)
    values[at] = bad
    with pytest.raises(BadUpdate, match=f"element {at} of the update is {bad}") as refused:
        quantize(values, weight=1, clip_value=1.0, max_weight=1, n=3)
    assert refused.value.facts["element"] == at
    with pytest.raises(BadUpdate, match=f"element {at + 5} "):
        count_clipped(values, 1.0, start=5)


def test_what_is_clipped_is_counted():
    values = np.array([0.5, -0.5, 1.0, -1.0, 1.1, -7.0, 0.0], np.float32)
    assert count_clipped(values, 1.0) == 2
    assert count_clipped(values, 0.75) == 4
    assert count_clipped(np.zeros(0, np.float32), 1.0) == 0


def test_a_weight_beyond_its_bound_is_refused():
    for weight in (-1, 11):
        with pytest.raises(BadUpdate, match="weighs"):
            Quantizer(weight=weight, clip_value=1.0, max_weight=10, n=3)


def test_only_vectors_of_floats_are_updates():
    for wrong in (np.zeros((2, 2), np.float32), np.zeros(3, np.int64), np.zeros(3, np.float16)):
        with pytest.raises(ValueError, match="an update is a vector"):
            count_clipped(wrong, 1.0)


@pytest.mark.parametrize("dim", [0, 1, 65535, 65536, 65537, 2 * CHUNK + 1])
def test_how_an_update_is_cut_does_not_change_its_chunks(dim):
    values = np.random.default_rng(dim).normal(0, 0.3, dim)
    for cuts in ([], [0, 0], [1], [dim // 2], [dim // 3, dim // 2], [65536], [65535, 65537]):
        pieces = np.split(values, [c for c in cuts if c <= dim])
        found = list(chunks(pieces, dim))
        assert [len(w) for _, w in found] == [CHUNK] * (dim // CHUNK) + [dim % CHUNK] * (dim % CHUNK > 0)
        assert [position for position, _ in found] == list(range(0, dim, CHUNK))
        assert np.array_equal(np.concatenate([np.zeros(0), *(w for _, w in found)]), values)


@pytest.mark.parametrize(("given", "dim"), [(3, 4), (5, 4), (0, 1), (1, 0)])
def test_too_many_or_too_few_values_are_refused(given, dim):
    with pytest.raises(BadUpdate, match="elements"):
        list(chunks([np.zeros(given)], dim))
