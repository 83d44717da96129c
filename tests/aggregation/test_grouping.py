"""Who is summed with whom: groups that stay, newcomers where they are needed, cohorts spread over the groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from murmur.aggregation.grouping import draw_cohort, place
from murmur.protocol.recipe import Recipe, parse_recipe

IDS = [f"c{k:02}" for k in range(15)]


def recipe(**cohort: Any) -> Recipe:
    values: dict[str, Any] = {"name": "t", "task": "t", "cohort": {"min": 15} | cohort, "secure": {"groups": 5}}
    return parse_recipe(values | {"strategy": {"combine": "median"}})


@pytest.mark.parametrize("seed", range(5))
def test_groups_differ_by_one_at_most_and_by_seed(seed: int) -> None:
    placed = place(IDS, {}, 4, seed)
    assert sorted(placed) == IDS and sorted(Counter(placed.values()).values()) == [3, 4, 4, 4]
    assert placed == place(reversed(IDS), {}, 4, seed)
    assert placed != place(IDS, {}, 4, seed + 1)


def test_who_has_a_group_keeps_it_and_a_newcomer_goes_to_the_smallest() -> None:
    placed = place(IDS, {}, 5, 0)
    gone = next(name for name, n in placed.items() if n == 3)
    there = [name for name in IDS if name != gone]
    again = place([*there, "new"], placed, 5, 99)
    assert {name: n for name, n in again.items() if name != "new"} == {name: placed[name] for name in there}
    assert again["new"] == 3 and gone not in again


def test_without_a_size_all_are_asked() -> None:
    placed = place([*IDS, "x"], {}, 5, 0)
    assert draw_cohort(placed, recipe(), round=1, attempt=1) == dict(sorted(placed.items()))


def test_a_size_is_spread_over_the_groups() -> None:
    ids = [f"c{k:02}" for k in range(40)]
    placed = place(ids, {}, 5, 0)
    asked = draw_cohort(placed, recipe(size=17), round=1, attempt=1)
    assert sorted(Counter(asked.values()).values()) == [3, 3, 3, 4, 4]
    assert all(placed[name] == n for name, n in asked.items()) and list(asked) == sorted(asked)
    assert asked != draw_cohort(placed, recipe(size=17), round=2, attempt=1)


def test_a_group_with_too_few_sits_out_and_the_others_take_its_places() -> None:
    placed = {f"a{k}": 1 for k in range(2)} | {f"b{k}": 2 for k in range(9)} | {f"c{k}": 3 for k in range(9)}
    asked = draw_cohort(placed, recipe(size=15), round=1, attempt=1)
    assert Counter(asked.values()) == {2: 8, 3: 7}
