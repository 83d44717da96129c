"""What the privacy page is told: what is spent is the row's, what is to come are the sums that are left."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from murmur.coordinator.budgets import budgets
from murmur.coordinator.store import Store, tables
from murmur.privacy.dp.plan import event_of, view_of
from murmur.protocol.recipe import Recipe, parse_recipe

PRIVATE = """
name = "heart"
task = "t"
rounds = 10
[cohort]
min = 3
size = 3
[strategy]
weighting = "uniform"
[secure]
on = false
[dp]
mode = "central"
clip_norm = 1.0
noise_multiplier = 8.0
delta = 1e-5
"""


def epsilon(recipe: Recipe, sums: int) -> float:
    value = view_of(recipe, [replace(event_of(recipe.dp_of_round()), count=sums)]).value
    assert value is not None
    return value


def test_the_forecast_counts_sums_that_were_lost_and_one_for_each_round_that_is_left(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path / 'murmur.db'}", clock=lambda: 100.0)
    recipe = parse_recipe(tomllib.loads(PRIVATE))
    store.runs.start("run", recipe, sha256="0" * 64, size=8, by="ada")
    (fresh,) = budgets(store)
    assert (fresh.spent, fresh.share, fresh.mode, fresh.delta) == (None, None, "central", 1e-5)
    assert fresh.forecast == pytest.approx(epsilon(recipe, 10))

    spent = view_of(recipe, [replace(event_of(recipe.dp_of_round()), count=2)])  # sums that no version came of
    with store.db.write() as t:
        shown = spent.model_dump(mode="json") | {"budget": 8 * (spent.value or 0)}
        t.execute(update(tables.run).values(epsilon=shown))
    (later,) = budgets(store)
    assert later.spent is not None and later.spent.value == spent.value
    assert later.forecast == pytest.approx(epsilon(recipe, 12))

    store.runs.stop("run", by="ada")
    (over,) = budgets(store)
    assert over.forecast is None and over.state == "stopped"
    store.close()
