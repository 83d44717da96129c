"""Every command's exit code: 0 it worked, 1 it failed, 2 wrong usage, 3 too long, 4 unreachable or not allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from murmur.cli import app

from ..command import murmur

AWAY = {"MURMUR_URL": "http://127.0.0.1:9", "MURMUR_TOKEN": "x" * 20}


def commands(found: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(found, click.Group):
        for name, inner in found.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, found


ALL = dict(commands(typer.main.get_command(app)))
NEEDED = {path: [a for a in c.params if isinstance(a, click.Argument) and a.required] for path, c in ALL.items()}
# Those that ask a coordinator by its address; the others with --data open the database in the folder.
OF_A_FOLDER = {"serve", "migrate", "user", "token", "login", "backup", "restore", "doctor", "simulate", "sweep"}
ASKING = [
    path
    for path, c in ALL.items()
    if any("--data" in p.opts for p in c.params) and path[-1] not in OF_A_FOLDER and path[0] != "client"
]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_and_a_wrong_option(path: tuple[str, ...]):
    assert murmur(*path, "--help").code == 0
    wrong = murmur(*path, "--no-such-option")
    assert wrong.code == 2 and "--no-such-option" in wrong.err


@pytest.mark.parametrize("path", [path for path, needed in NEEDED.items() if needed], ids=" ".join)
def test_an_argument_that_is_missing_is_wrong_usage(path: tuple[str, ...]):
    assert murmur(*path).code == 2


@pytest.mark.parametrize("path", ASKING, ids=" ".join)
def test_a_coordinator_that_is_away_is_exit_code_four(path: tuple[str, ...], tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('name = "t"\ntask = "t"\n')
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    more = {"start": ("--init", tmp_path / "model.safetensors"), "fetch": ("--out", tmp_path / "out")}
    more["export"] = ("--int8",) if path[0] == "model" else ("--to", "csv")
    more["export"] += ("--out", tmp_path / "small")
    more["promote"] = ("--as", "production")
    arguments = [{"recipe": tmp_path / "recipe.toml"}.get(str(a.name), "x") for a in NEEDED[path]]
    done = murmur(*path, *arguments, *more.get(path[-1], ()), environment=AWAY)
    assert done.code == 4 and "cannot be reached" in done.err, done
