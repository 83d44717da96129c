"""`murmur simulate --world`: the table, the picture and the JSON of a run in a world."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from murmur.cli import app

TASKS = Path(__file__).parents[1] / "simulation" / "tasks.py"
runner = CliRunner()


def simulate(*arguments: str) -> str:
    done = runner.invoke(
        app, ["simulate", f"{TASKS}:federation", "--clients", "4", "--rounds", "3", "--no-store", *arguments]
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_a_world_is_told_and_drawn(tmp_path: Path) -> None:
    """5 examples at 1, 2 or 5 a second and nothing else that takes time: c, at 1, ends each round after 5 s."""
    trace = tmp_path / "trace.csv"
    trace.write_text("client,examples_per_s\n" + "".join(f"client-{k},{v}\n" for k, v in enumerate((5, 5, 2, 1))))
    (tmp_path / "world.toml").write_text('trace = "trace.csv"\n')
    plot = tmp_path / "world.svg"
    said = simulate("--world", str(tmp_path / "world.toml"), "--plot", str(plot))
    assert re.search(r"3 +15\.0 s +5\.0 s +4 +4 +0 +0", said)
    assert "Clients were heard 3 times each; Jain's index 1.00; the slowest quarter gave 25% of the updates" in said
    drawn = ElementTree.fromstring(plot.read_text())
    assert drawn.get("aria-label") == "3 rounds of 4 clients in 15.0 s of the world"
    titles = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert "client-3, round 1: heard, 5.0 s" in titles
    assert len([t for t in titles if t and ", round " in t]) == 12


def test_a_world_s_settings_are_changed_on_the_command_line() -> None:
    said = simulate(
        "--world", "hospitals", "--plain", "--set", "world.buffered.size=2", "--set", "train.epochs=2", "--json"
    )
    told = json.loads(said)
    assert told["world"]["settings"]["buffered"]["size"] == 2
    assert told["world"]["settings"]["dropout"] == 0.01
    assert told["recipe"]["train"]["epochs"] == 2
    assert [a["heard"] for a in told["world"]["attempts"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--world", "mars"), "there is no world 'mars'"),
        (("--set", "world.dropout=0.1"), "--set world.dropout is for a world: give --world as well"),
        (("--plot", "x.svg"), "--plot is for a world"),
        (("--world", "phones", "--secure", "--set", "world.buffered.size=2"), "in a masked sum all begin"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    done = runner.invoke(app, ["simulate", f"{TASKS}:federation", "--clients", "4", "--no-store", *arguments])
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
