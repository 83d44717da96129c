"""Versions written smaller, with what they lose."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from murmur.clients.engine.state import initial_model
from murmur.clients.task import load_task
from murmur.protocol.errors import OperatorError

with warnings.catch_warnings():  # typer asks a newer click for a name that it deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from murmur.cli import app
    from murmur.exporting import compress, measure

TASKS = Path(__file__).parents[1] / "clients" / "engine" / "sample_tasks.py"
ROWS = f"{TASKS}:Images"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    initial_model(load_task(ROWS, {}), 1, path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["model", "export", *map(str, arguments)])


def test_an_exported_model_is_measured_beside_the_original(model: Path, tmp_path: Path):
    out = tmp_path / "small.safetensors"
    done = run(model, "--int8", "--prune", 0.5, "--out", out, "--task", ROWS, "-o", "test=42", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["bytes"] == out.stat().st_size and told["original_bytes"] == model.stat().st_size
    assert 0.5 <= told["zeros"] < 0.55  # rounding to 8 bits makes a few more
    assert told["before"] == measure(model, ROWS, {"test": 42})
    assert told["after"].keys() == {"loss", "accuracy"} and told["after"] != told["before"]
    assert {str(t.dtype) for t in load_file(out).values()} >= {"torch.int8", "torch.float32"}


def test_what_is_told_to_people_has_bytes_and_figures(model: Path, tmp_path: Path):
    done = run(model, "--bf16", "--out", tmp_path / "b", "--task", ROWS)
    size = (tmp_path / "b").stat().st_size
    words = " ".join(done.output.split())
    assert f"{size} bytes" in words and "accuracy" in words and "original exported" in words
    assert "% of the weights" not in words


def test_without_a_task_nothing_is_measured(model: Path, tmp_path: Path):
    done = compress(model, tmp_path / "half", prune=0.5)
    assert (done.before, done.after, done.bytes) == ({}, {}, done.original_bytes)
    assert done.zeros == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "say how"), (["--int8", "--bf16"], "weights are one of them"), (["--prune", "1"], "0<=x<=0.99")],
)
def test_the_command_says_what_it_needs(arguments: list[str], words: str, model: Path, tmp_path: Path):
    done = run(model, "--out", tmp_path / "x", *arguments)
    assert done.exit_code == 2 and words in done.output
    assert not (tmp_path / "x").exists()


def test_a_task_without_test_data_or_of_another_model_is_told(model: Path, tmp_path: Path):
    with pytest.raises(OperatorError, match="no test data here"):
        measure(model, ROWS, {"test": 0})
    with pytest.raises(OperatorError, match="does not fit the task's"):
        measure(model, f"{TASKS}:Rows", {})
    done = run(TASKS, "--int8", "--out", tmp_path / "x")
    assert done.exit_code == 1 and "not a safetensors" in done.output
