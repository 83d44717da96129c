"""The recipe of a simulation: what was given, with what the call says in place of what it says."""

from __future__ import annotations

from typing import Any, Literal

from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe, parse_recipe
from ..protocol.sections import SMALLEST_SUM, Dp, Strategy
from .federation import Federation

Secure = Literal["real", "ideal", "off"] | bool | None


def settle(
    recipe: Recipe | None,
    federation: Federation,
    strategy: Strategy | None,
    rounds: int | None,
    seed: int | None,
    cohort: int | None,
    secure: Secure,
    dp: Dp | None,
) -> Recipe:
    """The recipe with what the call says in place of what it says, fitted to the federation's size."""
    values: dict[str, Any] = {"name": "simulation", "task": "simulation", "secure": {"on": False}}
    if recipe:
        values = recipe.model_dump()
    if strategy:
        values["strategy"] = strategy.model_dump()
    if dp:
        values["dp"] = dp.model_dump()
    values |= {name: value for name, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    if secure not in ("real", "ideal", "off", True, False, None):
        raise OperatorError(f'secure = "{secure}": "real", "ideal" or "off"')
    masked = bool(values["secure"]["on"] if secure is None else secure not in ("off", False))
    values["secure"]["on"] = masked
    asked: dict[str, Any] = values.setdefault("cohort", {})
    size = (min(asked.get("size", 0), len(federation)) if cohort is None else cohort) or len(federation)
    groups = values["secure"].get("groups", 0)
    if groups and not masked:
        raise OperatorError(
            f"the recipe sums in groups (secure.groups = {groups}), and without masks there are none: simulate it with "
            "secure=True (--secure), or set secure.groups = 0 to combine single updates"
        )
    fewest = SMALLEST_SUM * max(1, groups) if masked else 1
    if size > len(federation):
        raise OperatorError(f"{size} clients are to be asked in a round, the federation has {len(federation)}")
    if size < fewest:
        why = f"3 in each of {groups} groups" if groups else "for of two each reads the other's"
        raise OperatorError(f"{size} clients in a round: secure aggregation needs {fewest}, {why}")
    if values.get("strategy", {}).get("name") == "scaffold":
        values["strategy"] |= {"population": len(federation)}
    asked |= {"size": size, "min": max(fewest, min(asked.get("min", fewest), size))}
    settled = parse_recipe(values)
    if settled.strategy.flower:
        from ..aggregation.flower_probe import check_flower

        check_flower(settled)
    return settled
