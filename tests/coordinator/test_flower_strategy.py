"""Flower's strategies in a coordinator: masked and plain rounds, a restart between them, what cannot start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from murmur.protocol.errors import OperatorError

from .harness import Agent, World, masked_round, plain_round
from .test_privacy import start

PLAIN = {"on": False}


@pytest.fixture
def world(tmp_path: Path) -> Any:
    world = World(tmp_path)
    yield world
    world.store.close()


def test_fedyogi_goes_on_after_a_restart_under_masks(world: World, agents: list[Agent]) -> None:
    """By hand: four clients' mean is 2 in the first round and 1 in the second; Reddi et al. 2021, algorithm 2."""
    run = world.start(strategy={"flower": "fedyogi", "flower_options": {"eta": 0.1}, "max_weight": 4}, rounds=2)
    w, m, v = 0.0, 0.0, 0.0
    for values in ([1.0, 2.0, 3.0, 2.0], [0.0, 1.0, 2.0, 1.0]):
        masked_round(world, agents, values, [2, 2, 2, 2])
        world.tick()
        delta = sum(values) / 4
        m, v = 0.9 * m + 0.1 * delta, v - 0.01 * delta**2 * np.sign(v - delta**2)
        w += 0.1 * m / (math.sqrt(v) + 1e-3)
        np.testing.assert_allclose(world.model(run)["w"], w, rtol=1e-5)
        world.restart()


def test_fedmedian_sees_each_update_of_a_plain_round(world: World, agents: list[Agent]) -> None:
    run = world.start(strategy={"flower": "fedmedian"}, secure=PLAIN)
    plain_round(world, agents, [1.0, 2.0, 3.0, 90.0], [1.0, 5.0, 1.0, 60.0])
    world.tick()
    assert world.model(run)["w"].tolist() == [[2.5] * 3] * 2


@pytest.mark.slow  # starts a process for each
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"strategy": {"flower": "krum"}}, "looks at single updates .* set secure.on = false"),
        ({"strategy": {"flower": "nowhere"}}, "no Flower strategy 'nowhere' is installed here; there are .*fedadam"),
    ],
)
def test_a_run_whose_strategy_cannot_work_does_not_start(world: World, recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(OperatorError, match=words):
        start(world, **recipe)
    assert start(world, strategy={"flower": "fedyogi"})
    assert start(world, strategy={"flower": "krum"}, secure=PLAIN)
    assert len(world.store.runs.all()) == 2
