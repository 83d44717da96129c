"""Searches over a federation whose best rate and whose losses are known by hand."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from murmur.privacy.dp.accounting import Event, epsilon
from murmur.protocol.errors import OperatorError, Unavailable
from murmur.protocol.recipe import Recipe, load_recipe
from murmur.protocol.views import EventView, MetricPoint
from murmur.simulation.search import Search
from murmur.tuning import tune

from .planted import BASE, RATES, federation, loss_of
from .test_cli import murmur

torch.set_num_threads(1)
PLANTED = f"{Path(__file__).with_name('planted.py')}:federation"
DP = {
    "cohort": {"size": 3, "min": 3},
    "strategy": {"weighting": "uniform", "max_weight": 1},
    "dp": {"mode": "central", "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-5},
}


def told(found: Search) -> list[tuple[Any, ...]]:
    """A search without its clock."""
    return [(t.n, t.state, dict(t.params), t.value, t.version) for t in found.trials]


def look(folder: Path, **changes: Any) -> Search:
    given = {"space": {"train.lr": RATES}, "metric": "loss", "pruner": "halving"} | changes
    return tune(given.pop("recipe", BASE), given.pop("federation", federation), folder=folder, **given)


@pytest.mark.slow
def test_halving_finds_the_best_of_eight_rates_and_the_same_trials_for_the_same_seed(tmp_path: Path):
    found = look(tmp_path / "a")
    assert found.best and found.best.params == {"train.lr": 1.0} and found.best.value == pytest.approx(0.0, abs=1e-12)
    assert sorted(t.params["train.lr"] for t in found.trials) == RATES  # each once
    assert {t.state for t in found.trials} == {"complete", "pruned"}
    assert found.recipe["train"]["lr"] == 1.0
    assert told(look(tmp_path / "b")) == told(found)
    other = look(tmp_path / "c", seed=1)
    assert [t.params for t in other.trials] != [t.params for t in found.trials]
    assert other.best and other.best.params == found.best.params


def test_without_pruning_every_trial_ends_in_the_loss_that_its_rate_leaves(tmp_path: Path):
    found = look(tmp_path, pruner="none")
    for trial in found.trials:
        expected = loss_of(float(trial.params["train.lr"]), 4)
        assert (trial.state, trial.version) == ("complete", 4)
        assert trial.value == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_range_is_searched_by_seed_and_goes_on_with_more_trials(tmp_path: Path):
    given = {"space": {"train.lr": "1e-3..1:log", "train.epochs": "1..3"}, "pruner": "median"}
    whole = look(tmp_path / "whole", trials=14, **given)
    look(tmp_path / "parts", trials=11, **given)
    parts = look(tmp_path / "parts", trials=14, **given)
    assert told(parts) == told(whole) and len(whole.trials) == 14
    for trial in whole.trials:
        assert 1e-3 <= float(trial.params["train.lr"]) <= 1 and trial.params["train.epochs"] in (1, 2, 3)


@pytest.mark.slow
def test_a_search_that_is_killed_inside_a_trial_goes_on_as_if_it_had_not_been(tmp_path: Path):
    given: dict[str, Any] = {"space": {"train.lr": "1e-3..1:log"}, "trials": 6, "metric": "loss", "pruner": "median"}
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from murmur.tuning import tune\n"
        f"tune({BASE!r}, {PLANTED!r}, options={{'killed_at': 14}}, folder={str(tmp_path / 'killed')!r}, **{given!r})"
    )
    environment = os.environ | {"MURMUR_TEST_MARK": str(tmp_path / "mark")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = tune(BASE, PLANTED, folder=tmp_path / "killed", **given)
    whole = tune(BASE, PLANTED, folder=tmp_path / "whole", **given)
    assert told(resumed) == told(whole) and len(whole.trials) == 6


def test_epsilon_is_that_of_all_trials_together_pruned_ones_too(tmp_path: Path):
    found = look(tmp_path, recipe=BASE | DP, space={"train.lr": [0.1, 0.2, 0.3, 0.4]}, metric="loss")
    ran = sum(4 if t.state == "complete" else t.version + 1 for t in found.trials)
    assert 4 < ran < 16 and any(t.state == "pruned" for t in found.trials)
    # n sums with noise z are one with z / sqrt(n).
    once = epsilon([Event(noise_multiplier=2.0 / math.sqrt(ran))], 1e-5, unit="client").value
    assert found.epsilons["clients"].value == pytest.approx(once, rel=1e-9)
    assert found.epsilons["clients"].unit == "client"


def test_with_dp_sgd_each_clients_own_trainings_add_up(tmp_path: Path):
    local = BASE | {"rounds": 1, "dp": {"mode": "local", "noise_multiplier": 1.5, "delta": 1e-3}}
    found = look(tmp_path, recipe=local, space={"train.lr": [0.1, 0.2]}, pruner="none")
    # 4 rows in one batch of 4: one step a trial with rate 1, so two of them.
    twice = epsilon([Event(noise_multiplier=1.5, count=2)], 1e-3, unit="example").value
    assert {e.value for e in found.epsilons.values()} == {twice} and len(found.epsilons) == 3


def test_a_budget_ends_the_search_before_the_trial_that_could_exceed_it(tmp_path: Path):
    def spent(rounds: int) -> float:
        return epsilon([Event(noise_multiplier=2.0, count=rounds)], 1e-5, unit="client").value

    given: dict[str, Any] = {"recipe": BASE | DP, "space": {"train.lr": [0.1, 0.2, 0.3]}, "pruner": "none"}
    found = look(tmp_path, budget=spent(11), **given)  # two trials of 4 rounds, no third
    assert len(found.trials) == 2 and found.epsilons["clients"].value == pytest.approx(spent(8))
    assert "the privacy budget" in found.stopped and found.best
    more = look(tmp_path, budget=spent(12), **given)
    assert len(more.trials) == 3 and not more.stopped
    assert more.epsilons["clients"].value == pytest.approx(spent(12))


def test_a_rate_at_which_training_diverges_is_a_failed_trial_and_not_the_end(tmp_path: Path):
    found = look(tmp_path, space={"train.lr": [0.5, 1000.0]}, recipe=BASE | {"rounds": 10}, pruner="none")
    assert sorted(t.state for t in found.trials) == ["complete", "failed"]
    assert found.best and found.best.params["train.lr"] == 0.5
    assert next(t for t in found.trials if t.state == "failed").value is None


def test_a_folder_keeps_one_search(tmp_path: Path):
    look(tmp_path, trials=1, space={"train.lr": "0.1..1"})
    with pytest.raises(OperatorError, match="another space"):
        look(tmp_path, trials=1, space={"train.lr": "0.1..2"})


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"train.rate": "0.1..1"}, "no 'rate' in train; it has .*lr"),
        ({"train.lr": "1..0.1"}, "smaller to a larger"),
        ({"train.lr": "0..1:log"}, "above 0"),
        ({"train.lr": "-1..1"}, "train.lr = -1.0: train.lr"),
        ({"train.epochs": "0.5..2"}, "whole number"),
        ({"train.precision": ["fp32", "int4"]}, "train.precision = 'int4'"),
        ({"train.lr": [0.1]}, "two or more"),
        ({"dp.delta": "1e-6..1e-3"}, "same in every trial"),
        ({"train.lr": 0.1}, "nothing to search"),
    ],
)
def test_a_space_that_cannot_be_searched_says_why(tmp_path: Path, space: dict[str, Any], said: str):
    with pytest.raises(OperatorError, match=said):
        look(tmp_path, space=space)


def test_a_metric_that_the_run_does_not_have_is_named(tmp_path: Path):
    found = look(tmp_path, metric="auc", space={"train.lr": [0.1, 0.2]})
    assert found.best is None and "no metric 'auc' (it has: loss)" in found.trials[0].reason


@pytest.mark.slow
def test_the_command_reads_the_table_of_a_recipe_and_writes_the_best_one(tmp_path: Path):
    (tmp_path / "task.py").write_text(Path(__file__).with_name("planted.py").read_text())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "planted"\ntask = "planted"\nrounds = 3\nmetrics = ["loss"]\n'
        "[train]\nbatch_size = 4\n[secure]\non = false\n"
        f'[tune]\nmetric = "loss"\n[tune.space]\ntrain.lr = {RATES}\n'
    )
    assert load_recipe(recipe).train.lr == 0.01  # a run of the same file knows nothing of the table
    done = murmur("tune", recipe, "--dir", tmp_path / "search", "--json", timeout=300)
    found = json.loads(done.out)
    assert done.code == 0 and found["best"]["params"] == {"train.lr": 1.0} and len(found["trials"]) == 8
    assert load_recipe(tmp_path / "search" / "best.toml").train.lr == 1.0
    shown = murmur("tune", recipe, "--dir", tmp_path / "search", timeout=300)  # nothing is left to do: the table again
    assert shown.code == 0 and "the best recipe is in" in shown.out


class Runs:
    """A coordinator's client whose runs end in the losses that their rates leave; `cut` loses the search mid-way."""

    def __init__(self, cut: str = "") -> None:
        self.started: dict[str, Recipe] = {}
        self.stopped: list[str] = []
        self.cut, self.version = cut, 0

    def runs(self) -> list[Any]:
        return [self.run(run).run for run in self.started]

    def start_run(self, recipe: Recipe, model: Path) -> str:
        run = f"run-{len(self.started) + 1}"
        self.started[run] = recipe
        self._cut("started")
        return run

    def stop_run(self, run: str) -> None:
        self.stopped.append(run)

    def watch(self, run: str) -> Iterator[EventView]:
        for version in range(1, self.started[run].rounds + 1):
            self.version = version
            yield EventView(id=1, run=run, kind="model", data={"version": self.version}, at=datetime.now(UTC))
            self._cut("watched")

    def run(self, run: str) -> Any:
        recipe, over = self.started[run], run in self.stopped
        rate, known = recipe.train.lr, self.version
        points = [MetricPoint(version=n, name="loss", value=loss_of(rate, n), count=12) for n in range(known)]
        if known == recipe.rounds:
            points.append(MetricPoint(version=known, name="loss", value=loss_of(rate, known), count=12))
        state = "stopped" if over else "finished" if known == recipe.rounds else "running"
        view = SimpleNamespace(id=run, recipe=recipe, state=state, reason="", version=known, privacy=None)
        if recipe.dp.of_clients:
            view.privacy = SimpleNamespace(spent=known)
        return SimpleNamespace(run=view, metrics=points)

    def _cut(self, where: str) -> None:
        if self.cut == where:
            self.cut = ""
            raise KeyboardInterrupt


def on_coordinator(client: Runs, folder: Path, **changes: Any) -> Search:
    def first_model(recipe: Recipe) -> Any:
        return nullcontext(Path("model"))

    return look(folder, coordinator=client, first_model=first_model, federation=None, **changes)


def test_trials_are_runs_on_a_coordinator_and_the_pruned_ones_are_stopped(tmp_path: Path):
    client = Runs()
    found = on_coordinator(client, tmp_path)
    assert found.best and found.best.params == {"train.lr": 1.0}
    assert {t.run for t in found.trials} == set(client.started) and len(client.started) == 8
    assert client.stopped == [t.run for t in found.trials if t.state == "pruned"] != []
    assert len({r.name for r in client.started.values()}) == 8


def test_epsilon_of_runs_counts_the_sums_that_the_coordinator_took(tmp_path: Path):
    found = on_coordinator(Runs(), tmp_path, recipe=BASE | DP, space={"train.lr": [0.1, 0.2]}, pruner="none")
    eight = epsilon([Event(noise_multiplier=2.0, count=8)], 1e-5, unit="client").value
    assert found.epsilons["clients"].value == pytest.approx(eight)


def test_a_coordinator_that_cannot_be_reached_fails_no_trial(tmp_path: Path):
    class Away(Runs):
        away = True

        def watch(self, run: str) -> Iterator[EventView]:
            if self.away:
                raise Unavailable("it is away")
            return super().watch(run)

    client = Away()
    with pytest.raises(Unavailable):
        on_coordinator(client, tmp_path, pruner="none")
    client.away = False
    found = on_coordinator(client, tmp_path, pruner="none")
    assert {t.state for t in found.trials} == {"complete"} and len(client.started) == 8


def test_a_budget_that_nobody_could_keep_is_refused(tmp_path: Path):
    local = BASE | {"dp": {"mode": "local", "noise_multiplier": 1.5}}
    with pytest.raises(OperatorError, match="every site has a ledger and a budget of its own"):
        on_coordinator(Runs(), tmp_path, recipe=local, budget=3.0)


@pytest.mark.parametrize("where", ["started", "watched"])
def test_a_run_that_was_left_going_is_found_again(tmp_path: Path, where: str):
    client = Runs(cut=where)
    with pytest.raises(KeyboardInterrupt):
        on_coordinator(client, tmp_path, pruner="none")
    assert len(client.started) == 1
    found = on_coordinator(client, tmp_path, pruner="none")
    assert len(client.started) == 8 and {t.state for t in found.trials} == {"complete"}
