"""An audit on a task that can memorize: canaries show without differential privacy, and not when they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation.auditing import _dealt_anew, _Examples, audit_run  # pyright: ignore[reportPrivateUsage]


class Wide:
    """Two classes in 400 dimensions, so that a linear model memorizes every one of 60 examples."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self._x = torch.randn(60, 400, generator=generator)
        self._y = (self._x[:, 0] > 0).long()

    def model(self) -> nn.Module:
        return nn.Linear(400, 2)

    def data(self, split: str) -> TensorDataset:
        return TensorDataset(self._x, self._y)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")


def federation(clients: int = 3) -> list[Wide]:
    """What a target names."""
    return [Wide(k) for k in range(clients)]


def recipe(**train: Any) -> Recipe:
    return parse_recipe(
        {"name": "a", "task": "a", "rounds": 4, "train": {"lr": 0.5, "epochs": 5, "batch_size": 10} | train}
    )


def test_memorized_examples_prove_a_large_epsilon() -> None:
    found = audit_run(federation(), recipe(), canaries=120, examples=20)
    assert 40 < found.included < 80
    assert found.finding.epsilon > 1.5, found.finding
    assert found.history.recipe.cohort.size == 3  # everybody, in every round


def test_a_run_that_cannot_memorize_proves_nothing() -> None:
    """With a rate of 1e-9 the final model is the first one, to what float32 can tell."""
    found = audit_run(federation(), recipe(lr=1e-9, epochs=1), canaries=120, examples=20)
    assert found.finding.epsilon == 0.0


def test_clients_of_a_random_direction_show_and_masks_do_not_hide_them_in_the_sum() -> None:
    plain = audit_run(federation(), recipe(), unit="client", canaries=40, examples=20, rounds=2)
    masked = audit_run(federation(), recipe(), unit="client", canaries=40, examples=20, rounds=1, secure=True)
    for found in (plain, masked):
        assert found.finding.correct == found.finding.guesses >= 20
        assert found.finding.epsilon > 1
        assert found.history.clients == 3 + found.included
        assert found.history.recipe.strategy.weighting == "uniform"
    assert masked.history.recipe.secure.on and not plain.history.recipe.secure.on


def test_the_same_seed_gives_the_same_audit_and_another_one_other_coins() -> None:
    one, two, other = (audit_run(federation(), recipe(), canaries=60, rounds=1, seed=s) for s in (1, 1, 2))
    assert (one.finding, one.included) == (two.finding, two.included)
    assert other.finding != one.finding or other.included != one.included


def test_canaries_have_another_class_and_the_same_values_in_another_order() -> None:
    targets = [torch.tensor(y) for y in (0, 1, 2, 0, 1, 2, 0, 1)]
    dealt = _dealt_anew(targets)
    assert sorted(map(int, dealt)) == sorted(map(int, targets))
    assert all(int(a) != int(b) for a, b in zip(dealt, targets, strict=True))
    words = ["a", "b", "c"]
    assert sorted(_dealt_anew(words)) == words and _dealt_anew(words) != words


def test_more_canaries_than_examples_are_refused() -> None:
    with pytest.raises(OperatorError, match="leaves none beside 60 canaries"):
        audit_run(federation(), recipe(), canaries=180)


def test_a_model_that_scores_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Examples, "scores", lambda self, first, last: np.full(60, np.nan))
    with pytest.raises(OperatorError, match=r"diverged.*train\.lr"):
        audit_run(federation(), recipe(), canaries=60, rounds=1)
