"""Synthetic(α, β): drawn as the paper says, and FedProx keeps its way where stragglers take FedAvg's away."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from murmur.protocol.errors import OperatorError


@pytest.fixture(scope="module")
def task(module: Callable[[str], ModuleType]) -> Any:
    return module("fedprox_synthetic/task.py")


def test_the_devices_are_the_same_for_the_same_seed_and_share_no_sample(task: Any) -> None:
    first, again, other = (task.federation(seed=s) for s in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.data("train").tensors[0], b.data("train").tensors[0])
        assert not torch.equal(a.data("train").tensors[0][:10], c.data("train").tensors[0][:10])
        train, test = (len(a.data(split)) for split in ("train", "test"))
        assert train + test >= 50
        assert test == (train + test) // 10
    assert len(task.together(first).data("test")) == sum(len(d.data("test")) for d in first)


def test_inputs_spread_as_the_paper_says_and_labels_follow_from_one_linear_model_if_iid(task: Any) -> None:
    whole = task.together(task.federation(iid=True, seed=3))  # 47,255 samples to train on
    inputs, labels = whole.data("train").tensors
    spread = inputs.numpy().std(0)
    assert np.allclose(spread, np.arange(1, 61) ** -0.6, rtol=0.02)  # 20 standard errors of 0.3 % are 6 %
    assert np.abs(inputs.numpy().mean(0)).max() < 0.03
    # a linear model is right on nearly all that it was fitted to only if one linear model gave the labels
    model = torch.nn.Linear(60, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def step() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[:4000]), labels[:4000])
        loss.backward()
        return loss

    optimizer.step(step)
    assert (model(inputs[:4000]).argmax(1) == labels[:4000]).float().mean() > 0.98


def test_beta_moves_the_devices_inputs_apart(task: Any) -> None:
    def centres(beta: float) -> float:
        devices = task.federation(beta=beta, seed=0)
        return float(np.std([d.data("train").tensors[0].mean() for d in devices]))

    # the mean of v's 60 entries is B + N(0, 1/60): 0.13 for β = 0, 2 for β = 2
    assert centres(0.0) == pytest.approx(0.13, abs=0.06)
    assert centres(2.0) == pytest.approx(2.0, abs=0.6)
    with pytest.raises(OperatorError, match="no less than 0"):
        task.federation(alpha=-1)


@pytest.mark.slow
def test_with_nine_of_ten_straggling_fedprox_gets_further_than_fedavg(
    module: Callable[[str], ModuleType], examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(examples / "fedprox_synthetic"))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    curve = module("fedprox_synthetic/curves.py").curve
    monkeypatch.delitem(sys.modules, "task")
    found = {m: curve({"alpha": 1.0, "beta": 1.0}, 0.9, m, 12) for m in ("FedAvg", "FedProx, μ = 0", "FedProx, μ = 1")}
    late = {m: [at["loss"] for n, at in c.items() if n > 6] for m, c in found.items()}
    assert max(late["FedProx, μ = 0"] + late["FedProx, μ = 1"]) < min(late["FedAvg"])
