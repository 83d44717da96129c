"""The manifests that a coordinator writes with its versions, checked as an organization checks them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from murmur.coordinator.backup import backup
from murmur.coordinator.http import Parts
from murmur.coordinator.settings import Settings
from murmur.coordinator.store.attempts import Key
from murmur.coordinator.summing import aggregate
from murmur.privacy.manifest import read
from murmur.privacy.verification import Report, verify
from murmur.protocol.encoding import b64

from .harness import MODEL, Agent, World, masked_round, masked_up_to, plain_file, plain_round
from .test_agents_api import Caller, callers, enrolled, http, parts, tick  # fixtures of the same app
from .test_conductor import MASKED, PLAIN

_ = (callers, http, parts)


def checked(world: World, run: str, agents: list[Agent], **known) -> Report:
    texts = {f"round {m.round}": world.store.manifests.text(run, m.round) for m in world.store.manifests.of(run)}
    for view in world.store.manifests.of(run):
        text = texts[f"round {view.round}"]
        assert view.sha256 == hashlib.sha256(text.encode()).hexdigest()
    keys = {a.name: b64(a.key.public_key().public_bytes_raw()) for a in agents}
    return verify(texts, identities=keys, **known)


def test_a_masked_run_with_a_drop_out_and_its_evaluation_can_be_checked_from_its_manifests(
    world: World, agents: list[Agent]
):
    run = world.start(**MASKED | {"rounds": 2, "strategy": {"server": "Adam"}})
    masked_up_to(world, agents, "advert", "share")
    for agent in agents[1:]:
        agent.upload_masked(2.0, 1)
    world.tick(seconds=11)
    agents[0].poll()  # it is heard of again
    for stage in ("agree", "reveal"):
        for agent in agents[1:]:
            getattr(agent, stage)()
        world.tick()
    masked_round(world, agents, [1.0] * 4, [1, 2, 3, 4])
    masked_round(world, agents, [0.0] * 4, [1, 2, 3, 4])  # the evaluation
    assert world.store.runs.detail(run).run.state == "finished"

    versions = {f"{v.sha256}.safetensors": v.sha256 for v in world.store.runs.versions(run)}
    report = checked(world, run, agents, models=versions)
    assert report.ok and report.notes == ()
    assert [(c.first, c.last, c.masked, c.clients) for c in report.chains] == [(1, 3, 3, ("a", "b", "c", "d"))]
    first, second, last = (read(t) for t in world.store.manifests.texts(run))
    assert first.contributors == ("b", "c", "d") and first.cohort == ("a", "b", "c", "d")
    assert first.server.optimizer_before is None and second.server.optimizer_before == first.server.optimizer_after
    assert (last.kind, last.version, last.base) == ("evaluate", None, second.version)
    assert second.metrics["1"]["loss"].count == 10.0  # 1 + 2 + 3 + 4 examples, of all together
    assert not checked(world, run, agents[:3]).ok  # d's key is not on that list


def test_a_plain_run_says_what_little_can_be_said(world: World, agents: list[Agent]):
    run = world.start(**PLAIN | {"rounds": 1})
    plain_round(world, agents, [1.0] * 4, [1, 2, 3, 4])
    report = checked(world, run, agents)
    assert report.ok and [n.code for n in report.notes] == ["plain", "models_unchecked"]
    (found,) = (read(t) for t in world.store.manifests.texts(run))
    assert [(u.client, u.weight) for u in found.updates] == [("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)]
    assert found.sums == () and "metrics" not in json.loads(found.text())["updates"][0]


def test_a_sum_that_is_taken_again_gives_the_same_bytes(world: World, agents: list[Agent]):
    run = world.start(**MASKED | {"rounds": 2})
    masked_round(world, agents, [1.0] * 4, [1] * 4)
    masked_up_to(world, agents, "advert", "share")
    for agent in agents:
        agent.upload_masked(0.5, 1)
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
    key = Key(run, 2, 1)
    attempt, identities = world.store.rounds.load(key), world.store.clients.identities(("a", "b", "c", "d"))
    before = aggregate(world.store.rounds.to_sum(attempt), identities, world.blobs).manifest
    world.restart()
    world.tick()
    assert world.store.manifests.text(run, 2) == before
    assert read(before).previous == world.store.manifests.of(run)[0].sha256


def test_a_backup_holds_them(tmp_path: Path):
    world = World(tmp_path)
    agents = [world.agent(name) for name in ("a", "b", "c")]
    run = world.start(**MASKED)
    masked_round(world, agents, [1.0] * 3, [1] * 3)
    text = world.store.manifests.text(run, 1)
    world.store.close()
    backup(Settings(data=tmp_path), tmp_path / "copy")
    with sqlite3.connect(tmp_path / "copy" / "murmur.db") as copy:
        assert copy.execute("SELECT body FROM manifest").fetchall() == [(text,)]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_the_rounds_after_one_that_is_known_come_in_pieces(
    world: World, agents: list[Agent], monkeypatch: pytest.MonkeyPatch, after: int
):
    monkeypatch.setattr("murmur.coordinator.store.manifests.PIECE", 1)
    run = world.start(**PLAIN | {"rounds": 2})
    for _ in range(2):
        plain_round(world, agents, [1.0] * 4, [1] * 4)
    assert [read(t).round for t in world.store.manifests.texts(run, after)] == [1, 2][after:]


def test_viewers_and_those_who_were_asked_read_them_and_nobody_else(
    http: TestClient, parts: Parts, callers: list[Caller]
):
    for caller in callers:
        work = caller.poll()
        data = plain_file(MODEL.update(), 1.0)
        message = {"fence": work.fence, "sha256": hashlib.sha256(data).hexdigest(), "weight": 1, "metrics": {}}
        path = f"/v1/assignments/{work.id}/complete"
        caller.signed(path, message | {"data": b64(data)}).raise_for_status()
    tick(parts)
    parts.people.add("vera", "viewer", None)
    vera = {"Authorization": f"Bearer {parts.people.api_token('vera', lifetime_s=60).token}"}
    (view,) = http.get("/v1/admin/runs/run/manifests", headers=vera).json()
    text = http.get("/v1/admin/runs/run/manifests/1", headers=vera).text
    assert view["sha256"] == hashlib.sha256(text.encode()).hexdigest() and verify({"": text}).ok
    for wrong, status in (("run/manifests/2", 404), ("none/manifests", 404), ("run/manifests/-1", 422)):
        assert http.get(f"/v1/admin/runs/{wrong}", headers=vera).status_code == status
    assert http.get("/v1/admin/runs/run/manifests").status_code == 401

    assert callers[0].get("/v1/runs/run/manifests").text == text + "\n"
    assert callers[0].get("/v1/runs/run/manifests?after=1").text == ""
    other = enrolled(http, parts, "other")
    assert other.get("/v1/runs/run/manifests").status_code == 403
    assert other.get("/v1/runs/none/manifests").status_code == 403  # which runs there are is not its business
    assert http.get("/v1/runs/run/manifests", headers=vera | {"Murmur-Protocol": "1"}).status_code == 401
