"""Pausing and resuming over the admin API: who may, what the views say, and what a paused run still does."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from murmur.coordinator.app import create_app
from murmur.coordinator.http import Parts
from murmur.coordinator.settings import Settings
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import write_file

from .harness import MODEL
from .test_agents_api import BASE, PLAIN

RUN = "/v1/admin/runs/run"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    """An app with a run; no thread moves rounds."""
    app = create_app(Settings(data=tmp_path, insecure_http=True))
    parts: Parts = app.state.parts
    with parts.blobs.new() as path:
        write_file(path, {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}, MODEL)
        size, sha256 = path.stat().st_size, parts.blobs.adopt(path)
    parts.store.runs.start("run", parse_recipe(PLAIN), sha256=sha256, size=size, by="ada")
    yield app
    parts.store.close()


def caller(app: FastAPI, name: str, role: str) -> TestClient:
    parts: Parts = app.state.parts
    parts.people.add(name, role, None)
    token = parts.people.api_token(name, lifetime_s=60).token
    return TestClient(app, base_url=BASE, headers={"Authorization": f"Bearer {token}"})


def test_an_admin_pauses_and_resumes_a_run(app: FastAPI):
    ada = caller(app, "ada", "admin")
    paused = ada.post(f"{RUN}/pause").json()["run"]
    assert (paused["state"], paused["reason"], paused["paused_by"]) == ("paused", "paused by ada", "ada")
    assert ada.post(f"{RUN}/pause").status_code == 200  # pausing twice changes nothing
    resumed = ada.post(f"{RUN}/resume").json()["run"]
    assert (resumed["state"], resumed["reason"], resumed["paused_by"]) == ("running", "", None)
    said = [e["data"]["state"] for e in ada.get("/v1/admin/events?run=run").json() if e["kind"] == "run"]
    assert said == ["running", "paused", "running"]


def test_a_viewer_may_do_neither_and_sees_the_run_unchanged(app: FastAPI):
    vera = caller(app, "vera", "viewer")
    for action in ("pause", "resume", "stop"):
        assert vera.post(f"{RUN}/{action}").status_code == 403
    assert vera.get(RUN).json()["run"]["state"] == "running"


def test_a_stranger_is_asked_who_it_is(app: FastAPI):
    assert TestClient(app, base_url=BASE).post(f"{RUN}/pause").status_code == 401


def test_a_run_that_is_not_there_or_over_is_not_paused(app: FastAPI):
    ada = caller(app, "ada", "admin")
    assert ada.post("/v1/admin/runs/none/pause").status_code == 404
    ada.post(f"{RUN}/pause")
    stopped = ada.post(f"{RUN}/stop").json()["run"]  # a paused run can be stopped
    assert (stopped["state"], stopped["reason"], stopped["paused_by"]) == ("stopped", "stopped by ada", None)
    for action in ("pause", "resume"):
        assert ada.post(f"{RUN}/{action}").status_code == 409


def test_a_pause_by_the_coordinator_says_so(app: FastAPI):
    parts: Parts = app.state.parts
    parts.store.runs.pause("run", "the disk is full")
    view = parts.service.runs()[0]
    assert (view.state, view.reason, view.paused_by, view.over) == ("paused", "the disk is full", "", False)


def test_prometheus_reads_the_state_with_a_token_and_not_without(app: FastAPI):
    assert TestClient(app, base_url=BASE).get("/metrics").status_code == 401
    answer = caller(app, "vera", "viewer").get("/metrics")
    lines = answer.text.splitlines()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'murmur_runs{state="running"} 1.0' in lines and 'murmur_clients{state="active"} 0.0' in lines
    assert 'murmur_run_rounds_done{name="t",run="run"} 0.0' in lines


def test_an_admin_moves_an_alias_and_reads_where_its_version_comes_from(app: FastAPI):
    ada = caller(app, "ada", "admin")
    at = f"{RUN}/versions/0"
    promoted = ada.post(f"{at}/promote", json={"alias": "production"}).json()
    assert (promoted["model"], promoted["n"], promoted["version"], promoted["by"]) == (
        "t",
        1,
        {"run": "run", "n": 0},
        "ada",
    )
    assert ada.get("/v1/admin/aliases?model=t").json() == [promoted] == ada.get("/v1/admin/aliases/t").json()
    assert ada.get("/v1/admin/aliases?model=u").json() == []
    assert ada.get(f"{at}/lineage").json()["aliases"] == ["production"]
    assert ada.get("/v1/admin/models").json()[0]["aliases"] == ["production"]
    card = ada.get(f"{at}/card?license=mit")
    assert card.headers["content-type"] == "text/markdown; charset=utf-8" and "license: mit" in card.text
    assert ada.post("/v1/admin/aliases/t/production/rollback", json={}).status_code == 409
    assert ada.delete("/v1/admin/aliases/t/production?seen=2").status_code == 409
    assert ada.delete("/v1/admin/aliases/t/production?seen=1").status_code == 204
    assert ada.get("/v1/admin/aliases?model=t").json() == []
    assert ada.get("/v1/admin/aliases/t").json()[0]["action"] == "removed"
    assert ada.post(f"{at}/promote", json={"alias": "37"}).status_code == 422
    assert ada.post(f"{RUN}/versions/1/promote", json={"alias": "staging"}).status_code == 404


def test_a_viewer_reads_the_registry_and_moves_nothing(app: FastAPI):
    vera = caller(app, "vera", "viewer")
    assert vera.post(f"{RUN}/versions/0/promote", json={"alias": "production"}).status_code == 403
    assert vera.post("/v1/admin/aliases/t/production/rollback", json={}).status_code == 403
    assert vera.delete("/v1/admin/aliases/t/production").status_code == 403
    assert vera.get(f"{RUN}/versions/0/lineage").json()["code"] == ""
    assert vera.get("/v1/admin/aliases").json() == []


def test_the_code_of_a_start_is_in_its_lineage_and_may_be_left_out(app: FastAPI):
    ada = caller(app, "ada", "admin")
    model = ada.get("/v1/admin/models").json()[0]["sha256"]
    for code in ("c" * 64, ""):
        at = "/v1/admin/runs" + (f"?code={code}" if code else "")
        run = ada.post(at, json={"recipe": PLAIN, "model": model}).json()["id"]
        assert ada.get(f"/v1/admin/runs/{run}/versions/0/lineage").json()["code"] == code
    assert ada.post("/v1/admin/runs?code=x", json={"recipe": PLAIN, "model": model}).status_code == 422
