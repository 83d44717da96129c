"""An estimate before the start: bytes as agents then move them, clients needed, epsilon after all rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from murmur.coordinator.estimates import estimate
from murmur.privacy.dp.accounting import Event, epsilon
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import read_layout

from .harness import MODEL, World, masked_up_to
from .test_admin_api import app, caller  # noqa: F401  # pyright: ignore[reportUnusedImport]

HERE = ["a", "b", "c", "d"]


def recipe_of(**changes: Any):
    return parse_recipe({"name": "t", "task": "t", "rounds": 3} | changes)


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_a_masked_update_is_as_large_as_the_estimate_says(tmp_path: Path, ring_bits: int) -> None:
    world = World(tmp_path)
    agents = [world.agent(name) for name in "abc"]
    secure = {"ring_bits": ring_bits, "clip_value": 1.0}
    settings: dict[str, Any] = {"secure": secure, "strategy": {"max_weight": 8}, "metrics": ["loss"]}
    run = world.start(**settings)
    masked_up_to(world, agents, "advert")
    world.tick()
    for agent in agents:
        agent.share()
    world.tick()
    agents[0].upload_masked(0.5, 2)
    version = world.store.runs.versions(run)[0]
    layout = read_layout(world.blobs.path(version.sha256))
    told = estimate(recipe_of(**settings), layout, HERE)
    current = world.store.runs.detail(run).current
    assert current is not None
    assert (told.download_bytes, told.upload_bytes) == (version.bytes, current.assignments[0].bytes)
    assert told.bytes_of_client == 3 * (told.download_bytes + told.upload_bytes) + told.download_bytes


def test_a_plain_update_is_as_large_as_the_estimate_says(tmp_path: Path) -> None:
    world = World(tmp_path)
    agents = [world.agent(name) for name in "abc"]
    run = world.start(secure={"on": False})
    world.tick()
    for agent in agents:
        agent.poll()
    agents[0].upload_plain(0.5, 2)
    current = world.store.runs.detail(run).current
    assert current is not None
    told = estimate(recipe_of(secure={"on": False}), MODEL, HERE)
    assert told.upload_bytes == current.assignments[0].bytes
    half = estimate(recipe_of(secure={"on": False}, train={"wire": "bf16"}), MODEL, HERE)
    assert told.upload_bytes - half.upload_bytes == 2 * MODEL.float_numel


def test_control_variates_double_what_scaffold_moves() -> None:
    plain, scaffold = (
        estimate(recipe_of(strategy={"name": name}), MODEL, HERE).download_bytes for name in ("fedavg", "scaffold")
    )
    assert scaffold - plain >= 4 * MODEL.float_numel


def test_the_clients_needed_are_those_that_unmask() -> None:
    many = [f"c{i}" for i in range(30)]
    told = estimate(recipe_of(), MODEL, many)
    assert (told.needed, told.asked, told.online) == (21, 0, 30)  # more than two thirds of 30
    assert estimate(recipe_of(secure={"on": False}), MODEL, many).needed == 3
    assert estimate(recipe_of(cohort={"min": 5, "size": 8}), MODEL, many[:4]).needed == 5


def test_epsilon_is_that_of_all_rounds() -> None:
    dp = {"mode": "central", "noise_multiplier": 2.0}
    private = recipe_of(dp=dp, cohort={"size": 8}, strategy={"weighting": "uniform"})
    told = estimate(private, MODEL, HERE).privacy
    expected = epsilon([Event(noise_multiplier=2.0)] * 3, 1e-5, "rdp", unit="client", assumptions=())
    assert told is not None and told.value == pytest.approx(expected.value)
    assert estimate(recipe_of(), MODEL, HERE).privacy is None


def test_the_api_estimates_and_starts_nothing(app: FastAPI) -> None:  # noqa: F811
    vera = caller(app, "vera", "viewer")
    sha256 = vera.get("/v1/admin/models").json()[0]["sha256"]
    wanted = {"recipe": {"name": "t", "task": "t"}, "model": sha256}
    answer = vera.post("/v1/admin/runs/estimate", json=wanted).json()
    assert (answer["rounds"], answer["needed"], answer["online"]) == (10, 3, 0)
    assert len(vera.get("/v1/admin/runs").json()) == 1
    assert vera.post("/v1/admin/runs/estimate", json=wanted | {"model": "0" * 64}).status_code == 404
