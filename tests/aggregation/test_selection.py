"""Cohorts: the same on every machine, whatever order the ids come in."""

from __future__ import annotations

import random

import pytest

from murmur.aggregation.selection import select

IDS = [f"site-{i}" for i in range(10)]


def test_cohort_is_the_same_whatever_the_order_of_the_ids() -> None:
    shuffled = random.Random(3).sample(IDS, len(IDS))
    assert select(shuffled, 4, seed=7, round=2, attempt=1) == select(IDS, 4, seed=7, round=2, attempt=1)


def test_cohort_is_fixed_for_ever_so_that_a_restart_asks_the_same_clients() -> None:
    assert select(IDS, 3, seed=7, round=2, attempt=1) == tuple(sorted(random.Random("7/2/1").sample(sorted(IDS), 3)))
    assert select(IDS, 3, seed=7, round=2, attempt=1) == ("site-3", "site-4", "site-7")


@pytest.mark.parametrize("other", [{"seed": 8}, {"round": 3}, {"attempt": 2}])
def test_another_seed_round_or_attempt_draws_anew(other: dict[str, int]) -> None:
    at = {"seed": 7, "round": 2, "attempt": 1}
    drawn = {select(IDS, 5, **(at | other)), select(IDS, 5, **at)}
    assert len(drawn) == 2


@pytest.mark.parametrize("size", [0, 10, 11])
def test_all_are_asked_when_the_size_is_zero_or_not_below_their_number(size: int) -> None:
    assert select(reversed(IDS), size, seed=0, round=1, attempt=1) == tuple(sorted(IDS))


def test_every_client_is_asked_about_equally_often() -> None:
    seen = [i for r in range(2000) for i in select(IDS, 3, seed=1, round=r, attempt=1)]
    assert all(500 < seen.count(i) < 700 for i in IDS)  # 600 expected, standard deviation 20
