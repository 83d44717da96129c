"""Flower's strategies in simulated runs: the same as our own, together, one by one, masked."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tasks

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.serverapp.strategy import FedYogi

from murmur.aggregation import flower as flowers
from murmur.aggregation.strategies import fedavg, fedavgm, flower, krum, median, trimmed_mean
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.sections import Dp, Strategy
from murmur.simulation import History, simulate

RECIPE = parse_recipe({"name": "t", "task": "t", "rounds": 3, "cohort": {"min": 5}, "train": {"lr": 0.05}})


@pytest.fixture(autouse=True)
def only_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowers, "_here", {})


def run(strategy: Strategy, task: type = tasks.Line, **how: Any) -> History:
    federation = {f"c{k}": task(k, 6 + 2 * k) for k in range(5)}
    return simulate(federation, RECIPE, strategy=strategy, seed=3, **({"secure": False} | how))


def apart(one: History, other: History) -> float:
    ours, theirs = one.state_dict(), other.state_dict()
    return max(float((t - theirs[name]).abs().max()) for name, t in ours.items())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fedavg(), flower("fedavg")),
        (fedavgm(0.5), flower("fedavgm", server_momentum=0.5)),
        (median(), flower("fedmedian")),
        (trimmed_mean(0.2), flower("fedtrimmedavg", beta=0.2)),
        (krum(1), flower("krum", num_malicious_nodes=1)),
        (krum(1, selected=3, base=fedavg(weighting="uniform")), None),
    ],
)
def test_flowers_strategies_end_in_the_model_of_ours(ours: Strategy, theirs: Strategy | None) -> None:
    """Weights, running statistics and counters; multi-Krum counts the selected alike there, where clients weigh 1."""
    if theirs is None:
        base = fedavg(weighting="uniform")
        theirs = flower("multikrum", base, num_malicious_nodes=1, num_nodes_to_select=3)
    assert apart(run(ours, tasks.Normed), run(theirs, tasks.Normed)) < 1e-6


def test_clients_are_trained_together_where_the_mean_is_enough() -> None:
    yogi = flower("fedyogi", eta=0.1)
    together, alone = run(yogi), run(yogi, backend="sequential")
    assert (together.backend, alone.backend) == ("vectorized", "sequential")
    assert apart(together, alone) < 1e-5
    assert run(flower("fedmedian")).backend == "sequential"


def test_a_function_of_the_mean_works_under_masks_and_another_is_refused() -> None:
    rate = flower("fedavgm", Strategy(max_weight=16), server_momentum=0.5)
    assert apart(run(rate), run(rate, secure="real")) < 1e-5
    with pytest.raises(OperatorError, match=r'"fedmedian" looks at single updates .*secure.groups'):
        run(flower("fedmedian"), secure="real")


def test_a_class_is_a_strategy_of_a_simulation() -> None:
    assert apart(run(flower(FedYogi, eta=0.1)), run(flower("fedyogi", eta=0.1))) == 0


def test_noise_is_added_before_a_strategy_sees_the_mean() -> None:
    """Noise of 1e-4 in units of a bound that no update reaches: FedAvg of Flower's divides by cohort.size as ours."""
    quiet = Dp(mode="central", clip_norm=100, noise_multiplier=1e-9)
    base = fedavg(weighting="uniform")
    assert apart(run(base, dp=quiet), run(flower("fedavg", base), dp=quiet)) < 1e-6
