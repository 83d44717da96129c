"""The hospitals' example: what becomes of a row, that no test row leaks, and that the recipe trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from murmur.clients.task import load_task
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, load_recipe
from murmur.simulation import simulate

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def records(module: Load) -> ModuleType:
    return module("hospitals/records.py")


@pytest.fixture(scope="module")
def baselines(module: Load) -> ModuleType:
    return module("hospitals/baselines.py")


@pytest.fixture(scope="module")
def recipe(examples: Path) -> Recipe:
    return load_recipe(examples / "hospitals" / "recipe.toml")


def heart(examples: Path, name: str, **options: Any) -> Any:
    data = examples / "hospitals" / "data" / f"processed.{name}.data"
    return load_task(f"{examples}/hospitals/task.py:Heart", {"data": str(data), **options})


def test_the_files_are_the_published_ones(examples: Path) -> None:
    said = (examples / "hospitals" / "data" / "SOURCE.md").read_text()
    for name in HOSPITALS:
        data = (examples / "hospitals" / "data" / f"processed.{name}.data").read_bytes()
        assert hashlib.sha256(data).hexdigest() in said


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("cleveland", 200, 103), ("hungarian", 194, 100), ("switzerland", 81, 42), ("va", 132, 68)],
)
def test_two_thirds_of_each_hospital_train(examples: Path, name: str, train: int, test: int) -> None:
    task = heart(examples, name)
    assert (len(task.data("train")), len(task.data("test"))) == (train, test)
    inputs, targets = task.data("train")[:]
    assert inputs.dtype == targets.dtype == torch.float32
    assert torch.isfinite(inputs).all()
    assert set(targets.tolist()) == {0.0, 1.0}
    assert task.model()(inputs).shape == targets.shape


ROWS = """63,1,1,145,233,1,2,150,0,2.3,3,0,6,0
50,0,4,?,0,?,0,-9,?,?,?,?,?,3
40,1,2,0,300,0,1,130,1,0.5,1,2,3,1
"""


def test_missing_values_are_question_marks_minus_nine_and_impossible_zeros(records: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(ROWS)
    columns, targets = records.read(tmp_path / "rows")
    missing = [{records.COLUMNS[j] for j in np.flatnonzero(np.isnan(row))} for row in columns]
    unknown = {"trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "slope", "ca", "thal"}
    assert missing == [set(), unknown, {"trestbps"}]
    assert targets.tolist() == [0, 1, 1]
    assert columns[0, records.COLUMNS.index("ca")] == 0  # a zero that can be is one


def test_a_row_becomes_the_numbers_one_expects(records: ModuleType, tmp_path: Path) -> None:
    """Train rows: 63 and 40 years old, cholesterol 233 and 300; the second row is missing nearly all."""
    (tmp_path / "rows").write_text(ROWS)
    columns, _ = records.read(tmp_path / "rows")
    full, empty, _ = records._features(columns, np.array([0, 2]), "agreed")
    assert len(full) == records.FEATURES == 30
    assert full[:6] == pytest.approx([0.8, 0.75, -0.14, 0.4, 1.3, 0.0])  # (63-55)/10, (145-130)/20, (233-240)/50, …
    assert full[6:9].tolist() == [1, 1, 0]  # male, high sugar, no angina
    assert full[9:22].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0]  # cp 1; restecg 2; slope 3; thal 6
    assert full[22:].tolist() == [0] * 8
    medians = [(50 - 55) / 10, (145 - 130) / 20, (266.5 - 240) / 50, (140 - 140) / 25, (1.4 - 1) / 1, 1.0]
    assert empty[:6] == pytest.approx(medians)  # of the train rows
    assert empty[9:22].tolist() == [0, 0, 0, 1, 1, 0, 0] + [0] * 6  # no slope and no thal
    assert empty[22:].tolist() == [1] * 8


def test_a_column_that_a_hospital_never_measured_takes_the_agreed_centre(examples: Path, records: ModuleType) -> None:
    for scaling in ("agreed", "own"):
        rows = records.prepare(examples / "hospitals/data/processed.switzerland.data", 0, scaling)["train"]
        assert set(rows.inputs[:, 2].tolist()) == {0.0}  # cholesterol: no Swiss row has it


@pytest.mark.parametrize("scaling", ["agreed", "own"])
def test_no_test_row_leaks_into_what_is_trained_on(
    examples: Path, records: ModuleType, tmp_path: Path, scaling: str
) -> None:
    lines = (examples / "hospitals/data/processed.va.data").read_text().splitlines()
    _, targets = records.read(examples / "hospitals/data/processed.va.data")
    _, test = records.split(targets, 0)
    for row in test:
        lines[row] = "99,0,1,199,599,1,2,199,0,9,3,3,7," + lines[row].rpartition(",")[2]
    (tmp_path / "rows").write_text("\n".join(lines))
    before = records.prepare(examples / "hospitals/data/processed.va.data", 0, scaling)
    after = records.prepare(tmp_path / "rows", 0, scaling)
    assert before["train"].inputs.tobytes() == after["train"].inputs.tobytes()
    assert before["test"].inputs.tobytes() != after["test"].inputs.tobytes()


def test_the_split_is_stratified_and_fixed_by_its_seed(records: ModuleType) -> None:
    targets = np.array([0] * 100 + [1] * 50)
    train, test = records.split(targets, 3)
    assert sorted([*train, *test]) == list(range(150))
    assert (targets[train] == 0).sum() == 66
    assert (targets[train] == 1).sum() == 33
    assert records.split(targets, 3)[0].tolist() == train.tolist()
    assert records.split(targets, 4)[0].tolist() != train.tolist()


@pytest.mark.parametrize("text", ["", "1,2,3\n", "a,1,1,1,1,1,1,1,1,1,1,1,1,0\n", ROWS.splitlines()[0]])
def test_another_kind_of_file_is_refused_with_its_name(examples: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(OperatorError, match=r"rows\.csv"):
        load_task(f"{examples}/hospitals/task.py:Heart", {"data": str(tmp_path / "rows.csv")})
    with pytest.raises(OperatorError, match="cannot read"):
        load_task(f"{examples}/hospitals/task.py:Heart", {"data": str(tmp_path / "none")})


def test_loss_is_a_sum_and_metrics_count_what_they_say(examples: Path) -> None:
    task = heart(examples, "va")
    output, target = torch.tensor([2.0, -1.0, 1.0, -3.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    one_by_one = [task.loss(output[i : i + 1], target[i : i + 1]).item() for i in range(4)]
    assert task.loss(output, target).item() == pytest.approx(sum(one_by_one))
    found = {name: (int(total), count) for name, (total, count) in task.metrics(output, target).items()}
    assert found == {"accuracy": (2, 4), "sensitivity": (1, 2), "specificity": (1, 2)}


def test_the_recipe_is_25_masked_rounds_of_fedprox(recipe: Recipe) -> None:
    assert (recipe.rounds, recipe.strategy.name, recipe.secure.on) == (25, "fedprox", True)
    assert set(recipe.metrics) == {"loss", "accuracy", "sensitivity", "specificity"}


@pytest.mark.slow
def test_five_masked_rounds_give_one_model_that_is_good_everywhere(
    examples: Path, recipe: Recipe, baselines: ModuleType
) -> None:
    history = simulate(examples / "hospitals", recipe, rounds=5, secure="real")
    tasks = [heart(examples, name) for name in HOSPITALS]
    federated = [baselines.evaluate(task, history.model) for task in tasks]
    assert np.mean(federated) > 0.78
    rows = [len(task.data("test")) for task in tasks]
    assert history.final["accuracy"] == pytest.approx(np.average(federated, weights=rows), abs=1e-6)


@pytest.mark.slow
def test_the_whole_recipe_beats_each_hospital_alone_on_average(
    examples: Path, recipe: Recipe, baselines: ModuleType
) -> None:
    history = simulate(examples / "hospitals", recipe, secure="real")
    tasks = [heart(examples, name) for name in HOSPITALS]
    federated = [baselines.evaluate(task, history.model) for task in tasks]
    alone = [baselines.evaluate(task, baselines.local(task, recipe)) for task in tasks]
    pooled = baselines.pooled(tasks, recipe)
    together = [baselines.evaluate(task, pooled) for task in tasks]
    assert np.mean(federated) > np.mean(alone)
    assert min(np.mean(federated), np.mean(together)) > 0.8


def test_baselines_train_the_same_model_for_the_same_seed(
    examples: Path, baselines: ModuleType, recipe: Recipe
) -> None:
    short = recipe.model_copy(update={"rounds": 1})
    task = heart(examples, "va")
    one, two, other = (baselines.local(task, short, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(one["layers.0.weight"], two["layers.0.weight"])
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])
