"""Next characters by speaking role: how lines become pieces, who holds which, what counting is worth."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from murmur.protocol.errors import OperatorError


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in: a large role and a smaller one that says "ab" over and over, and one that says too little."""
    speeches = [("one", "LARGE", "ab" * 400), ("one", "SMALL", "ab" * 100), ("two", "SMALL", "Oh!")]
    speeches += [("one", "SMALL", "ab" * 150), ("two", "OTHER", "ba" * 250)]
    path = tmp_path_factory.mktemp("plays") / "shakespeare.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"play": p, "speaker": s, "text": t}) + "\n" for p, s, t in speeches)
    return str(path)


@pytest.fixture
def measure(
    module: Callable[[str], ModuleType], examples: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(examples / "shakespeare"))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    yield module("shakespeare/measure.py")
    sys.modules.pop("task", None)


def test_a_role_is_cut_into_pieces_of_80_and_predicts_what_follows_each(measure: Any, plays: str) -> None:
    task = sys.modules["task"]
    pieces, ranges = task.pieces_of(plays)
    inputs, targets = (["".join(task.CHARACTERS[s] for s in row) for row in t.tolist()] for t in pieces.tensors)
    # 800, 501 (two speeches and a line break) and 500 characters
    assert ranges == [(0, 9), (9, 15), (15, 21)]
    assert "".join(inputs[9:15]) == "ab" * 100 + "\n" + "ab" * 139 + "a"
    assert "".join(targets[9:15]) == "b" + "ab" * 99 + "\n" + "ab" * 140
    # of the last fifth each has two pieces for tests
    roles = measure.federation(data=plays)
    assert [(r.rows["train"], r.rows["test"]) for r in roles[1:]] == [
        ([9, 10, 11, 12], [13, 14]),
        ([15, 16, 17, 18], [19, 20]),
    ]


def test_dealt_out_evenly_the_pieces_are_the_same_and_the_sizes_too(measure: Any, plays: str) -> None:
    roles, even = measure.federation(data=plays), measure.federation(data=plays, split="iid")
    assert [len(c.rows["train"]) for c in even] == [5, 5, 5]
    rows = [sorted(measure.together(clients, "train").rows["train"]) for clients in (roles, even)]
    assert rows[0] == rows[1]
    assert [c.rows["test"] for c in roles] == [c.rows["test"] for c in even]
    assert not set(rows[0]) & set(measure.together(roles, "test").rows["test"])
    assert len(measure.federation(clients=2, data=plays)) == 2
    with pytest.raises(OperatorError, match="3 roles say 160 characters or more, 4 are needed"):
        measure.federation(clients=4, data=plays)


def test_counting_pairs_knows_what_follows_in_text_that_repeats(measure: Any, plays: str) -> None:
    roles = measure.federation(data=plays)
    most, after = measure.counted(measure.together(roles, "train"), measure.together(roles, "test"))
    assert most == pytest.approx(0.5)
    assert after == 1


def test_what_is_no_such_file_is_told(measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MURMUR_SHAKESPEARE", raising=False)
    with pytest.raises(OperatorError, match="no path was given"):
        measure.federation()
    (tmp_path / "plain.gz").write_text("no gzip")
    with pytest.raises(OperatorError, match="does not hold play, speaker and text"):
        measure.federation(data=str(tmp_path / "plain.gz"))


@pytest.mark.slow
def test_the_command_finds_what_follows_in_text_that_repeats(
    measure: Any, plays: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", plays, "--rounds", "8", "--epochs", "2", "--hidden", "8", "--target", "0.9", "--pooled"]
    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path / "curves.svg"), *given, "--part", "1"])
    measure.main()
    said = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if "%" in line and "rounds" not in line]
    found = {name: float(reached.strip("%")) for name, _, reached in lines}
    assert list(found) == [*measure.COUNTED, "roles, E = 2", "iid, E = 2", "pooled, 3 steps a round"]
    assert found[measure.COUNTED[0]] == 50
    assert min(reached for name, reached in found.items() if name != measure.COUNTED[0]) > 90
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
