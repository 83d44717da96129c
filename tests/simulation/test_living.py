"""Simulations in a world: models that follow from who was heard, against loops written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
from test_storing import Headed, cut_in, stored_as

from murmur.protocol.errors import OperatorError
from murmur.protocol.messages import Kind
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation import History, simulate
from murmur.simulation.sequential import Sequential
from murmur.web.timeline import timeline

Array = np.ndarray[Any, Any]
WEIGHT = "0.weight"
NOTHING = {"examples_per_s": {"median": 10, "spread": 1}}  # happens to anybody


def recipe(**values: Any) -> Recipe:
    train = {"epochs": 3, "batch_size": 64, "lr": 0.1} | values.pop("train", {})  # one batch an epoch: every row
    plain = {"name": "test", "task": "line", "rounds": 3, "train": train, "secure": {"on": False}}
    return parse_recipe(plain | {"strategy": {"max_weight": 8}} | values)


def weights(history: History) -> Array:
    return history.state_dict()[WEIGHT].numpy()[0].astype(np.float64)


def delta(client: str, start: Array, epochs: int = 3, mu: float = 0.0) -> Array:
    """What a client's full-batch gradient steps add to a version."""
    made, w = tasks.lines()[client](), start.copy()
    for _ in range(epochs):
        error = made.x @ w - made.y
        w -= 0.1 * (made.x.T @ error / len(error) + mu * (w - start))
    return w - start


@pytest.fixture(scope="module")
def start() -> Array:
    return weights(simulate(tasks.lines(), recipe(train={"lr": 1e-12}), rounds=1))


def traced(folder: Path, *rows: str) -> dict[str, Any]:
    """A world of such clients."""
    (folder / "trace.csv").write_text("client,examples_per_s,online\n" + "\n".join(rows))
    return {"trace": str(folder / "trace.csv")}


@pytest.mark.parametrize(
    ("backend", "secure"), [("sequential", False), ("vectorized", False), ("sequential", "real"), ("auto", "ideal")]
)
def test_a_world_in_which_nothing_happens_changes_no_bit(backend: Any, secure: Any) -> None:
    one, two = (simulate(tasks.lines(), recipe(), backend=backend, secure=secure, world=w) for w in (None, NOTHING))
    assert one.model.read_bytes() == two.model.read_bytes()
    assert one.versions == two.versions
    assert one.world is None
    assert two.world is not None
    assert [a.heard for a in two.world.attempts] == [4, 4, 4]


@pytest.mark.parametrize("backend", ["sequential", "vectorized"])
def test_buffered_asynchronous_rounds_equal_the_loop_written_by_hand(
    start: Array, tmp_path: Path, backend: Any
) -> None:
    """18, 21 and 24 examples take 10, 20 and 55 s. Version 1 is made of 0 and 1 (20 s), version 2 as well (40 s), and
    version 3 of 0, which began with version 2 at 40 s, and of 2, which began with version 0: two versions late."""
    world = traced(tmp_path, "site-0,1.8,always", "site-1,1.05,always", f"site-2,{24 / 55},always")
    clients = {f"site-{k}": tasks.lines()[f"site-{k}"] for k in range(3)}
    history = simulate(clients, recipe(), backend=backend, world=world | {"buffered": {"size": 2}})
    v1 = start + (6 * delta("site-0", start) + 7 * delta("site-1", start)) / 13
    v2 = v1 + (6 * delta("site-0", v1) + 7 * delta("site-1", v1)) / 13
    v3 = v2 + (6 * delta("site-0", v2) + 8 * delta("site-2", start) / np.sqrt(3)) / 14
    assert weights(history) == pytest.approx(v3, abs=2e-6)
    assert history.world is not None
    assert [a.ends_s for a in history.world.attempts] == pytest.approx([20, 40, 55], abs=0.01)
    assert [r.cohort for r in history.rounds] == [("site-0", "site-1"), ("site-0", "site-1"), ("site-0", "site-2")]
    errors = [made.x[:2] @ v2 - made.y[:2] for made in (clients["site-0"](), clients["site-2"]())]
    assert history.versions[2]["loss"] == pytest.approx(float(np.square(errors).mean() / 2), rel=1e-4)
    assert [p.name for p in history.model.parent.iterdir()] == ["version-3.safetensors"]


@pytest.mark.parametrize(("backend", "secure"), [("sequential", False), ("vectorized", False), ("auto", "ideal")])
def test_fedprox_keeps_what_stragglers_did_and_fedavg_drops_it(start: Array, backend: Any, secure: Any) -> None:
    world, sizes = {"stragglers": 0.5}, {"site-0": 6, "site-1": 7, "site-2": 8, "site-3": 6}
    prox = recipe(strategy={"name": "fedprox", "mu": 0.5, "max_weight": 8})
    kept = simulate(tasks.lines(), prox, rounds=1, world=world, backend=backend, secure=secure)
    assert kept.world is not None
    did = {stint.client: stint.units for _, stint, _ in kept.world.stints}
    assert sum(epochs < 3 for epochs in did.values()) == 2
    expected = sum(sizes[c] * delta(c, start, epochs, mu=0.5) for c, epochs in did.items()) / 27
    assert weights(kept) == pytest.approx(start + expected, abs=1e-5 if secure else 2e-6)
    if secure:
        return  # two updates are no masked sum
    dropped = simulate(tasks.lines(), recipe(cohort={"min": 1}), rounds=1, world=world, backend=backend)
    heard = [c for c, epochs in did.items() if epochs == 3]
    assert dropped.rounds[0].cohort == tuple(heard)
    expected = sum(sizes[c] * delta(c, start) for c in heard) / sum(sizes[c] for c in heard)
    assert weights(dropped) == pytest.approx(start + expected, abs=2e-6)


def test_clients_that_leave_after_masking_are_taken_out_of_the_sum(tmp_path: Path) -> None:
    """site-3 goes home in the midst of every round's training: four dealt shares, three are needed, three deliver."""
    world = traced(tmp_path, "site-0,10,always", "site-1,10,always", "site-2,10,always", "site-3,1,0:00-0:01")
    world |= {"period_h": 1 / 40}  # it is back after 90 s, when the next round begins
    told = recipe(cohort={"patience_s": 30}, rounds=2, train={"epochs": 30})
    plain, ideal, masked = (simulate(tasks.lines(), told, world=world, secure=s) for s in (False, "ideal", "real"))
    assert plain.world is not None
    assert [a.lost for a in plain.world.attempts] == [1, 1]
    assert plain.rounds[1].cohort == ("site-0", "site-1", "site-2")
    assert weights(masked) == pytest.approx(weights(plain), abs=1e-4)
    assert masked.model.read_bytes() == ideal.model.read_bytes()


@pytest.mark.parametrize("secure", ["real", "ideal"])
def test_too_few_that_are_left_after_masking_fail_the_round_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: Any
) -> None:
    """Six dealt shares, of which five unmask; two go home in the midst of their training."""
    stay = (f"site-{k},10,always" for k in range(4))
    world = traced(tmp_path, *stay, "site-4,0.01,0:00-0:01", "site-5,0.01,0:00-0:01")
    world |= {"period_h": 1 / 40}
    asked, each = list[Kind](), Sequential.each
    monkeypatch.setattr(Sequential, "each", lambda self, a: (asked.append(a.assignment.kind), each(self, a))[1])
    history = simulate(tasks.lines(clients=6), recipe(), world=world, secure=secure)
    assert set(asked) == {Kind.EVALUATE}  # of version 0, at the end
    assert history.ended == (
        "round 1 failed 3 times (cohort.attempts), at last because 4 updates are in, at least 5 are needed"
    )
    assert history.rounds == ()
    assert len(history.versions) == 1
    assert history.world is not None
    assert history.world.heard.total() == 0
    assert history.to_json()["ended"] == history.ended


def test_over_selected_masked_rounds_close_with_the_fastest() -> None:
    told = recipe(cohort={"size": 6, "min": 3, "over_select": 1.25})
    world = {"examples_per_s": {"median": 10, "spread": 1}}
    plain, masked = (simulate(tasks.lines(clients=8), told, world=world, secure=s) for s in (False, "real"))
    assert [len(r.cohort) for r in masked.rounds] == [6, 6, 6]
    assert weights(masked) == pytest.approx(weights(plain), abs=1e-4)
    assert masked.world is not None
    assert masked.world.fairness()["never"] == 2  # the same two are always the slowest


def test_partial_work_under_a_rule_that_looks_at_single_updates(start: Array) -> None:
    told = recipe(strategy={"name": "fedprox", "mu": 0.5, "combine": "median"})
    history = simulate(tasks.lines(), told, rounds=1, world={"stragglers": 0.5})
    assert history.world is not None
    did = {stint.client: stint.units for _, stint, _ in history.world.stints}
    expected = np.median([delta(c, start, epochs, mu=0.5) for c, epochs in did.items()], axis=0)
    assert weights(history) == pytest.approx(start + expected, abs=2e-6)


def test_half_a_training_spends_half_of_a_site_s_privacy() -> None:
    dp = {"mode": "local", "noise_multiplier": 4.0, "delta": 1e-3}
    told = recipe(dp=dp, train={"epochs": 4, "batch_size": 4}, strategy={"name": "fedprox", "mu": 0.1})
    history = simulate(tasks.lines(clients=3), told, rounds=1, world={"stragglers": 1.0})
    assert history.world is not None
    did = {stint.client: stint.units for _, stint, _ in history.world.stints}
    assert all(1 <= epochs < 4 for epochs in did.values())
    assert {c: e.count for c, (e,) in history.spent.items()} == {c: 2 * epochs for c, epochs in did.items()}


def test_the_same_seed_lives_through_the_same_world_and_another_through_another() -> None:
    def told(seed: int) -> dict[str, Any]:
        world = {"like": "phones", "dropout": 0.3, "buffered": {"size": 3}}
        history = simulate(tasks.lines(clients=8), recipe(), world=world, seed=seed)
        return json.loads(json.dumps(history.to_json()))["world"]

    assert told(1) == told(1)
    assert told(1)["attempts"] != told(2)["attempts"]


def test_a_world_does_not_know_how_much_a_task_does_that_works_by_itself() -> None:
    class Alone(tasks.Line):
        def work(self, *_: Any) -> None: ...

    with pytest.raises(OperatorError, match="site-0's task works by itself"):
        simulate({"site-0": Alone(0, 5)}, recipe(), world="hospitals")


def test_a_stored_run_goes_on_in_its_world_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"like": "phones", "dropout": 0.3}
    told = recipe(cohort={"size": 4, "min": 2})
    whole = simulate(tasks.lines(clients=8), told, world=world)
    run = cut_in(3, tmp_path, monkeypatch, tasks.lines(clients=8), told, world=world)
    with pytest.raises(OperatorError, match="round 1 is none of this world"):
        simulate(tasks.lines(clients=8), store=tmp_path, resume=run, world={"stragglers": 0.9})
    run = cut_in(3, tmp_path, monkeypatch, tasks.lines(clients=8), told, world=world)
    again = simulate(tasks.lines(clients=8), store=tmp_path, resume=run, world=world)
    assert again.model.read_bytes() == whole.model.read_bytes()
    assert again.world is not None
    assert whole.world is not None
    assert again.world.to_json() == whole.world.to_json()


@pytest.mark.parametrize("kind", [tasks.Line, Headed])
def test_a_stored_asynchronous_run_goes_on_from_the_versions_that_clients_still_train_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[tasks.Line]
) -> None:
    """site-2 takes five times as long as the others, so its update of version 0 comes into a much later one."""
    world = traced(tmp_path, "site-0,2,always", "site-1,2,always", "site-2,0.4,always", "site-3,1.5,always")
    world |= {"buffered": {"size": 2}}
    clients, told = tasks.lines(kind), recipe(rounds=8)
    whole = simulate(clients, told, world=world)
    for n in range(2, 9):
        data = tmp_path / str(n)
        run = cut_in(n, data, monkeypatch, clients, told, world=world)
        again = simulate(clients, store=data, resume=run, world=world)
        assert again.model.read_bytes() == whole.model.read_bytes(), n
        assert again.versions == whole.versions
        assert again.world is not None and whole.world is not None
        assert again.world.to_json() == whole.world.to_json()
        assert any(n - 1 - v > 1 for n, stint, _ in again.world.stints for v in [stint.version])
        files = [p for p in (data / "blobs" / "sha256").rglob("*") if p.is_file()]
        assert len(files) == 2, files  # the first version's and the last one's


def test_a_stored_round_tells_its_world_s_times_bytes_and_who_was_not_heard_and_why(tmp_path: Path) -> None:
    """18, 21 and 24 examples take 10, 20 and 100 s; site-3 would take 180 and leaves after 60. It closes after 70."""
    hours = ("always", "always", "always", "0:00-0:01")
    speeds = (1.8, 1.05, 0.24, 0.1)
    world = traced(tmp_path, *(f"site-{k},{speeds[k]},{hours[k]}" for k in range(4)))
    told = recipe(rounds=1, cohort={"min": 1})
    history = simulate(tasks.lines(), told, world=world | {"deadline_s": 70}, store=tmp_path / "data")
    round = stored_as(tmp_path / "data", history.run).rounds[0]
    lived = round.world
    assert lived is not None and history.world is not None
    assert (lived.begins_s, lived.ends_s, lived.attempts) == (0, pytest.approx(70), 1)
    assert (lived.down_bytes, lived.up_bytes) == history.world.bytes
    parts = {a.client: a for a in round.assignments}
    assert [(c, a.state) for c, a in parts.items()] == [
        ("site-0", "counted"), ("site-1", "counted"), ("site-2", "dropped"), ("site-3", "dropped")
    ]  # fmt: skip
    assert parts["site-2"].late and parts["site-3"].reason == "its hours ended in the midst of its work"
    begun = {c: [(p.name, (p.at - round.opened_at).total_seconds()) for p in a.phases] for c, a in parts.items()}
    assert [name for name, _ in begun["site-1"]] == ["downloading", "training", "uploading", "sent"]
    assert [s for _, s in begun["site-1"]] == pytest.approx([0, 0, 20, 20], abs=0.01)
    assert [name for name, _ in begun["site-3"]] == ["downloading", "training"]
    gone = parts["site-3"].lost_at
    assert gone is not None and (gone - round.opened_at).total_seconds() == pytest.approx(60, abs=0.01)
    assert parts["site-0"].bytes * 2 == lived.up_bytes and parts["site-3"].bytes == 0
    drawn = timeline(round, round.opened_at, patience_s=60, secure=False)
    assert [row.said[0] for row in drawn.rows] == ["In the sum", "In the sum", "Came too late", "Dropped out"]
    assert "Training for 20.0 s" in drawn.rows[1].bar and 'width="28.57%"' in drawn.rows[1].bar  # 20 of 70


def test_a_stored_run_that_ends_early_has_failed_with_the_reason(tmp_path: Path) -> None:
    world = traced(tmp_path, "site-0,10,always", "site-1,1,always", "site-2,1,always", "site-3,1,always")
    history = simulate(tasks.lines(), recipe(), store=tmp_path / "data", world=world | {"deadline_s": 10})
    found = stored_as(tmp_path / "data", history.run).run
    assert (found.state, found.reason) == ("failed", history.ended)
    assert "1 of 4 clients delivered, 3 are needed" in history.ended
    assert weights(history).shape == (3,)
