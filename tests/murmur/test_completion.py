"""What the shell offers when somebody presses the tab key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from murmur.cli import app
from murmur.client import Client

RUNS = [("heart-2", "heart", "running"), ("heart-1", "heart", "finished"), ("lung-1", "lung", "finished")]
VERSIONS = [("heart-2", "heart", 4, ()), ("heart-1", "heart", 9, ("production",)), ("lung-1", "lung", 3, ())]


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that answers."""
    monkeypatch.setenv("MURMUR_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MURMUR_TOKEN", "token")
    names = [SimpleNamespace(run=r, run_name=n, n=v, aliases=a, contributors=3) for r, n, v, a in VERSIONS]
    monkeypatch.setattr(Client, "runs", lambda _: [SimpleNamespace(id=i, name=n, state=s) for i, n, s in RUNS])
    monkeypatch.setattr(Client, "versions", lambda _: names)


def offered(*typed: str) -> list[str]:
    """What bash is told."""
    environment = {"_MURMUR_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("murmur", *typed))}
    done = CliRunner().invoke(app, [], prog_name="murmur", env=environment | {"COMP_CWORD": str(len(typed))})
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.usefixtures("coordinator")
@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (("run", "show", "heart"), ["heart-2", "heart-1"]),
        (("run", "stop", "l"), ["lung-1"]),
        (("model", "history", "h"), ["heart"]),
        (("model", "show", "heart"), ["heart@production", "heart", "heart-2@4", "heart-1@9"]),
        (("model", "show", "lung-"), ["lung-1@3"]),
        (("audit", "fetch", "x"), []),
    ],
)
def test_runs_and_models_are_offered_that_begin_as_what_is_typed(typed: tuple[str, ...], names: list[str]):
    assert offered(*typed) == names


def test_nothing_is_offered_and_nothing_said_where_no_coordinator_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MURMUR_URL", raising=False)
    assert offered("run", "show", "h") == []
    monkeypatch.setenv("MURMUR_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MURMUR_TOKEN", "token")
    assert offered("run", "show", "h") == []
