"""Strategies by name: each is a `Strategy` of the recipe, so what is written here can be written in TOML as well.

A strategy is a composition: how the clients train (`mu`), how their updates combine (`weighting`) and how the server
moves (`server`, any optimizer of torch.optim). All but the robust rules at the end need only the weighted sum, so they
work under masking as they are; of the robust ones the median and the trimmed mean do over groups (`secure.groups`).
torch.optim has no Yogi: FedYogi (Reddi et al. 2021) is Flower's, `flower("fedyogi")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..protocol.sections import Strategy
from .flower import register

Weighting = Literal["examples", "uniform"]


def fedavg(*, weighting: Weighting = "examples") -> Strategy:
    """The server takes the weighted mean of the clients' updates.

    weighting: by how many examples a client trained on, as published, or each client alike.
    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    Algorithm 1, arXiv:1602.05629.
    """
    return _strategy(weighting)


def fedprox(mu: float, base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) whose clients also pay mu/2 · |w - w_round|² for leaving the round's model.

    Each local gradient grows by mu · (w - w_round); nothing else changes, and mu = 0 is `base` again.
    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2, arXiv:1812.06127.
    """
    return Strategy.model_validate((base or fedavg()).model_dump() | {"name": "fedprox", "mu": mu})


def scaffold(population: int = 0, base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) whose clients correct their steps by how their data differ from everybody's.

    population: clients that cohorts are drawn from, 0 where everybody takes part in every round. Takes plain SGD.
    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", option II,
    arXiv:1910.06378.
    """
    return Strategy.model_validate((base or fedavg()).model_dump() | {"name": "scaffold", "population": population})


def fednova(base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) in which a client that takes more steps than others pulls no harder.

    Source: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    arXiv:2007.07481.
    """
    return Strategy.model_validate((base or fedavg()).model_dump() | {"name": "fednova"})


def fedavgm(momentum: float = 0.9, lr: float = 1.0, *, weighting: Weighting = "examples") -> Strategy:
    """FedAvg with momentum at the server: SGD on the mean update, whose direction is remembered over the rounds.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", section 4.2, arXiv:1909.06335.
    """
    return _strategy(weighting, server="SGD", server_lr=lr, server_options={"momentum": momentum})


def fedadam(
    lr: float, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, weighting: Weighting = "examples"
) -> Strategy:
    """Adam at the server, with the mean update as the negative of its gradient.

    tau: added to the root of the second moment (`eps` of torch.optim.Adam). Unlike the paper's, torch's Adam corrects
    the moments for having started at zero, so the first rounds step further.
    Source: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2, arXiv:2003.00295.
    """
    options: dict[str, float | bool] = {"beta1": beta1, "beta2": beta2, "eps": tau}
    return _strategy(weighting, server="Adam", server_lr=lr, server_options=options)


def fedadagrad(lr: float, *, tau: float = 1e-3, weighting: Weighting = "examples") -> Strategy:
    """Adagrad at the server: directions that moved much in earlier rounds move less now.

    tau: added to the root of the summed squares, which start at tau² as published.
    Source: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2, arXiv:2003.00295.
    """
    options: dict[str, float | bool] = {"eps": tau, "initial_accumulator_value": tau**2}
    return _strategy(weighting, server="Adagrad", server_lr=lr, server_options=options)


def flower(strategy: str | Callable[..., Any], base: Strategy | None = None, **options: bool | float | str) -> Strategy:
    """FedAvg (or `base`) whose server is moved by a strategy of Flower's, made with these options.

    strategy: the name of an installed one, as "fedyogi"; in a simulation also a class or a function that gives one,
    which is then known in this process by its name in small letters.
    """
    if callable(strategy):
        make, strategy = strategy, strategy.__name__.lower()
        register(strategy, make)
    return _combined(base, flower=strategy, flower_options=options)


def median(base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) whose server takes the coordinate-wise median of the updates, each counting alike.

    Half of the updates, less one, may be anything: each value still lies among the honest ones.
    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv:1803.01498.
    """
    return _combined(base, combine="median")


def trimmed_mean(trim: float = 0.2, base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) whose server cuts the share `trim` of each coordinate's values at each end.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv:1803.01498.
    """
    return _combined(base, combine="trimmed_mean", trim=trim)


def krum(byzantine: int, selected: int = 1, base: Strategy | None = None) -> Strategy:
    """FedAvg (or `base`) whose server takes the update nearest to its neighbours, or the mean of the `selected` ones.

    byzantine: updates that may be anything; a round needs 2 · byzantine + 3 updates.
    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".
    """
    return _combined(base, combine="krum", byzantine=byzantine, selected=selected)


def _combined(base: Strategy | None, **how: Any) -> Strategy:
    return Strategy.model_validate((base or fedavg()).model_dump() | how)


def _strategy(weighting: Weighting, **server: Any) -> Strategy:
    # Where each client weighs 1, the bound of the fixed point under masks is 1 too: it would waste 16 of its 29 bits.
    bound = {"max_weight": 1} if weighting == "uniform" else {}
    return Strategy(weighting=weighting, **bound, **server)
