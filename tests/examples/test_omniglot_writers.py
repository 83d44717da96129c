"""Characters by writer: what a drawing becomes, who holds which, and what the command's table says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from murmur.protocol.errors import OperatorError

WRITERS, ALPHABETS, CHARACTERS = 6, 2, 10  # of each alphabet


@pytest.fixture(scope="module")
def task(module: Callable[[str], ModuleType]) -> Any:
    return module("omniglot_writers/task.py")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in with the file's keys: alphabet 0 is drawn in upright strokes and 1 in flat ones, by wavering hands."""
    rng = np.random.default_rng(0)
    rows = [(a, c, w) for a in range(ALPHABETS) for c in range(CHARACTERS) for w in range(WRITERS)]
    pixels = np.zeros((len(rows), 105, 105), np.uint8)
    for drawn, (alphabet, character, _) in zip(pixels, rows, strict=True):
        for begin in (10 * character, (10 * character + 45) % 100):
            drawn[begin + rng.integers(5) :][:4] = 1
        if not alphabet:
            drawn[:] = drawn.T.copy()
    pixels[0, :5, :5] = np.eye(5)
    alphabet, character, drawer = np.array(rows, np.uint8).T
    path = tmp_path_factory.mktemp("drawings") / "omniglot_small.npz"
    ink = np.packbits(pixels.reshape(len(rows), -1), axis=1)
    np.savez(path, ink=ink, alphabet=alphabet, character=character + 1, drawer=drawer + 1)
    return str(path)


def test_a_number_is_the_part_of_a_block_that_is_ink(task: Any, drawings: str) -> None:
    images, writers = task.drawings_of(drawings, "alphabet")
    inputs, labels = images.tensors
    assert inputs.shape == (WRITERS * ALPHABETS * CHARACTERS, 1, 21, 21)
    assert float(inputs[0, 0, 0, 0]) == pytest.approx(5 / 25)  # a diagonal of ink through 5 × 5 pixels
    assert labels.bincount().tolist() == [WRITERS * CHARACTERS] * 2
    assert writers.tolist()[:WRITERS] == [1, 2, 3, 4, 5, 6]


def test_a_character_of_another_alphabet_is_another_class(task: Any, drawings: str) -> None:
    labels = task.drawings_of(drawings, "character")[0].tensors[1]
    assert labels.bincount().tolist() == [WRITERS] * (ALPHABETS * CHARACTERS)


def test_each_writer_holds_its_own_drawings_and_keeps_a_fifth_for_tests(task: Any, drawings: str) -> None:
    writers = task.federation(drawings, seed=3)
    assert list(writers) == [f"writer-{n:02}" for n in range(1, WRITERS + 1)]
    drawer = task.drawings_of(drawings, "alphabet")[1]
    held = [(w.rows["train"], w.rows["test"]) for w in writers.values()]
    assert [(len(a), len(b)) for a, b in held] == [(16, 4)] * WRITERS
    assert [set(drawer[a + b].tolist()) for a, b in held] == [{n} for n in range(1, WRITERS + 1)]
    assert sorted(row for a, b in held for row in a + b) == list(range(len(drawer)))
    assert task.federation(drawings, seed=3)["writer-01"].rows == writers["writer-01"].rows
    assert task.federation(drawings, seed=4)["writer-01"].rows != writers["writer-01"].rows
    assert len(task.together([*writers.values()]).data("test")) == 4 * WRITERS


def test_what_is_no_such_file_is_told(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MURMUR_OMNIGLOT", raising=False)
    with pytest.raises(OperatorError, match="no path was given"):
        task.federation()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(OperatorError, match="does not hold ink"):
        task.federation(str(tmp_path / "other.npz"))
    with pytest.raises(OperatorError, match="alphabet or character"):
        task.federation(label="digit")


@pytest.mark.slow
def test_the_command_finds_that_writers_learn_each_others_characters(
    module: Callable[[str], ModuleType],
    examples: Path,
    drawings: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(examples / "omniglot_writers"))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    measure = module("omniglot_writers/measure.py")
    monkeypatch.delitem(sys.modules, "task")
    picture = tmp_path / "curves.svg"
    given = [
        str(picture),
        "--data",
        drawings,
        "--label",
        "character",
        "--seeds",
        "1",
        "--rounds",
        "30",
        "--unseen",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["measure.py", *given])
    measure.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "%" in line]
    found = {name: [float(cell.split("%")[0]) for cell in cells] for name, *cells in lines}
    assert list(found) == list(measure.METHODS)
    # a writer's test drawings are of characters that it has no other drawing of
    assert found["alone"][0] < 10
    assert found["federated"][0] > 50
    assert found["federated"][1] > 50
    assert picture.read_text().startswith("<svg")
