"""The auxiliary block: sums come out exactly, and nothing that could wrap goes in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.auxiliary import METRIC_SCALE, Block
from murmur.protocol.errors import BadUpdate


def test_sums_of_blocks_are_totals():
    block = Block(metrics=("loss", "accuracy"), integers=3)
    assert block.size == 10
    one = block.encode(
        weight=10, clipped=2, metrics={"loss": (2.5, 10.0), "accuracy": (7, 10)}, integers=np.array([1, -2, 3])
    )
    two = block.encode(
        weight=5, clipped=0, metrics={"loss": (-1.25, 5.0), "unknown": (1, 1)}, integers=np.array([-5, 0, 4])
    )
    totals = block.decode(one + two)
    assert (totals.clients, totals.weight, totals.clipped) == (2, 15, 2)
    assert totals.metrics == {"loss": (1.25, 15.0), "accuracy": (7.0, 10.0)}
    assert totals.integers.tolist() == [-4, -2, 7]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 1 << 31), min_size=1, max_size=20),
    value=st.floats(-1e6, 1e6),
    integer=st.integers(-(1 << 45), 1 << 45),
)
def test_totals_are_exact_in_integers_and_close_in_metrics(weights, value, integer):
    block = Block(metrics=("m",), integers=1)
    total = np.zeros(block.size, np.uint64)
    for weight in weights:
        total += block.encode(weight=weight, clipped=weight, metrics={"m": (value, 1)}, integers=np.array([integer]))
    totals = block.decode(total)
    n = len(weights)
    assert (totals.clients, totals.weight, totals.clipped) == (n, sum(weights), sum(weights))
    assert totals.integers.tolist() == [n * integer]
    assert totals.metrics["m"][1] == n
    assert abs(totals.metrics["m"][0] - n * value) <= n * 0.51 / METRIC_SCALE + 1e-9 * abs(n * value)


def test_an_absent_metric_counts_nothing():
    block = Block(metrics=("loss",))
    assert block.decode(block.encode(weight=1, clipped=0, metrics={})).metrics == {"loss": (0.0, 0.0)}


def test_the_largest_numbers_of_a_whole_cohort_do_not_wrap():
    block = Block(metrics=("m",), integers=2, clients=10)
    limit = (2**63 - 1) // 10
    largest = (limit - 2**20) / METRIC_SCALE
    one = block.encode(weight=limit, clipped=0, metrics={"m": (-largest, largest)}, integers=np.array([limit, -limit]))
    totals = block.decode(one * np.uint64(10))
    assert totals.weight == 10 * limit
    assert totals.integers.tolist() == [10 * limit, -10 * limit]
    assert totals.metrics["m"] == pytest.approx((-10 * largest, 10 * largest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"m": (float("nan"), 1)}}, "sum of the metric 'm' is nan"),
        ({"metrics": {"m": (1, float("inf"))}}, "count of the metric 'm' is inf"),
        ({"metrics": {"m": (1e12, 1)}}, "sum of the metric 'm' is too large"),
        ({"metrics": {"m": (0, -1e300)}}, "count of the metric 'm' is too large"),
        ({"weight": 1 << 62}, "the weight is too large"),
        ({"clipped": 1 << 62}, "the count of clipped values is too large"),
        ({"integers": np.array([0, 1 << 60])}, "integer element 1 "),
        ({"integers": np.array([-(1 << 63), 0])}, "integer element 0 "),
    ],
)
def test_what_could_wrap_is_refused_by_name(changes, message):
    values = {"weight": 1, "clipped": 0, "metrics": {}, "integers": np.zeros(2, np.int64)}
    with pytest.raises(BadUpdate, match=message):
        Block(metrics=("m",), integers=2).encode(**values | changes)


def test_vectors_of_another_shape_are_errors():
    block = Block(integers=2)
    for wrong in (np.zeros(3, np.int64), np.zeros(2, np.float64), None):
        with pytest.raises(ValueError, match="int64"):
            block.encode(weight=1, clipped=0, metrics={}, integers=wrong)
    for wrong in (np.zeros(4, np.uint64), np.zeros(5, np.int64)):
        with pytest.raises(ValueError, match="uint64"):
            block.decode(wrong)
