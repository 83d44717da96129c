"""What the losses of several tasks weigh."""

from __future__ import annotations

import math

import pytest
import torch

from murmur import TaskWeights
from murmur.protocol.errors import OperatorError


def test_a_task_adds_its_loss_over_its_variance_and_half_the_logarithm_per_example():
    weights = TaskWeights(("age", "sick"), regression=("age",))
    with torch.no_grad():
        weights.log_variance.copy_(torch.tensor([math.log(4), math.log(2)]))
    losses = {"age": torch.tensor(24.0), "sick": torch.tensor(6.0)}
    # 24 / (2 · 4) + 3 · log(4) / 2, and 6 / 2 + 5 · log(2) / 2
    wanted = 3 + 1.5 * math.log(4) + 3 + 2.5 * math.log(2)
    assert float(TaskWeights.total(weights(), losses, {"age": 3, "sick": 5}).detach()) == pytest.approx(wanted)
    assert float(TaskWeights.total(weights(), {"sick": losses["sick"]}, {"sick": 5}).detach()) == pytest.approx(
        3 + 2.5 * math.log(2)
    )


def test_the_weights_go_to_the_losses_own_scale():
    # The optimum by hand: σ² is a regression's mean squared error, and twice a classification's mean loss.
    weights, (age, sick) = TaskWeights(("age", "sick"), regression=("age",)), (900.0, 0.7)
    optimizer = torch.optim.SGD(weights.parameters(), 0.1)
    for _ in range(500):
        losses = {"age": torch.tensor(10 * age), "sick": torch.tensor(30 * sick)}
        (TaskWeights.total(weights(), losses, {"age": 10, "sick": 30}) / 40).backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert weights.log_variance.exp().tolist() == [pytest.approx(900, rel=0.01), pytest.approx(1.4, rel=0.01)]


def test_names_that_do_not_fit_are_told():
    with pytest.raises(OperatorError, match="'height' is a regression, and no task"):
        TaskWeights(("age",), regression=("height",))
    with pytest.raises(OperatorError, match=r"losses of \['wight'\], and weights of \['age'\]"):
        TaskWeights.total(TaskWeights(("age",))(), {"wight": torch.tensor(1.0)}, {"wight": 1})
