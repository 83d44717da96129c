"""The sequential simulation against loops written by hand, and masked rounds against plain ones."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import torch

from murmur.aggregation.selection import select
from murmur.aggregation.strategies import fedavg, fedavgm, fedprox
from murmur.privacy.dp.accounting import Event, epsilon
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Strategy
from murmur.protocol.tensors import map_file, read_layout
from murmur.simulation import History, Round, simulate

WEIGHT = "0.weight"


def recipe(**values: Any) -> Recipe:
    train = {"epochs": 3, "batch_size": 64, "lr": 0.1} | values.pop("train", {})  # one batch an epoch: every row
    # a bound near the largest client's weight: the fixed point under the masks is then fine enough for 1e-4
    plain = {"name": "test", "task": "line", "rounds": 3, "train": train, "secure": {"on": False}}
    return parse_recipe(plain | {"strategy": {"max_weight": 8}} | values)


def weights(history: History) -> np.ndarray[Any, Any]:
    return history.state_dict()[WEIGHT].numpy()[0]


def by_hand(
    start: np.ndarray[Any, Any], mu: float = 0.0, rounds: int = 3, momentum: float = 0.0, uniform: bool = False
) -> np.ndarray[Any, Any]:
    """FedAvg and FedProx in float64, as the papers write them: full-batch gradient steps, then the weighted mean."""
    clients = [make() for make in tasks.lines().values()]
    w, velocity = start.astype(np.float64), np.zeros(3)
    for _ in range(rounds):
        ends, sizes = [], []
        for client in clients:
            local = w.copy()
            for _ in range(3):
                error = client.x @ local - client.y
                local -= 0.1 * (client.x.T @ error / len(error) + mu * (local - w))
            ends.append(local)
            sizes.append(1 if uniform else len(client.y))
        velocity = momentum * velocity + np.average(ends, axis=0, weights=sizes) - w
        w = w + velocity
    return w


@pytest.fixture(scope="module")
def start() -> np.ndarray[Any, Any]:
    """What every run with seed 0 starts from: after one round with a rate of almost nothing."""
    history = simulate(tasks.lines(), recipe(train={"lr": 1e-12}), rounds=1)
    return weights(history)


@pytest.mark.parametrize("secure", [False, "real"])
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (fedavg(), {}),
        (fedprox(0.5), {"mu": 0.5}),
        (fedavgm(0.5), {"momentum": 0.5}),
        (fedavg(weighting="uniform"), {"uniform": True}),
    ],
    ids=["fedavg", "fedprox", "fedavgm", "uniform"],
)
def test_simulation_equals_the_loop_written_by_hand(
    start: np.ndarray[Any, Any], strategy: Strategy, expected: dict[str, Any], secure: Any
) -> None:
    strategy = strategy.model_copy(update={"max_weight": min(strategy.max_weight, 8)})
    history = simulate(tasks.lines(), recipe(), strategy=strategy, secure=secure)
    assert weights(history) == pytest.approx(by_hand(start, **expected), abs=1e-4 if secure else 2e-6)


def test_fedprox_pulls_so_strongly_that_the_test_could_tell(start: np.ndarray[Any, Any]) -> None:
    assert np.abs(by_hand(start) - by_hand(start, mu=0.5)).max() > 1e-2


def test_masked_rounds_equal_plain_ones_and_integers_exactly() -> None:
    plain, masked = (simulate(tasks.lines(tasks.Normed), recipe(), secure=s).state_dict() for s in (False, "real"))
    assert plain.keys() == masked.keys()
    for name, tensor in plain.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, masked[name], atol=1e-4), name
        else:
            assert torch.equal(tensor, masked[name]), name
    assert plain["1.num_batches_tracked"].item() == 9  # three rounds of three steps


def test_masked_metrics_equal_plain_ones() -> None:
    plain, masked = (simulate(tasks.lines(), recipe(), secure=s) for s in (False, "real"))
    for a, b in zip(plain.versions, masked.versions, strict=True):
        assert a.keys() == b.keys() == {"loss", "accuracy"}
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1e-6)


@pytest.mark.parametrize("secure", [False, "real"])
def test_the_same_run_gives_the_same_model_to_the_last_bit(secure: Any) -> None:
    small = recipe(train={"batch_size": 4})
    one, two = (simulate(tasks.lines(tasks.Normed), small, secure=secure) for _ in range(2))
    assert one.model.read_bytes() == two.model.read_bytes()
    assert (
        one.model.read_bytes() != simulate(tasks.lines(tasks.Normed), small, secure=secure, seed=1).model.read_bytes()
    )


def test_metrics_of_a_version_are_measured_in_the_next_round(start: np.ndarray[Any, Any]) -> None:
    told: list[Round] = []
    history = simulate(tasks.lines(), recipe(), on_round=told.append)
    assert [r.n for r in told] == [1, 2, 3]
    assert history.rounds == tuple(told)
    assert len(history.versions) == 4  # the start, and one a round
    tests = [make().data("test").tensors for make in tasks.lines().values()]
    for version, w in ((0, start), (1, by_hand(start, rounds=1)), (3, by_hand(start))):
        errors = np.concatenate([x.numpy() @ w - y.numpy() for x, y in tests])
        assert history.versions[version]["loss"] == pytest.approx(float((errors**2).mean() / 2), rel=1e-3)
    assert history.final is history.versions[3]
    assert history.rounds[0].measured["loss"][1] == 8  # two test rows at each of four clients


def test_the_loss_falls() -> None:
    history = simulate(tasks.lines(), recipe(rounds=10))
    losses = [r.train_loss for r in history.rounds]
    assert losses[-1] < 0.2 * losses[0]


def test_each_round_asks_the_cohort_that_a_coordinator_would_ask() -> None:
    history = simulate(tasks.lines(clients=9), recipe(), cohort=4, rounds=5, seed=3)
    ids = [f"site-{k}" for k in range(9)]
    assert [r.cohort for r in history.rounds] == [select(ids, 4, seed=3, round=n, attempt=1) for n in range(1, 6)]
    assert len({r.cohort for r in history.rounds}) > 1


@pytest.mark.parametrize(("ring_bits", "near"), [(16, 5e-3), (24, 2e-5), (32, 1e-6)])
def test_masked_rounds_of_every_ring_end_near_the_plain_model(ring_bits: int, near: float) -> None:
    """Deltas below 1 of 6 to 8 rows: a unit of the coarsest ring is 8 / (2^12 - 1) over some 27 rows in each round."""
    terms = {"on": True, "clip_value": 1.0, "ring_bits": ring_bits}
    plain = simulate(tasks.lines(), recipe())
    one, two = (simulate(tasks.lines(), recipe(secure=terms), secure="real") for _ in range(2))
    assert np.abs(weights(one) - weights(plain)).max() < near
    assert one.model.read_bytes() == two.model.read_bytes()


def test_a_bound_on_the_weights_that_is_too_low_costs_an_attempt_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """27 rows: a bound of 26 fails every first attempt after the first round, and the second ones have none."""
    found: list[History] = []
    for bound in (0, 26):
        monkeypatch.setattr("murmur.simulation.rounds.weight_bound", lambda total, *_, b=bound: b if total else 0)
        found.append(simulate(tasks.lines(), recipe(), secure="real"))
    assert found[0].model.read_bytes() == found[1].model.read_bytes()
    assert [r.message for r in caplog.records].count("a second attempt") == 2


def test_clipped_values_are_counted_in_masked_rounds(caplog: pytest.LogCaptureFixture) -> None:
    tight = recipe(secure={"on": True, "clip_value": 1e-3}, cohort={"min": 3}, rounds=1)
    assert simulate(tasks.lines(), tight, secure=None).rounds[0].clipped > 0.5
    assert [r.message for r in caplog.records] == ["values were cut: raise secure.clip_value"]
    assert simulate(tasks.lines(), recipe(rounds=1), secure="real").rounds[0].clipped == 0


def test_secure_none_follows_the_recipe_and_false_overrules_it() -> None:
    tight = recipe(secure={"on": True, "clip_value": 1e-3}, cohort={"min": 3}, rounds=1)
    assert simulate(tasks.lines(), tight, secure=False).rounds[0].clipped == 0
    assert simulate(tasks.lines(), tight, secure=None).recipe.secure.on


def test_versions_are_kept_in_a_named_folder_and_nothing_else(tmp_path: Path) -> None:
    history = simulate(tasks.lines(), recipe(), strategy=fedavgm(), secure="real", folder=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [f"version-{n}.safetensors" for n in range(4)]
    assert history.model == tmp_path / "run" / "version-3.safetensors"


def test_without_a_folder_only_the_final_model_is_left_and_goes_with_the_history(tmp_path: Path) -> None:
    history = simulate(tasks.lines(), recipe(), strategy=fedavgm())
    home = history.model.parent
    assert [p.name for p in home.iterdir()] == ["version-3.safetensors"]
    saved = history.save(tmp_path / "model.safetensors")
    assert map_file(saved, read_layout(saved))[WEIGHT].tolist() == [pytest.approx(weights(history))]
    del history
    gc.collect()
    assert not home.exists()


def test_a_simulation_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("murmur.simulation.places.memory_disk", lambda: str(tmp_path))
    with pytest.raises(OperatorError, match="NaN or infinity"):
        simulate(tasks.lines(), recipe(train={"lr": 1000.0, "epochs": 100}))
    assert list(tmp_path.iterdir()) == []


def test_history_is_json() -> None:
    history = simulate(tasks.lines(), recipe(rounds=1))
    told = json.loads(json.dumps(history.to_json()))
    assert told["rounds"][0]["metrics"] == told["versions"][0]
    assert told["recipe"]["train"]["lr"] == 0.1
    assert told["clients"] == 4


def test_two_clients_cannot_be_masked() -> None:
    with pytest.raises(OperatorError, match="needs 3"):
        simulate(tasks.lines(clients=2), recipe(), secure="real")
    with pytest.raises(OperatorError, match="needs 3"):
        simulate(tasks.lines(), recipe(), secure="real", cohort=2)
    assert len(simulate(tasks.lines(clients=1), recipe(), secure=False).rounds) == 3


def test_a_cohort_larger_than_the_federation_is_refused() -> None:
    with pytest.raises(OperatorError, match="federation has 4"):
        simulate(tasks.lines(), recipe(), cohort=5)


def test_an_error_in_a_task_names_client_and_round() -> None:
    makers: dict[str, Any] = tasks.lines() | {"site-2": lambda: tasks.Failing(0, 5)}
    with pytest.raises(Exception, match="scans") as caught:
        simulate(makers, recipe())
    assert caught.value.__notes__ == ["in round 1 at site-2"]


def test_local_differential_privacy_is_accounted_for_at_each_client():
    dp = {"mode": "local", "noise_multiplier": 4.0, "delta": 1e-3}
    history = simulate(tasks.lines(clients=3), recipe(train={"epochs": 1, "batch_size": 4}, dp=dp))
    # 6, 7 and 8 rows in batches of 4: two steps a round, each row in one with probability 4/6, 4/7 and 1/2
    rates = {"site-0": 4 / 6, "site-1": 4 / 7, "site-2": 0.5}
    event = Event(noise_multiplier=4.0, sampling="poisson", count=2)
    assert history.spent == {name: (replace(event, rate=rate),) * 3 for name, rate in rates.items()}
    found = history.epsilons()
    assert found["site-0"].value > found["site-1"].value > found["site-2"].value
    assert found["site-2"].value == epsilon([replace(event, rate=0.5, count=6)], 1e-3, unit="example").value
    assert history.to_json()["epsilon"]["site-2"]["unit"] == "example"
    assert "epsilon" not in simulate(tasks.lines(clients=3), recipe(rounds=1)).to_json()


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_ideal_sums_give_the_model_of_masked_ones_to_the_last_bit(ring_bits: int) -> None:
    """Integers cancel exactly; at 16 bits the values are rounded at random, by the same key with masks and without."""
    small = recipe(train={"batch_size": 4}, secure={"on": True, "clip_value": 1.0, "ring_bits": ring_bits})
    real, ideal = (simulate(tasks.lines(tasks.Normed), small, secure=s) for s in ("real", "ideal"))
    assert real.model.read_bytes() == ideal.model.read_bytes()
    assert real.versions == ideal.versions
    assert [r.clipped for r in real.rounds] == [r.clipped for r in ideal.rounds]


def test_ideal_sums_in_groups_are_the_masked_ones_as_well() -> None:
    settled = recipe(secure={"on": True, "groups": 3}, strategy={"combine": "median"}, cohort={"min": 9})
    real, ideal = (simulate(tasks.lines(clients=9), settled, secure=s) for s in ("real", "ideal"))
    assert real.model.read_bytes() == ideal.model.read_bytes()


def test_an_unknown_kind_of_secure_is_refused_in_words() -> None:
    with pytest.raises(OperatorError, match='secure = "perfect": "real", "ideal" or "off"'):
        simulate(tasks.lines(), recipe(), secure="perfect")  # pyright: ignore[reportArgumentType]: what is refused
    assert simulate(tasks.lines(), recipe(secure={"on": True}, rounds=1), secure="off").recipe.secure.on is False
