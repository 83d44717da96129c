from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from murmur.protocol.errors import OperatorError
from murmur.simulation.partition_picture import MOST, picture
from murmur.simulation.partitioning import (
    METHODS,
    Partition,
    by_feature,
    by_group,
    class_shares,
    dirichlet,
    divide,
    iid,
    quantity,
    shards,
)

LABELS = np.random.default_rng(0).integers(0, 10, 1000)
MADE: dict[str, Callable[..., Partition]] = {
    "iid": lambda seed=0: iid(1000, 7, seed=seed),
    "dirichlet": lambda seed=0: dirichlet(LABELS, 7, 0.3, seed=seed, smallest=15),
    "shards": lambda seed=0: shards(LABELS, 7, 3, seed=seed),
    "quantity": lambda seed=0: quantity(1000, 7, 1.5, seed=seed, smallest=15),
    "feature": lambda seed=0: by_feature(LABELS + 0.0, 7, 0.5, seed=seed),
    "group": lambda seed=0: by_group(LABELS),
}


def test_every_method_is_tried_here():
    assert MADE.keys() == METHODS.keys()


@pytest.mark.parametrize("method", MADE)
def test_every_example_stands_at_exactly_one_client_in_order(method: str):
    made = MADE[method]()
    assert sorted(np.concatenate(made.parts).tolist()) == list(range(1000))
    assert all((np.diff(part) > 0).all() for part in made.parts)
    assert made.sizes.min() >= 15


@pytest.mark.parametrize("method", [m for m in MADE if m != "group"])
def test_the_seed_fixes_it(method: str):
    def held(seed: int) -> list[list[int]]:
        return [part.tolist() for part in MADE[method](seed).parts]

    assert held(1) == held(1) != held(2)


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(iid(10, 3).sizes.tolist()) == [3, 3, 4]


def test_alpha_sets_how_far_the_mixes_of_classes_lie_apart():
    assert dirichlet(LABELS, 10, 1000.0).facts(LABELS)["skew"] < 0.1
    assert dirichlet(LABELS, 10, 0.05).facts(LABELS)["skew"] > 0.6


def test_labels_need_not_be_numbers_from_zero_on():
    words = np.array(["cat", "dog"])[LABELS % 2]
    assert dirichlet(words, 4, 1.0).counts(words).sum(0).tolist() == [(LABELS % 2 == 0).sum(), (LABELS % 2 == 1).sum()]


def test_shares_of_each_class_add_up_to_one():
    for clients, alpha in ((1, 1.0), (7, 0.05), (50, 100.0)):
        shares_KC = class_shares(clients, 10, alpha, 1)
        assert shares_KC.shape == (clients, 10) and shares_KC.sum(0) == pytest.approx(1)


def test_two_shards_of_sorted_labels_hold_two_classes_or_so():
    """600 of each of ten classes at a hundred clients, as in McMahan et al. 2017, and 300 to a shard."""
    labels = np.repeat(np.arange(10), 6000)
    made = shards(labels, 100, 2, seed=1)
    assert set(made.sizes.tolist()) == {600}
    assert (made.counts(labels) > 0).sum(1).max() == 2


def test_quantities_spread_and_mixes_stay():
    made = quantity(100_000, 10, 1.0, seed=3)
    assert made.sizes.max() > 5 * made.sizes.min()
    labels = np.arange(100_000) % 10
    assert made.facts(labels)["skew"] < 0.05
    assert set(quantity(100, 10, 0.0).sizes.tolist()) == {10}


def test_a_feature_puts_alike_examples_together():
    values = np.random.default_rng(1).permutation(100)
    made = by_feature(values, 4)
    assert [values[part].min() for part in made.parts] == [0, 25, 50, 75]
    # of several features it is the direction in which they vary most: the second column, ten times the first
    features = np.stack([np.random.default_rng(2).random(100), 10.0 * values], 1)
    spans = {(values[part].min(), values[part].max()) for part in by_feature(features, 4).parts}
    assert spans == {(0, 24), (25, 49), (50, 74), (75, 99)}


def test_mixed_examples_are_dealt_evenly():
    values = np.arange(10_000.0)
    means = [values[part].mean() for part in by_feature(values, 2, mix=1.0, seed=1).parts]
    assert abs(means[0] - means[1]) < 4 * 10_000 / np.sqrt(12 * 5000) * np.sqrt(2)
    assert by_feature(values, 2, mix=0.0)[0].tolist() == list(range(5000))


def test_a_column_names_the_clients_and_rare_values_have_none():
    made = by_group(["va", "bern", "va", "bern", "zug", "va"], smallest=2)
    assert made.names == ("bern", "va")
    assert [part.tolist() for part in made.parts] == [[1, 3], [0, 2, 5]]


def test_distance_of_mixes_by_hand():
    """Two clients of one class each: the whole's mix is a half and a half, each lies half apart."""
    made = Partition(parts=(np.array([0, 1]), np.array([2, 3])), described="")
    facts = made.facts(np.array([0, 0, 1, 1]))
    assert facts == {"clients": 2, "examples": 4, "smallest": 2, "median": 2, "largest": 2, "skew": 0.5}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: iid(3, 4), "3 examples cannot give 4 clients 1 each"),
        (lambda: iid(3, 0), "clients = 0"),
        (lambda: dirichlet(LABELS, 3, 0.0), "must be positive"),
        (lambda: dirichlet(LABELS, 3, -1.0), "must be positive"),
        (lambda: divide(np.zeros(100, int), class_shares(10, 1, 1.0, 0), 0, smallest=11), "cannot give 10 clients 11"),
        (lambda: shards(LABELS, 600, 2), "1000 examples cannot give 1200"),
        (lambda: shards(LABELS, 5, 0), "per_client = 0"),
        (lambda: quantity(10, 2, -1.0), "sigma = -1"),
        (lambda: by_feature([1.0, float("nan")], 1), "NaN"),
        (lambda: by_feature([1.0, 2.0], 1, mix=2), "mix = 2"),
        (lambda: by_group([1, 2, 3], smallest=2), "lower smallest"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_words(make: Callable[[], Partition], words: str):
    with pytest.raises(OperatorError, match=words):
        make()


def bars(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "12"]


def test_the_picture_has_a_bar_for_each_class_of_each_client():
    labels = np.array(["<b>", "<b>", "x", "x", "x"])
    made = Partition(parts=(np.array([0, 2]), np.array([1, 3, 4])), names=("a&b", "c"), described="2 <clients>")
    svg = picture(made, labels)
    titles = [r[0].text for r in bars(svg)]
    assert titles == ["a&b: 1 of class <b>", "a&b: 1 of class x", "c: 1 of class <b>", "c: 2 of class x"]
    widths = [float(r.get("width", 0)) for r in bars(svg)]
    assert widths[3] == pytest.approx(2 * widths[2], abs=0.11)
    assert "<b>" not in re.sub(r"&lt;b&gt;", "", svg) and "2 &lt;clients&gt;" in svg


def test_of_many_clients_the_picture_shows_some_and_says_so():
    svg = picture(quantity(10_000, 500, seed=1))
    assert len(bars(svg)) == MOST
    assert f"{MOST} of the clients are shown" in svg
