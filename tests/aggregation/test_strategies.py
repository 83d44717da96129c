"""Strategies by name are recipes' strategies, and FedProx is FedAvg plus one number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from murmur.aggregation import strategies
from murmur.aggregation.optimizers import build
from murmur.protocol.sections import Strategy


def test_fedavg_is_the_default_strategy_of_a_recipe() -> None:
    assert strategies.fedavg() == Strategy()


def test_fedprox_differs_from_fedavg_by_its_name_and_one_number() -> None:
    avg, prox = strategies.fedavg().model_dump(), strategies.fedprox(0.1).model_dump()
    assert {k: v for k, v in prox.items() if v != avg[k]} == {"name": "fedprox", "mu": 0.1}


def test_scaffold_and_fednova_keep_what_the_base_does_at_the_server() -> None:
    base = strategies.fedadam(0.01)
    for strategy in (strategies.scaffold(7, base), strategies.fednova(base)):
        changed = {k for k, v in strategy.model_dump().items() if v != base.model_dump()[k]}
        assert changed == ({"name", "population"} if strategy.name == "scaffold" else {"name"})


def test_fedprox_keeps_what_the_base_does_at_the_server() -> None:
    both = strategies.fedprox(0.1, strategies.fedadam(0.01))
    assert (both.mu, both.server, both.server_lr) == (0.1, "Adam", 0.01)


def test_clients_that_weigh_alike_weigh_one_so_that_masks_cost_no_precision() -> None:
    alike = (s(weighting="uniform") for s in (strategies.fedavg, strategies.fedavgm))
    assert [(s.weighting, s.max_weight) for s in alike] == [("uniform", 1)] * 2
    assert strategies.fedprox(0.1, strategies.fedavg(weighting="uniform")).max_weight == 1
    assert strategies.fedavg().max_weight == Strategy().max_weight


def test_a_negative_mu_is_refused() -> None:
    with pytest.raises(ValidationError, match="mu"):
        strategies.fedprox(-1.0)


@pytest.mark.parametrize("strategy", [strategies.fedavgm(), strategies.fedadam(0.1), strategies.fedadagrad(0.1)])
def test_torch_takes_the_options_of_each_strategy(strategy: Strategy) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = build(strategy.server, [parameter], strategy.server_lr, strategy.server_options)
    parameter.grad = torch.tensor([-1.0, 1.0])
    optimizer.step()
    assert np.sign(parameter.detach().numpy()).tolist() == [1.0, -1.0]


def test_fedadagrad_moves_as_published() -> None:
    # v = tau² + 1² and w = 0.1 · 1 / (sqrt(v) + tau) with tau = 1: 0.1 / (sqrt(2) + 1)
    s = strategies.fedadagrad(0.1, tau=1.0)
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = build(s.server, [parameter], s.server_lr, s.server_options)
    parameter.grad = torch.tensor([-1.0], dtype=torch.float64)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.1 / (2**0.5 + 1), abs=1e-12)


def test_a_robust_rule_is_a_strategy_with_another_way_to_combine():
    adam = strategies.fedadam(0.01)
    for rule, changed in (
        (strategies.median(adam), {"combine": "median"}),
        (strategies.trimmed_mean(0.3, adam), {"combine": "trimmed_mean", "trim": 0.3}),
        (strategies.krum(2, 3, adam), {"combine": "krum", "byzantine": 2, "selected": 3}),
    ):
        before = adam.model_dump()
        assert {k: v for k, v in rule.model_dump().items() if v != before[k]} == changed
