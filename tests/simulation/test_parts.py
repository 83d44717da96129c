"""What stays at a client and what is frozen, over the rounds of a run: against a loop by hand, and in bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import torch
from torch import nn

from murmur import lora
from murmur.clients.engine.state import built, initial_model
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import map_file, read_layout
from murmur.simulation import simulate

WEIGHT, BIAS = "0.weight", "0.bias"


class Biased(tasks.Line):
    """A line with a bias that each client has for itself: its rows are shifted by its seed."""

    local = (BIAS,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


class Tuned(tasks.Line):
    """Adapters on a frozen layer."""

    def model(self) -> nn.Module:
        base = nn.Linear(3, 4)
        with torch.no_grad():
            base.weight.copy_(torch.arange(12.0).reshape(4, 3) / 12)
            base.bias.zero_()
        return nn.Sequential(lora(nn.Sequential(base), rank=1), nn.Linear(4, 1), nn.Flatten(0))


def recipe(**values: Any) -> Any:
    train = {"epochs": 3, "batch_size": 64, "lr": 0.1}
    plain = {"name": "test", "task": "line", "rounds": 4, "train": train, "secure": {"on": False}}
    return parse_recipe(plain | {"strategy": {"max_weight": 8}} | values)


def by_hand(start: Path) -> tuple[np.ndarray[Any, Any], dict[str, float]]:
    """FedPer in float64: weights are averaged after each round, each client goes on with its own bias."""
    clients = {name: make() for name, make in tasks.lines(Biased).items()}
    w = map_file(start, read_layout(start))[WEIGHT][0].astype(np.float64)
    bias = {name: float(built(client)[0].bias.detach()) for name, client in clients.items()}
    for _ in range(4):
        ends, sizes = [], []
        for name, client in clients.items():
            local = w.copy()
            for _ in range(3):
                error = client.x @ local + bias[name] - client.y
                local -= 0.1 * client.x.T @ error / len(error)
                bias[name] -= 0.1 * float(error.mean())
            ends.append(local)
            sizes.append(len(client.y))
        w = np.average(ends, axis=0, weights=sizes)
    return w, bias


@pytest.mark.parametrize("secure", [False, "real"])
def test_clients_with_a_bias_of_their_own_equal_the_loop_written_by_hand(secure: Any, tmp_path: Path) -> None:
    initial_model(Biased(0, 6), 0, tmp_path / "start")
    wanted, bias = by_hand(tmp_path / "start")
    history = simulate(tasks.lines(Biased), recipe(), secure=secure, folder=tmp_path / "run")
    assert [*history.state_dict()] == [WEIGHT]
    assert history.state_dict()[WEIGHT].numpy()[0] == pytest.approx(wanted, abs=1e-4 if secure else 1e-6)
    for name, value in bias.items():
        path = tmp_path / "run" / "clients" / f"{name}.4.safetensors"
        found = map_file(path, read_layout(path))
        assert float(found[f"local/{BIAS}"][0]) == pytest.approx(value, abs=1e-4 if secure else 1e-6)
    assert np.ptp([*bias.values()]) > 0.05
    # Each client measures a version with its own bias: what it fits is its own rows.
    assert history.final["loss"] < history.versions[0]["loss"]


def test_versions_and_updates_are_the_adapters_and_name_the_base(tmp_path: Path) -> None:
    history = simulate(tasks.lines(Tuned), recipe(strategy={"server": "Adam", "server_lr": 0.1}), folder=tmp_path)
    layouts = [read_layout(tmp_path / f"version-{n}.safetensors") for n in range(5)]
    assert {layout.base for layout in layouts} == {layouts[0].base} != {""}
    assert {t.name for t in layouts[4].tensors} == {"0.0.down.weight", "0.0.up.weight", "1.weight", "1.bias"}
    assert history.model.stat().st_size == layouts[0].file_bytes and layouts[0].nbytes == 4 * (3 + 4 + 4 + 1)
    assert history.final["loss"] < history.versions[0]["loss"]


def test_central_differential_privacy_takes_what_travels() -> None:
    dp = {"mode": "central", "noise_multiplier": 1.0, "clip_norm": 1.0}
    private = recipe(dp=dp, strategy={"weighting": "uniform"}, cohort={"size": 4, "min": 3}, rounds=1)
    with pytest.raises(OperatorError, match="num_batches_tracked"):
        simulate(tasks.lines(tasks.Normed), private)

    class Kept(tasks.Normed):
        local = ("1.*",)

    assert simulate(tasks.lines(Kept), private).ledger  # FedBN: the statistics do not travel


def test_a_client_with_another_base_is_named() -> None:
    class Other(Tuned):
        def model(self) -> nn.Module:
            module = super().model()
            with torch.no_grad():
                module[0][0].weight += 1
            return module

    # A simulation builds the model once, with the first client's task; where clients keep parts, each builds its own.
    Tuned.local, clients = ("1.bias",), {"a": partial(Tuned, 0, 6), "b": partial(Other, 1, 6)}
    try:
        with pytest.raises(OperatorError, match="every site needs the same") as caught:
            simulate(clients, recipe(cohort={"min": 1}))
    finally:
        del Tuned.local
    assert caught.value.__notes__ == ["in round 1 at b"]
