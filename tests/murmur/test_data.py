"""`murmur data partition`, as it is typed."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from murmur.simulation.partitioning import dirichlet

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of click's own names, when typer is imported
    from typer.testing import CliRunner

    from murmur.cli import app


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "d.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
    return tmp_path / "d.npz"


def run(*words: object):
    return CliRunner().invoke(app, ["data", "partition", *map(str, words)])


def test_a_division_is_shown_drawn_and_kept(file: Path, tmp_path: Path):
    done = run(file, "--column", "y", "--clients", 3, "--alpha", 1, "--seed", 4, "--save", tmp_path / "p.npz",
               "--plot", tmp_path / "p.svg")  # fmt: skip
    assert done.exit_code == 0, done.output
    made = dirichlet(np.arange(30) % 3, 3, 1.0, seed=4)
    assert made.described in done.output and f"median {np.median(made.sizes):.0f}" in done.output
    with np.load(tmp_path / "p.npz") as kept:
        assert [kept[str(k)].tolist() for k in range(3)] == [part.tolist() for part in made.parts]
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("method", ["iid", "shards", "quantity", "feature", "group"])
def test_every_method_can_be_asked_for(file: Path, method: str):
    done = run(file, "--column", "y", "--method", method, "--clients", 3, "--json")
    assert done.exit_code == 0, done.output
    assert (json.loads(done.output)["clients"], json.loads(done.output)["examples"]) == (3, 30)


def test_a_column_of_a_table_names_the_clients(tmp_path: Path):
    (tmp_path / "t.csv").write_text("site,age\nva,50\nbern,61\nva,47\n")
    done = run(tmp_path / "t.csv", "--column", "site", "--method", "group")
    assert [line.split() for line in done.output.splitlines() if line.startswith(("bern", "va"))] == [
        ["bern", "1"],
        ["va", "2"],
    ]


def test_what_is_not_there_is_named(file: Path, tmp_path: Path):
    def said(*words: object):
        return " ".join(run(*words).output.split())  # lines end where the terminal does

    assert "has no 'z'; there are x, y" in said(file, "--column", "z")
    assert "No such file" in said(tmp_path / "none.npz", "--column", "y")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "o.npy").rename(tmp_path / "o.npz")
    assert "neither an .npz of plain arrays nor a .csv" in said(tmp_path / "o.npz", "--column", "y")
