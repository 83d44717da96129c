"""Tests of versions on what no client of a round holds, and runs that end when they get no better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
from test_storing import cut_in, recipe, stored_as

from murmur.protocol.errors import OperatorError
from murmur.simulation import CentralTest, simulate
from murmur.simulation.testing import Examiner, hold_out


def loss_of(clients: list[str], weights: Any) -> float:
    """Half of the mean squared error over the two test rows of each."""
    made = [tasks.lines(clients=6)[c]() for c in clients]
    errors = np.concatenate([m.x[:2] @ weights - m.y[:2] for m in made])
    return float((errors**2).mean() / 2)


def test_clients_that_are_held_out_train_in_no_round_and_every_version_is_measured_on_them(tmp_path: Path) -> None:
    told = CentralTest(clients=2, every=2)
    history = simulate(tasks.lines(clients=6), recipe(rounds=5), test=told, seed=3, store=tmp_path)
    trained = {client for r in history.rounds for client in r.cohort}
    held = sorted(set(tasks.lines(clients=6)) - trained)
    assert (history.clients, len(held)) == (4, 2)
    assert list(history.tests) == [0, 2, 4, 5]  # each second one, the first and the last
    assert history.tests[5]["loss"] == pytest.approx(loss_of(held, history.state_dict()["0.weight"].numpy()[0]))
    assert history.to_json()["tests"]["4"] == history.tests[4]
    same = simulate(tasks.lines(clients=6), recipe(rounds=1), test=told, seed=3)
    assert {c for r in same.rounds for c in r.cohort} == trained
    values = {(m.version, m.name): m.value for m in stored_as(tmp_path, history.run).metrics}
    tests = {n: {name: values[n, f"test_{name}"] for name in found} for n, found in history.tests.items()}
    assert tests == history.tests
    assert (3, "test_loss") not in values


def test_a_run_that_gets_no_better_on_another_task_s_data_ends_and_has_finished(tmp_path: Path) -> None:
    """The test's line has another slope: going towards the clients' own leads away from it after some rounds."""
    other = tasks.Line(0, 8)
    other.y = (other.x @ np.float32([0.2, -0.3, 0.1])).astype(np.float32)
    told = CentralTest(task=other, patience=2)
    history = simulate(tasks.lines(), recipe(rounds=40), test=told, store=tmp_path)
    losses = [found["loss"] for found in history.tests.values()]
    best = int(np.argmin(losses))
    assert len(history.rounds) == best + 2 < 40
    assert history.ended == f"the test's loss has not got better in 2 tests: {losses[best]:.6g} at version {best}"
    found = stored_as(tmp_path, history.run)
    assert (found.run.state, found.run.reason, found.run.round) == ("finished", history.ended, len(history.rounds))
    assert found.rounds[-1].kind == "evaluate"


def test_a_tested_run_that_was_broken_off_stops_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tasks.Line(0, 8)
    other.y = (other.x @ np.float32([0.2, -0.3, 0.1])).astype(np.float32)
    told = CentralTest(task=other, patience=2)
    whole = simulate(tasks.lines(), recipe(rounds=40), test=told)
    run = cut_in(2, tmp_path, monkeypatch, tasks.lines(), recipe(rounds=40), test=told)
    again = simulate(tasks.lines(), store=tmp_path, resume=run, test=told)
    assert again.tests == whole.tests
    assert (again.ended, len(again.rounds)) == (whole.ended, len(whole.rounds))


def test_patience_counts_tests_since_the_best_one_and_a_loss_is_good_when_it_is_low() -> None:
    def enough(metric: str, *values: float) -> str:
        examiner = Examiner(CentralTest(task=tasks.Line(0, 5), patience=2, metric=metric), None, recipe())
        return examiner.enough([(3 * i, {metric: (v, 1.0)}) for i, v in enumerate(values)])

    assert enough("loss", 3, 2, 2.5) == enough("loss", 3, 2, 2.5, 1.9) == enough("accuracy", 1, 2, 1.5) == ""
    assert enough("loss", 3, 2, 2.5, 2.0).endswith("in 2 tests: 2 at version 3")
    assert enough("accuracy", 1, 2, 1.5, 1.9).endswith("in 2 tests: 2 at version 3")


def test_tests_that_cannot_be_say_what_to_change() -> None:
    federation = tasks.lines()
    with pytest.raises(OperatorError, match="one of them"):
        CentralTest()
    with pytest.raises(OperatorError, match="4 clients are to be held out, and the federation has 4"):
        simulate(federation, recipe(), test=CentralTest(clients=4))
    with pytest.raises(OperatorError, match="measures no 'auc' to wait for: name one of loss, accuracy"):
        simulate(federation, recipe(), test=CentralTest(clients=1, patience=1, metric="auc"))
    with pytest.raises(OperatorError, match="another model than that of the versions"):
        simulate(federation, recipe(), test=CentralTest(task=tasks.Normed(0, 5)))


def test_who_is_held_out_follows_from_the_seed() -> None:
    from murmur.simulation import as_federation

    whole = as_federation(tasks.lines(clients=20))
    parts = [hold_out(whole, 5, seed) for seed in (1, 1, 2)]
    assert [len(p) for pair in parts for p in pair] == [15, 5] * 3
    assert parts[0][1].ids == parts[1][1].ids != parts[2][1].ids
    assert sorted(parts[0][0].ids + parts[0][1].ids) == list(whole.ids)
