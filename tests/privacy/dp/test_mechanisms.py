"""The noise against the normal distribution, the clip against its bound."""

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from murmur.privacy.dp.mechanisms import (
    TAIL,
    Noise,
    add_noise,
    check_model,
    clip_factor,
    is_unclipped,
    l2_norm,
)
from murmur.privacy.masks import Keystream
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.tensors import Layout, TensorSpec

N = 1 << 20


def fresh() -> Noise:
    key = os.urandom(32)
    print("key", key.hex())  # a failure is taken again with Noise(bytes.fromhex(...))
    return Noise(key)


def normals(noise: Noise, n: int = N, sigma: float = 1.0, *, whole: bool = False) -> np.ndarray:
    values = np.zeros(n)
    noise.add(values, sigma, whole=whole)
    return values


def test_noise_is_standard_normal():
    values = normals(fresh())
    assert stats.kstest(values, "norm").pvalue > 1e-6
    # 5 sigma of each moment's own deviation: 1/n, 2/n, 15/n, 96/n
    assert abs(values.mean()) < 5 * math.sqrt(1 / N)
    assert abs((values**2).mean() - 1) < 5 * math.sqrt(2 / N)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / N)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / N)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(N)


def test_its_cells_are_as_full_as_those_of_a_normal():
    edges = stats.norm.ppf(np.linspace(0, 1, 65))
    counts, _ = np.histogram(normals(fresh()), np.clip(edges, -20, 20))
    assert stats.chisquare(counts).pvalue > 1e-6


def test_rounded_noise_is_whole_and_has_the_deviation_of_normal_and_rounding():
    values = normals(fresh(), sigma=64.0, whole=True)
    assert np.array_equal(values, np.rint(values))
    assert (values**2).mean() == pytest.approx(64**2 + 1 / 12, rel=5 * math.sqrt(2 / N))


def test_noise_is_box_and_mullers_of_the_keystream():
    """The first block, value by value from the same bits."""
    raw = bytearray(1 << 18)
    Keystream(bytes(32)).into(memoryview(raw))
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(1 << 15)]
    half = 1 << 14
    values = normals(Noise(bytes(32)), 1 << 15)
    for i in (0, 1, half - 1):
        radius = math.sqrt(-2 * math.log((words[i] + 1) / 2**64))
        angle = 2 * math.pi * words[half + i] / 2**64
        assert values[i] == pytest.approx(radius * math.cos(angle), abs=1e-12)
        assert values[half + i] == pytest.approx(radius * math.sin(angle), abs=1e-12)


def test_the_tail_is_that_of_the_smallest_uniform():
    assert pytest.approx(math.sqrt(-2 * math.log(2.0**-64))) == TAIL
    assert 2 * stats.norm.sf(TAIL) < 2.0**-67


def test_how_noise_is_cut_does_not_change_it():
    whole = normals(Noise(bytes(range(32))), 70_000)
    noise, pieces = Noise(bytes(range(32))), []
    for n in (1, 0, 32_767, 32_769, 4_463):
        pieces.append(normals(noise, n))
    assert np.array_equal(np.concatenate(pieces), whole)


def test_two_sums_get_different_noise():
    assert not np.array_equal(normals(Noise(), 100), normals(Noise(), 100))


def test_a_noisy_sum_lies_on_a_grid_that_is_fine_against_the_noise():
    values = np.full(10_000, 0.1)
    add_noise(values, 3.0, fresh())
    grid = 2.0**-19  # 3 / 2^20 down to a power of two
    assert np.array_equal(values / grid, np.rint(values / grid))
    assert values.std() == pytest.approx(3.0, rel=5 * math.sqrt(1 / 20_000))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
)
def test_a_clipped_update_stays_within_the_bound_after_rounding_to_float32(values: list[float], bound: float):
    update = np.array(values, np.float32)
    norm = l2_norm([update])
    clipped = (update * np.float64(clip_factor(norm, bound))).astype(np.float32)
    assert l2_norm([clipped]) <= bound
    if norm <= bound * (1 - 2.0**-19):
        assert np.array_equal(clipped, update)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100.0), st.integers(1, 2000))
def test_the_coordinator_tells_from_what_was_sent_whether_it_was_clipped(scale: float, n: int):
    update = np.full(n, scale / math.sqrt(n), np.float32)
    norm = l2_norm([update])
    sent = l2_norm([(update * np.float64(clip_factor(norm, 1.0))).astype(np.float32)])
    if abs(norm - 1) > 1e-5:
        assert is_unclipped(sent, 1.0) == (norm < 1)


def test_the_norm_is_over_all_pieces_in_float64():
    big = np.full(3 * (1 << 16) + 5, 1e-3, np.float32)
    assert l2_norm([big, np.array([3.0]), np.array([4.0])]) == pytest.approx(
        math.sqrt(25 + len(big) * float(np.float32(1e-3)) ** 2), rel=1e-12
    )
    assert l2_norm([]) == 0.0
    assert l2_norm([np.full(4, 1e30, np.float32)]) == pytest.approx(2e30)  # whose squares float32 does not hold


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_has_no_norm(bad: float):
    with pytest.raises(BadUpdate, match="diverged"):
        l2_norm([np.array([1.0, bad])])


def test_a_model_of_which_more_travels_than_parameters_is_refused():
    weight = TensorSpec("w", "F32", (2, 2))
    check_model(Layout((weight, TensorSpec("mask", "BOOL", (2,)))))
    with pytest.raises(OperatorError, match=r"'bn\.running_mean'.*GroupNorm"):
        check_model(Layout((weight, TensorSpec("bn.running_mean", "F32", (2,))), frozenset({"bn.running_mean"})))
    with pytest.raises(OperatorError, match="'count'"):
        check_model(Layout((weight, TensorSpec("count", "I64", ()))))
