"""The same app under Flower's FedAvg and in our rounds, and our tasks under Flower's FedAvg."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from safetensors.torch import load_file

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import flower_reference
from flwr.app import Context

from murmur.clients.engine.state import initial_model
from murmur.clients.flower import FlowerTask
from murmur.clients.flower_app import flower_app
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation import History, find_federation, simulate

APP = Path(__file__).parents[2] / "examples" / "flower"
METRICS = ("eval_loss", "eval_acc", "rounds", "accuracy")


@pytest.fixture(autouse=True)
def quiet_and_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    monkeypatch.setattr(sys, "path", [*sys.path])


def recipe(**values: Any) -> Recipe:
    given: dict[str, Any] = {"name": "t", "task": "t", "rounds": 3, "metrics": METRICS, "secure": {"on": False}}
    return parse_recipe(given | {"train": {"lr": 0.1, "batch_size": 16}, "strategy": {"max_weight": 64}} | values)


@pytest.fixture(scope="module")
def flowers() -> Any:
    """Three rounds of Flower's FedAvg over three nodes."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    task = FlowerTask(str(APP))
    initial, _ = task.first()
    return flower_reference.fedavg(
        task.app,
        initial,
        nodes=3,
        rounds=3,
        train_config={"lr": 0.1},
        run_config={"batch-size": 16, "local-epochs": 1},
    )


def distance(history: History, model: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight or statistic; BatchNorm's counter is a fraction in Flower."""
    ours = history.state_dict()
    assert ours.keys() == model.keys()
    return max(float((t - model[name]).abs().max()) for name, t in ours.items() if t.is_floating_point())


def test_a_flower_app_comes_to_the_model_and_metrics_of_flowers_fedavg(flowers: Any) -> None:
    model, metrics, _ = flowers
    history = simulate(f"flower:{APP}", recipe(), clients=3)
    assert distance(history, model) < 1e-6  # both round each round's sum to float32, in another order
    for version, theirs in metrics.items():
        for name in METRICS[:3]:
            assert history.versions[version][name] == pytest.approx(theirs[name], abs=1e-6), (version, name)
    assert history.final["accuracy"] == history.final["eval_acc"] > history.versions[0]["accuracy"]


def test_a_flower_app_works_under_masks(flowers: Any) -> None:
    assert distance(simulate(f"flower:{APP}", recipe(), clients=3, secure="real"), flowers[0]) < 1e-4


def test_what_an_app_keeps_in_its_context_is_there_in_the_next_round(flowers: Any) -> None:
    history = simulate(f"flower:{APP}", recipe(rounds=2), clients=3)
    assert [version["rounds"] for version in history.versions] == [0, 1, 2]
    assert {c.state["counter"]["rounds"] for c in flowers[2].contexts.values()} == {3}  # as in Flower


def test_the_first_model_is_the_one_that_the_server_app_sends(flowers: Any) -> None:
    federation, found = find_federation(f"flower:{APP}", 3)
    assert found is None and federation.ids == ("client-0", "client-1", "client-2")
    tensors, buffers = FlowerTask(str(APP)).first()
    torch.manual_seed(0)  # as server_app.py does
    from blobs.task import Net

    expected = Net().state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


# Our tasks in Flower's runtime


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_task_of_ours_comes_to_the_same_model_under_flowers_fedavg(tmp_path: Path, mu: float) -> None:
    """Clients of 6, 7, 8 and 6 rows; the message's lr and FedProx's mu take the place of what the app was made with."""
    ours = tasks.lines()
    names = sorted(ours)

    def task(context: Context) -> Any:
        return ours[names[int(context.node_config["partition-id"])]]()

    train = {"epochs": 3, "batch_size": 64, "lr": 0.1}
    strategy = {"name": "fedprox", "mu": mu} if mu else {}
    history = simulate(ours, recipe(train=train, strategy=strategy, metrics=("loss", "accuracy")), clients=len(ours))
    initial_model(ours["site-0"](), 0, tmp_path / "first")
    model, metrics, _ = flower_reference.fedavg(
        flower_app(task, train=train | {"lr": 0.7}),
        load_file(tmp_path / "first"),
        nodes=len(ours),
        rounds=3,
        train_config={"lr": 0.1, "proximal-mu": mu},
    )
    assert distance(history, model) < 1e-6
    for version, theirs in metrics.items():
        assert theirs["loss"] == pytest.approx(history.versions[version]["loss"], rel=1e-5)
