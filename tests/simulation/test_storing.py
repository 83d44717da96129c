"""Simulations as runs of a coordinator's store, and simulations that were broken off."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tasks
from torch import nn

from murmur.aggregation.strategies import fedavgm, scaffold
from murmur.protocol.errors import Conflict, NotFound, OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.views import RunDetail
from murmur.simulation import Round, rounds, simulate
from murmur.simulation.storing import Stored


class Cut(BaseException):
    """Breaks off a simulation, as Ctrl-C does."""


class Headed(tasks.Line):
    """A bias that stays at the client, which only the client's own file knows."""

    local = ("1.*",)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1), nn.Flatten(0))


def recipe(**values: Any) -> Recipe:
    plain = {"name": "lines", "task": "line", "rounds": 4, "train": {"epochs": 2, "batch_size": 4, "lr": 0.05}}
    return parse_recipe(plain | {"strategy": {"max_weight": 8}, "secure": {"on": False}} | values)


def stored_as(data: Path, run: str) -> RunDetail:
    stored = Stored(data)
    try:
        return stored._store.runs.detail(run)  # pyright: ignore[reportPrivateUsage]: as a coordinator shows it
    finally:
        stored.close()


def cut_in(n: int, data: Path, monkeypatch: pytest.MonkeyPatch, clients: Any, settled: Recipe, **given: Any) -> str:
    """The id of a run that broke off in round `n`, when all of its clients had trained."""
    rounds_done, stored, before = count(1), Stored(data), rounds.rescale

    def rescale(*given: Any, **named: Any) -> None:
        if next(rounds_done) == n:
            raise Cut
        before(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(rounds, "rescale", rescale)
        simulate(clients, settled, store=stored, **given)
    stored.close()
    return stored.id


CASES: dict[str, tuple[type[tasks.Line], dict[str, Any], dict[str, Any]]] = {
    "the server's momentum": (tasks.Line, {}, {"strategy": fedavgm()}),
    "integers and a bound on the weights": (tasks.Normed, {}, {"secure": "ideal"}),
    "ideal sums in groups": (
        tasks.Line,
        {"secure": {"on": True, "groups": 3}, "strategy": {"combine": "median"}, "cohort": {"min": 9, "size": 9}},
        {"secure": "ideal"},
    ),
    "what clients keep": (Headed, {}, {}),
    "control variates": (tasks.Line, {"cohort": {"size": 3}}, {"strategy": scaffold()}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "groups" in c else c for c in CASES])
def test_a_run_that_was_broken_off_ends_in_the_model_of_an_undisturbed_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, values, given = CASES[case]
    clients, settled = tasks.lines(kind, 9 if "groups" in case else 4), recipe(**values)
    whole = simulate(clients, settled, store=tmp_path / "whole", **given)
    run = cut_in(3, tmp_path / "data", monkeypatch, clients, settled, **given)
    told: list[Round] = []
    again = simulate(clients, store=tmp_path / "data", resume=run, on_round=told.append)
    assert [r.n for r in told] == [3, 4]  # the first two are not trained again
    assert again.model.read_bytes() == whole.model.read_bytes()
    assert again.versions == whole.versions
    assert [(r.cohort, r.train_loss) for r in again.rounds] == [(r.cohort, r.train_loss) for r in whole.rounds]
    assert not (tmp_path / "data" / "simulations" / run).exists()


@pytest.mark.slow
def test_the_ledgers_of_sums_and_of_clients_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is fresh each time, so no bits are compared: what was spent is."""
    terms = {"noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-3}
    uniform = {"weighting": "uniform", "max_weight": 1}
    for dp in ({"mode": "central", "adaptive": True, "bit_noise": 5.0, **terms}, {"mode": "local", **terms}):
        settled = recipe(dp=dp, strategy=uniform, cohort={"size": 3})
        run = cut_in(3, tmp_path, monkeypatch, tasks.lines(clients=3), settled)
        again = simulate(tasks.lines(clients=3), store=tmp_path, resume=run)
        whole = simulate(tasks.lines(clients=3), settled)
        assert again.ledger == whole.ledger and len(again.ledger) == (4 if dp["mode"] == "central" else 0)
        assert again.spent == whole.spent and (dp["mode"] == "central" or len(again.spent["site-0"]) == 4)
        privacy = stored_as(tmp_path, run).run.privacy
        assert (privacy.spent if privacy else 0) == len(whole.ledger)
        bounds = [r.clip_norm for r in again.rounds]
        assert len(set(bounds)) == (4 if dp["mode"] == "central" else 1)  # adapted from round to round


def test_a_simulation_is_a_run_with_its_rounds_versions_and_metrics(tmp_path: Path) -> None:
    settled = recipe(cohort={"size": 3})
    history = simulate(tasks.lines(), settled, store=tmp_path, secure="ideal", backend="sequential")
    found = stored_as(tmp_path, history.run)
    assert found.run.state == "finished" and (found.run.round, found.run.version) == (4, 4)
    assert found.run.simulation is not None
    assert found.run.simulation.model_dump() == {"clients": 4, "backend": "sequential", "secure": "ideal"}
    assert [r.kind for r in found.rounds] == ["train"] * 4 + ["evaluate"]
    assert [tuple(a.client for a in r.assignments) for r in found.rounds[:4]] == [r.cohort for r in history.rounds]
    values = {(m.version, m.name): m.value for m in found.metrics}
    for n, metrics in enumerate(history.versions):
        assert {name: values[n, name] for name in metrics} == metrics
    assert [values[r.n, "train_loss"] for r in history.rounds] == pytest.approx([r.train_loss for r in history.rounds])
    assert found.rounds[0].assignments[0].state == "counted"


@pytest.mark.parametrize(("versions", "kept"), [("newest", [0, 4]), ("all", [0, 1, 2, 3, 4])])
def test_the_first_and_the_newest_version_are_kept_or_all(tmp_path: Path, versions: Any, kept: list[int]) -> None:
    stored = Stored(tmp_path, versions=versions)
    simulate(tasks.lines(), recipe(), strategy=fedavgm(), store=stored)
    made = stored._store.runs.versions(stored.id)  # pyright: ignore[reportPrivateUsage]
    blobs = stored._blobs  # pyright: ignore[reportPrivateUsage]
    assert [v.n for v in made[::-1] if blobs.has(v.sha256)] == kept
    stored.close()


def test_what_broke_a_run_off_stands_at_it_and_what_cannot_work_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cut_in(2, tmp_path, monkeypatch, tasks.lines(), recipe())
    held = stored_as(tmp_path, run).run
    assert held.state == "paused"
    assert held.reason == f"interrupted (Cut): murmur simulate --resume {run} goes on"
    stored = Stored(tmp_path)
    with pytest.raises(OperatorError, match="NaN or infinity"):
        simulate(tasks.lines(), recipe(train={"lr": 1000.0, "epochs": 100}), store=stored)
    assert "NaN or infinity" in stored_as(tmp_path, stored.id).run.reason
    stored.close()
    with pytest.raises(Conflict, match="is failed: there is nothing to go on with"):
        simulate(tasks.lines(), store=tmp_path, resume=stored.id)


def test_settings_that_cannot_work_leave_no_run_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no backend"):
        simulate(tasks.lines(), recipe(), store=tmp_path, backend="quantum")  # pyright: ignore[reportArgumentType]
    assert list((tmp_path / "simulations").iterdir()) == []


def test_a_run_is_gone_on_with_by_one_process_with_its_own_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cut_in(2, tmp_path, monkeypatch, tasks.lines(), recipe())
    with pytest.raises(OperatorError, match="is a run of 4 clients, the federation has 5"):
        simulate(tasks.lines(clients=5), store=tmp_path, resume=run)
    with pytest.raises(NotFound, match="no simulated run"):
        simulate(tasks.lines(), store=tmp_path, resume="lines-0")
    with pytest.raises(OperatorError, match="give store, too"):
        simulate(tasks.lines(), resume=run)

    def second(_: Round) -> None:
        with pytest.raises(Conflict, match="is being simulated by another process"):
            simulate(tasks.lines(), store=tmp_path, resume=run)

    assert len(simulate(tasks.lines(), store=tmp_path, resume=run, on_round=second).rounds) == 4


def test_a_run_that_an_admin_stops_ends_after_the_round(tmp_path: Path) -> None:
    stored = Stored(tmp_path)

    def stop(done: Round) -> None:
        if done.n == 2:
            stored._store.runs.stop(stored.id, by="admin")  # pyright: ignore[reportPrivateUsage]

    with pytest.raises(Conflict, match="was ended meanwhile: stopped by admin"):
        simulate(tasks.lines(), recipe(), store=stored, on_round=stop)
    found = stored_as(tmp_path, stored.id).run
    assert (found.state, found.version) == ("stopped", 2)
    stored.close()
