"""The privacy budgets of all runs, from their rows: nothing is accounted for anew but what is still to come."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..privacy.dp.plan import event_of, view_of
from ..protocol.budgets import RunBudget
from ..protocol.recipe import Recipe
from ..protocol.views import RunView
from .store import Store


def budgets(store: Store) -> list[RunBudget]:
    """Every run with what it has spent and will spend, the newest first."""
    rounds = store.ledger.rounds()
    return [_budget(run, rounds.get(run.id, {})) for run in store.runs.all()]


def _budget(run: RunView, rounds: dict[str, int]) -> RunBudget:
    dp, spent = run.recipe.dp, run.privacy
    forecast = None
    if dp.of_clients and not run.over:
        sums = (spent.spent if spent else 0) + max(0, run.rounds - run.round)
        forecast = _epsilon(run.recipe.model_dump_json(), sums) if sums else None
    return RunBudget(
        run=run.id,
        name=run.name,
        state=run.word,
        mode=dp.mode,
        done=run.round,
        planned=run.rounds,
        delta=dp.delta,
        budget=dp.budget,
        spent=spent,
        forecast=forecast,
        simulated=run.simulation is not None,
        rounds=rounds,
    )


@lru_cache(maxsize=256)
def _epsilon(recipe_json: str, sums: int) -> float | None:
    """The epsilon of so many sums of a recipe, which RDP tells in milliseconds."""
    recipe = Recipe.model_validate_json(recipe_json)
    return view_of(recipe, [replace(event_of(recipe.dp_of_round()), count=sums)]).value
