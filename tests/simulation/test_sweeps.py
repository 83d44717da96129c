"""Sweeps: what varies, every combination of it, and the files that tell what came out."""

from __future__ import annotations

import csv
import json
from typing import Any
from xml.etree import ElementTree

import pytest

from murmur.protocol.errors import OperatorError
from murmur.simulation.sweeps import Trial, axes, curves_csv, grid, notebook, picture, ranked, table_csv


def trial(lr: float, *losses: float, **more: Any) -> Trial:
    history = {"versions": [{"loss": x, "accuracy": 1 - x} for x in losses], "run": f"run-{lr}"}
    rounds = [{"seconds": 0.5}] * (len(losses) - 1)
    return Trial(params={"train.lr": lr, **more}, history=history | {"rounds": rounds})


TRIALS = [trial(0.1, 1.0, 0.5), trial(0.01, 1.0, 0.25), Trial(params={"train.lr": 9.0}, reason="diverged, NaN")]


def test_a_list_where_one_value_belongs_varies_and_a_list_that_belongs_does_not() -> None:
    values = {"metrics": ["loss"], "rounds": [5, 10], "train": {"lr": [0.1, 0.01, 0.1], "batch_size": 8}}
    values["train"] = {**values["train"], "optimizer_options": {"betas": [0.9, 0.99]}}  # type: ignore[dict-item]
    assert axes(values) == {"rounds": (5, 10), "train.lr": (0.1, 0.01)}
    with pytest.raises(OperatorError, match=r"train\.lr is an empty list"):
        axes({"train": {"lr": []}})


def test_the_grid_has_every_combination_once() -> None:
    assert grid({"a": (1, 2), "b": ("x", "y")}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", 0.01), ("loss:max", 0.1), ("accuracy", 0.01), ("accuracy:min", 0.1)]
)
def test_the_best_comes_first_and_what_failed_last(metric: str, best: float) -> None:
    order = [t.params["train.lr"] for t in ranked(TRIALS, metric)]
    assert order[0] == best and order[-1] == 9.0


def test_a_metric_that_nobody_has_is_named_with_those_that_are_there() -> None:
    with pytest.raises(OperatorError, match="no metric 'auc': there are accuracy, loss"):
        ranked(TRIALS, "auc")


def test_the_tables_hold_settings_metrics_runs_and_reasons() -> None:
    rows = list(csv.DictReader(table_csv(TRIALS).splitlines()))
    assert rows[1] == {
        "train.lr": "0.01", "accuracy": "0.75", "loss": "0.25", "rounds": "1", "seconds": "0.5", "run": "run-0.01",
        "reason": "",
    }  # fmt: skip
    assert rows[2]["reason"] == "diverged, NaN" and rows[2]["loss"] == ""
    curves = list(csv.DictReader(curves_csv(TRIALS).splitlines()))
    assert [(c["train.lr"], c["version"], c["loss"]) for c in curves] == [
        ("0.1", "0", "1.0"), ("0.1", "1", "0.5"), ("0.01", "0", "1.0"), ("0.01", "1", "0.25"),
    ]  # fmt: skip


def test_the_picture_is_a_file_of_its_own_that_names_what_it_draws() -> None:
    many = [trial(n / 10, 1.0, n / 10, task="<b>&") for n in range(1, 7)]
    drawn = picture(many, "loss")
    ElementTree.fromstring(drawn)  # raises for what is no XML: names are escaped
    assert "loss by version, the best 4 of 6" in drawn
    assert drawn.count("train.lr 0.4, task &lt;b&gt;&amp;</text>") == 1 and "train.lr 0.5" not in drawn


def test_the_notebook_runs_over_the_files_beside_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.csv").write_text(table_csv(TRIALS))
    (tmp_path / "curves.csv").write_text(curves_csv(TRIALS))
    monkeypatch.chdir(tmp_path)
    found = json.loads(notebook("Sweep", "loss:min"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    cells = [
        "".join(c["source"]) for c in found["cells"] if c["cell_type"] == "code" and "SVG" not in "".join(c["source"])
    ]
    names: dict[str, Any] = {}
    for cell in cells:
        *statements, last = cell.split("\n")
        exec("\n".join([*statements, f"shown = {last}"]), names)
    assert names["shown"] == [("0", "1.0"), ("1", "0.5"), ("0", "1.0"), ("1", "0.25")]
