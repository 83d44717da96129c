"""What a recipe's differential privacy comes to, and which recipes are refused, with what to set instead."""

from __future__ import annotations

from typing import Any

import pytest

from murmur.privacy.dp.accounting import Event
from murmur.privacy.dp.mechanisms import Noise
from murmur.privacy.dp.plan import check_run, epsilon_of, over_budget, view_of
from murmur.privacy.dp.release import next_clip_norm
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Dp
from murmur.protocol.tensors import Layout, TensorSpec

MODEL = Layout((TensorSpec("w", "F32", (1000, 1000)),))


def recipe(changes: dict[str, Any] | None = None, **dp: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "t",
        "task": "t",
        "rounds": 10,
        "cohort": {"size": 10, "min": 7},
        "strategy": {"weighting": "uniform"},
        "dp": {"mode": "central"} | dp,
    }
    return parse_recipe(values | (changes or {}))


@pytest.mark.parametrize(
    ("changes", "dp", "says"),
    [
        ({"strategy": {}}, {}, 'set strategy.weighting = "uniform"'),
        ({"cohort": {"min": 7}}, {}, "set cohort.size"),
        ({"secure": {"on": False}, "train": {"wire": "bf16"}}, {}, 'train.wire = "fp32"'),
        ({"secure": {"groups": 3}}, {}, "secure.groups = 0"),
        ({"secure": {"on": False}}, {"mode": "distributed"}, "set secure.on = true"),
        ({}, {"mode": "distributed", "colluders": 7}, "somebody must be left"),
        ({}, {"noise_multiplier": 0}, "dp.noise_multiplier above 0"),
        ({}, {"adaptive": True, "noise_multiplier": 1.0}, "set dp.bit_noise above 0.5, or dp.adaptive = false"),
        ({}, {"adaptive": True, "noise_multiplier": 4.0, "bit_noise": 2.0}, "set dp.bit_noise above 2"),
    ],
)
def test_what_cannot_be_protected_is_refused_with_what_to_set(changes: dict[str, Any], dp: dict[str, Any], says: str):
    with pytest.raises(OperatorError, match=says.replace(".", r"\.")):
        recipe(changes, **dp)


def test_the_adaptive_count_has_noise_of_a_twentieth_of_the_cohort_by_itself():
    # notes of Andrew et al.: no solution at z >= m / 10; ten clients take z below 1
    assert recipe(adaptive=True, noise_multiplier=0.9).dp_of_round().bit_noise == 0.5
    assert recipe(adaptive=True, noise_multiplier=0.9, bit_noise=3.0).dp_of_round(7.0) == Dp(
        mode="central", adaptive=True, noise_multiplier=0.9, bit_noise=3.0, clip_norm=7.0
    )


def test_a_recipe_without_dp_tells_clients_nothing_of_it():
    assert recipe(mode="off", delta=1e-7).dp_of_round() == Dp()
    check_run(recipe(mode="off"), Layout((TensorSpec("count", "I64", ()),)))


def test_a_run_is_refused_before_it_starts_where_the_ring_has_no_room():
    check_run(recipe(mode="distributed"), MODEL)
    with pytest.raises(OperatorError, match=r"10 clients in a ring of 16 bits.*1,000,000 parameters takes 500"):
        check_run(recipe({"secure": {"ring_bits": 16}}, mode="distributed"), MODEL)


def test_the_budget_counts_what_is_spent_and_the_next_round():
    one, within = Event(noise_multiplier=1.0), recipe(budget=5.0)
    assert over_budget(within, []) == ""  # 4.73
    assert "epsilon to 7" in over_budget(within, [one]) and "dp.budget is 5" in over_budget(within, [one])
    assert over_budget(recipe(), [one] * 1000) == ""


def test_an_epsilon_names_who_is_trusted_and_what_it_covers():
    central = epsilon_of(recipe(), [Event(noise_multiplier=1.0)]).assumptions
    spread = epsilon_of(recipe(mode="distributed", colluders=2), [Event(noise_multiplier=1.0)]).assumptions
    assert any("trusted to add it" in said for said in central)
    assert any("all clients in a sum but 2" in said for said in spread)
    for said in (central, spread):
        assert any("metrics" in s for s in said) and any("sampling is not counted" in s for s in said)


def test_few_organizations_are_told_what_their_epsilon_is_worth():
    few = view_of(recipe(), [Event(noise_multiplier=1.0, count=3)])
    assert few.spent == 3 and "With 10 clients" in few.meaning and 'dp.mode = "local"' in few.meaning
    many = view_of(recipe({"cohort": {"size": 200, "min": 100}}), [Event(noise_multiplier=1.0)])
    assert "clients the noise" not in many.meaning and many.meaning.startswith("Client-level")


def test_the_bound_rises_while_most_are_clipped_and_falls_while_most_are_not():
    dp = Dp(mode="distributed", adaptive=True, clip_norm=2.0, clip_lr=0.2, quantile=0.5)
    for bits, factor in ((-5.0, 1.10517), (5.0, 0.90484), (0.0, 1.0)):  # e^(+-0.2 * 0.5); ten clients
        following, unclipped = next_clip_norm(bits, dp, denominator=10, noise=Noise(bytes(32)))
        assert following == pytest.approx(2.0 * factor, abs=1e-5)
        assert unclipped == 0.5 + bits / 10
