"""How a run's page names what moves its server."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from murmur.protocol.recipe import Recipe
from murmur.protocol.sections import Strategy

from . import fakes
from .harness import OWN, application


def page(strategy: Strategy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    before = fakes.recipe

    def recipe(name: str, rounds: int = 25, *, secure: bool = True) -> Recipe:
        return before(name, rounds, secure=secure).model_copy(update={"strategy": strategy})

    monkeypatch.setattr(fakes, "recipe", recipe)
    console = fakes.demo(folder)
    client = TestClient(application(console), base_url="http://127.0.0.1", headers=OWN)
    client.cookies.set("murmur", console.session("ada"))
    found = client.get("/runs/heart-disease")
    assert found.status_code == 200
    return found.text


def test_a_strategy_of_flowers_stands_where_the_servers_optimizer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = page(Strategy(flower="fedyogi", flower_options={"eta": 0.05}), tmp_path, monkeypatch)
    assert "<span>FedAvg with Flower's fedyogi</span>" in shown.replace("&#39;", "'")
    assert "<dt>Server optimizer</dt><dd>Flower's fedyogi, eta 0.05</dd>" in shown.replace("&#39;", "'")


def test_local_algorithms_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<span>SCAFFOLD</span>" in page(Strategy(name="scaffold"), tmp_path, monkeypatch)
