"""A simulated run under differential privacy is the coordinator's: same clip, same sum, same ledger."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tasks

from murmur.aggregation.strategies import fedavg
from murmur.privacy.dp.accounting import Event, epsilon
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Dp
from murmur.simulation import History, simulate

QUIET = 1e-4


def recipe(**values: Any) -> Recipe:
    train = {"epochs": 3, "batch_size": 64, "lr": 0.1}
    plain = {"name": "test", "task": "line", "rounds": 3, "train": train, "secure": {"on": False}}
    return parse_recipe(plain | {"strategy": {"weighting": "uniform"}} | values)


def dp(mode: str = "central", **values: Any) -> Dp:
    return Dp.model_validate({"mode": mode, "noise_multiplier": QUIET, "clip_norm": 100.0} | values)


def weights(history: History) -> np.ndarray[Any, Any]:
    return history.state_dict()["0.weight"].numpy()[0]


@pytest.mark.parametrize(("mode", "secure"), [("central", False), ("central", True), ("distributed", True)])
def test_a_bound_that_nothing_reaches_and_little_noise_give_the_model_of_a_run_without(mode: str, secure: bool):
    plain = simulate(tasks.lines(), recipe())
    private = simulate(tasks.lines(), recipe(), dp=dp(mode), secure=secure)
    # z * clip_norm / 4 clients is 0.0025 in each of 3 rounds; 6 deviations
    assert weights(private) == pytest.approx(weights(plain), abs=6 * 0.0025 * np.sqrt(3))
    assert not np.array_equal(weights(private), weights(plain))


def test_a_tight_bound_holds_every_round_back():
    start = weights(simulate(tasks.lines(), recipe(train={"lr": 1e-12}), rounds=1))
    one = weights(simulate(tasks.lines(), recipe(), rounds=1, dp=dp(clip_norm=0.01)))
    assert 0 < np.linalg.norm(one - start) <= 0.01 * (1 + 1e-3)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_fresh_each_time_and_as_large_as_it_says(secure: bool):
    """24 coordinates of the difference of two runs, each with noise of z * C / 4 = 0.25."""
    found = [
        weights(simulate(tasks.lines(), recipe(), rounds=1, dp=dp(noise_multiplier=1.0, clip_norm=1.0), secure=secure))
        for _ in range(9)
    ]
    deviation = float(np.std(np.diff(found, axis=0))) / np.sqrt(2)
    assert 0.1 < deviation < 0.5, deviation


def test_the_epsilon_is_that_of_the_ledger():
    history = simulate(tasks.lines(), recipe(), dp=dp(noise_multiplier=2.0))
    assert history.ledger == (Event(noise_multiplier=2.0),) * 3
    assert history.epsilon().value == epsilon(history.ledger, 1e-5, "pld", unit="client").value
    assert history.epsilon("rdp").value >= history.epsilon().value
    told = history.to_json()["privacy"]
    assert (told["unit"], told["delta"], told["accountant"]) == ("client", 1e-5, "pld")
    without = simulate(tasks.lines(), recipe(), rounds=1)
    assert "privacy" not in without.to_json()
    with pytest.raises(OperatorError, match="no epsilon"):
        without.epsilon()


@pytest.mark.parametrize("secure", [False, True])
def test_an_adaptive_bound_moves_from_round_to_round(secure: bool):
    history = simulate(tasks.lines(), recipe(), dp=dp(adaptive=True, bit_noise=1e-3, clip_lr=0.5), secure=secure)
    bounds = [r.clip_norm for r in history.rounds]  # nothing is clipped: b = 1, C falls by e^(-0.25) a round
    assert bounds == pytest.approx([100 * np.exp(-0.25 * k) for k in range(3)], rel=1e-2)
    assert json.dumps(history.to_json())


def test_what_a_coordinator_would_refuse_is_refused():
    with pytest.raises(OperatorError, match="uniform"):
        simulate(tasks.lines(), recipe(), strategy=fedavg(), dp=dp())
    with pytest.raises(OperatorError, match="BatchNorm"):
        simulate(tasks.lines(tasks.Normed), recipe(), dp=dp())
    with pytest.raises(OperatorError, match="rounds would fit"):
        simulate(tasks.lines(), recipe(), dp=dp(noise_multiplier=1.0, budget=1.0))
    with pytest.raises(OperatorError, match=r"inside the masks: set secure\.on"):
        simulate(tasks.lines(), recipe(), dp=dp("distributed"))
