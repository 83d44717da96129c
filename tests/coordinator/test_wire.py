"""The wire of the previous release: its agents work with this coordinator, and this release's agents with its.

A side refuses fields that it does not know, so a field added to a message breaks the other side's earlier release. The
old messages are frozen as JSON schemas; what either side says today has to fit them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from murmur.coordinator import agents_api
from murmur.coordinator.http import Parts
from murmur.protocol import messages
from murmur.protocol.encoding import parse_json
from murmur.protocol.messages import AnswerKind, Message
from murmur.protocol.signatures import sign

from ..fixtures.dialogue import BASE, SCRIPTS, Turn, answer, link_over, load, new_app, perform, raw
from ..fixtures.release import identity

# method, address, what the agent says there, what it is answered
ROUTES = [
    ("POST", r"/v1/enrol", "Enrol", "Enrolled"),
    ("POST", r"/v1/token", None, "Token"),
    ("POST", r"/v1/poll", "Poll", "Work"),
    ("GET", r"/v1/blobs/[0-9a-f]{64}", None, None),
    ("GET", r"/v1/assignments/[^/]+/step", None, "Step"),
    ("POST", r"/v1/assignments/[^/]+/answers/\w+", None, "Accepted"),
    ("POST", r"/v1/assignments/[^/]+/upload", "UploadOffer", "UploadState"),
    ("GET", r"/v1/assignments/[^/]+/upload", None, "UploadState"),
    ("PATCH", r"/v1/assignments/[^/]+/upload", None, "UploadState"),
    ("POST", r"/v1/assignments/[^/]+/complete", "Complete", "Accepted"),
    ("POST", r"/v1/assignments/[^/]+/failure", "Failure", "Accepted"),
    ("POST", r"/v1/assignments/[^/]+/progress", "Progress", "Accepted"),
]
SCHEMAS = load("schemas")


def route(method: str, path: str) -> tuple[str | None, str | None]:
    """Names of the messages that are sent to an address and answered there."""
    (found,) = [r for r in ROUTES if r[0] == method and re.fullmatch(r[1], path.partition("?")[0])]
    return found[2], found[3]


def check_old(name: str, document: Any) -> None:
    """Raise what the previous release would have had against a message."""
    Draft202012Validator(SCHEMAS[name]).validate(document)


def requests(which: str) -> list[Turn]:
    return [turn for turn in load(which) if "request" in turn]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_api, "PARK_S", 0.05)


@pytest.mark.parametrize("which", SCRIPTS)
def test_the_recordings_fit_the_frozen_schemas(which: str):
    """The validator can fail: what was really said fits, and with one field more it does not."""
    from jsonschema import ValidationError

    for turn in requests(which):
        said, answered = route(turn["request"]["method"], turn["request"]["path"])
        for name, body in ((said, turn["request"]["body"]), (answered, turn["reply"]["body"])):
            if name and body:
                check_old(name, json.loads(body))
                with pytest.raises(ValidationError, match="unexpected"):
                    check_old(name, json.loads(body) | {"new_field": 1})


def test_the_recordings_hold_every_message_of_an_agent():
    said = {route(t["request"]["method"], t["request"]["path"])[0] for w in SCRIPTS for t in requests(w)}
    assert said - {None} == {r[2] for r in ROUTES} - {None}
    answers = {t["request"]["path"].rpartition("/")[2].partition("?")[0] for t in requests("masked")}
    assert set(AnswerKind) <= answers


@pytest.mark.parametrize("which", SCRIPTS)
def test_every_request_of_the_previous_release_is_accepted_by_todays_messages(which: str):
    for turn in requests(which):
        name, _ = route(turn["request"]["method"], turn["request"]["path"])
        if name:
            model: type[Message] = getattr(messages, name)
            model.model_validate(parse_json(raw(turn["request"]["body"])))


class OldAgents:
    """The recorded agents, saying again what they said: with fresh signatures and tokens, and the ids of today."""

    def __init__(self, app: TestClient) -> None:
        self._app = app
        self._tokens: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def take(self, turn: Turn) -> None:
        """Send a recorded request, compare status and headers, and read the reply as the old release would."""
        request, name = turn["request"], turn["client"]
        path, body = self._today(request["path"]), self._today(request["body"])
        headers = dict(request["headers"])
        if "signature" in headers:
            drawn = {"created": int(time.time()), "nonce": secrets.token_bytes(16)}
            fresh = sign(request["method"], path, raw(body), key=identity(name), keyid=name, **drawn)
            headers |= {k.lower(): v for k, v in fresh.items()}
        if "authorization" in headers:
            headers["authorization"] = f"Bearer {self._tokens[name]}"
        found = self._app.request(request["method"], BASE + path, content=raw(body), headers=headers)
        where = f"{name}: {request['method']} {path}: {found.text[:300]}"
        assert found.status_code == turn["reply"]["status"], where
        for header in ("murmur-protocol", "content-type"):
            assert found.headers.get(header) == turn["reply"]["headers"].get(header), where
        _, kind = route(request["method"], path)
        if kind and found.status_code == 200:
            check_old(kind, found.json())
            self._learn(name, kind, json.loads(turn["reply"]["body"]), found.json())
        elif found.status_code == 200:
            assert found.content == raw(turn["reply"]["body"]), where

    def _learn(self, client: str, kind: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        if kind == "Token":
            self._tokens[client] = now["token"]
        elif kind == "Work" and then["assignment"]:
            assert now["assignment"], "the old agent got work, now it gets none"
            self._ids |= {then["assignment"][k]: now["assignment"][k] for k in ("id", "model")}
        elif kind in ("Step", "UploadState", "Accepted", "Enrolled"):
            assert then == now or (kind == "Step" and then["kind"] == now["kind"]), (then, now)

    def _today(self, text: str) -> str:
        for then, now in self._ids.items():
            text = text.replace(then, now)
        return text


@pytest.fixture
def app(tmp_path: Path) -> Iterator[TestClient]:
    app = new_app(tmp_path)
    yield app
    parts_of(app).store.close()


def parts_of(app: TestClient) -> Parts:
    return app.app.state.parts  # pyright: ignore


@pytest.mark.parametrize("which", SCRIPTS)
def test_agents_of_the_previous_release_take_a_round_with_this_coordinator(which: str, app: TestClient):
    agents = OldAgents(app)
    for turn in load(which):
        if "do" in turn:
            perform(parts_of(app), turn)
        else:
            agents.take(turn)
    versions = parts_of(app).store.runs.versions("run")
    assert versions[0].n == 1 and versions[0].contributors == 3


class OldCoordinator(httpx.BaseTransport):
    """Answers an agent as the previous release's coordinator answered; refuses what that one would have refused."""

    def __init__(self, name: str, turns: Iterator[Turn]) -> None:
        self._name, self._turns = name, turns

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body, turn = request.read(), next(self._turns)
        then, path = turn["request"], request.url.raw_path.decode()
        assert (self._name, request.method, path) == (turn["client"], then["method"], then["path"])
        name, _ = route(request.method, path)
        if name:
            check_old(name, json.loads(body))
        else:
            assert body == raw(then["body"]), "a masked answer or an upload has other bytes than the old release's"
        missing = {k for k in then["headers"] if k not in request.headers}
        assert not missing, f"headers that the old coordinator was sent: {missing}"
        return answer(turn["reply"]["status"], turn["reply"]["headers"], raw(turn["reply"]["body"]))


@pytest.mark.parametrize("which", SCRIPTS)
def test_an_agent_of_this_release_takes_a_round_with_the_previous_coordinator(which: str):
    turns = iter(requests(which))
    SCRIPTS[which](lambda name: link_over(name, OldCoordinator(name, turns)), lambda turn: None)
    assert next(turns, None) is None, "the old agent said more than this one"
