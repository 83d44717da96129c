"""Optimizers by name: options are numbers and booleans, and a wrong word is answered with the near ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from murmur.aggregation.optimizers import build, names
from murmur.protocol.errors import OperatorError


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, 2))]


def test_every_name_that_is_offered_takes_a_step() -> None:
    assert {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop"} <= set(names())
    for name in names():
        params = parameters()
        optimizer = build(name, params, 0.1, {})
        params[0].grad = torch.ones(2, 2)
        optimizer.step()
        assert not torch.equal(params[0], torch.zeros(2, 2)), name


def test_pairs_are_written_with_a_digit_for_each() -> None:
    assert build("Adam", parameters(), 0.1, {"beta2": 0.5}).defaults["betas"] == (0.9, 0.5)
    assert build("Adam", parameters(), 0.1, {"beta1": 0.1, "beta2": 0.5}).defaults["betas"] == (0.1, 0.5)
    assert build("Rprop", parameters(), 0.1, {"step_size2": 9.0}).defaults["step_sizes"] == (1e-6, 9.0)


def test_whole_numbers_stay_whole_and_booleans_stay_booleans() -> None:
    assert build("Muon", parameters(), 0.1, {"ns_steps": 3.0}).defaults["ns_steps"] == 3
    assert build("SGD", parameters(), 0.1, {"momentum": 0.9, "nesterov": True}).defaults["nesterov"] is True


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("adam", {}, "did you mean Adam"),
        ("Sgd", {}, "did you mean SGD"),
        ("LBFGS", {}, "no 'LBFGS'"),
        ("Optimizer", {}, "no 'Optimizer'"),
        ("SGD", {"momentun": 0.9}, "did you mean momentum"),
        ("Adam", {"betas": 0.9}, "did you mean beta"),
        ("SGD", {"fused": True}, "no option 'fused'"),
        ("SGD", {"maximize": True}, "no option 'maximize'"),
        ("SGD", {"nesterov": 1.0}, "nesterov takes true or false"),
        ("SGD", {"momentum": True}, "momentum takes a number"),
        ("SGD", {"nesterov": True}, "refuses these settings"),
        ("Adam", {"beta1": 2.0}, "refuses these settings"),
    ],
)
def test_wrong_settings_are_named(name: str, options: dict[str, float | bool], said: str) -> None:
    with pytest.raises(OperatorError, match=said):
        build(name, parameters(), 0.1, options)
