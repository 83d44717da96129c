"""Requests that arrive twice, late and out of order: the coordinator ends in the same state, and says why it refuses.

A whole round goes through the real app three times: undisturbed, with every request delivered twice, and with old
requests arriving in between. What is compared is every row, without times and fences.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from murmur.coordinator import agents_api
from murmur.coordinator.http import Parts
from murmur.coordinator.store import tables
from murmur.protocol.signatures import sign

from ..fixtures.dialogue import SCRIPTS, answer, link_over, new_app, perform
from ..fixtures.release import identity
from .schedules import memory_folder

REFUSALS = {"too_late", "conflict", "wrong_offset", "replayed", "not_found"}
UNTOLD = {"nonce", "bearer", "event", "credential"}  # credentials that come and go; events are told apart below
# What a repeated poll or an old sign of life may change.
VOLATILE = {"fence", "phase", "phases", "step", "steps", "bytes", "gap_s", "info", "at", "instance", "polled"}
BOTH = pytest.mark.parametrize("which", SCRIPTS)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_api, "PARK_S", 0.02)


def facts(parts: Parts) -> dict[str, Any]:
    """Everything that the coordinator knows, apart from times and fences."""
    found: dict[str, Any] = {}
    with parts.store.db.read() as c:
        for table in tables.metadata.sorted_tables:
            if table.name not in UNTOLD:
                timed = VOLATILE | (
                    {"before", "sha256"} if table.name == "audit" else set()
                )  # its hashes are over times
                told = [x for x in table.columns if x.name not in timed and not x.name.endswith("_at")]
                found[table.name] = [tuple(row) for row in c.execute(select(*told).order_by(*table.primary_key))]
    for event in parts.store.events.since(0, None, 10**6):
        if event.kind != "progress" and event.data.get("state") != "working":
            found.setdefault("events", []).append((event.kind, event.run, event.data))
    return found


class Wire(httpx.BaseTransport):
    """One agent's way to the app; keeps every request that went over it."""

    def __init__(self, app: TestClient, name: str, past: list[tuple[str, httpx.Request]]) -> None:
        self.app, self.name, self.past = app, name, past

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.past.append((self.name, request))
        return self.carry(request)

    def carry(self, request: httpx.Request) -> httpx.Response:
        return deliver(self.app, request)


def deliver(app: TestClient, request: httpx.Request, headers: dict[str, str] | None = None) -> httpx.Response:
    given = {k: v for k, v in request.headers.items() if k not in ("host", "connection", "content-length")}
    found = app.request(request.method, str(request.url), content=request.content, headers=given | (headers or {}))
    assert found.status_code < 500, found.text
    return answer(found.status_code, found.headers, found.content)


def signed_anew(name: str, request: httpx.Request) -> dict[str, str]:
    """Headers of the same request as its agent would send it once more; none for what is not signed."""
    if "signature" not in request.headers:
        return {}
    path, drawn = request.url.raw_path.decode(), {"created": int(time.time()), "nonce": secrets.token_bytes(16)}
    fresh = sign(request.method, path, request.content, key=identity(name), keyid=name, **drawn)
    return {k.lower(): v for k, v in fresh.items()}


def code(response: httpx.Response) -> str:
    """The problem's code, or an empty string for a success."""
    response.read()
    return "" if response.is_success else response.json()["code"]


@contextmanager
def played(which: str, wire: type[Wire] = Wire, clock: Callable[[], float] = time.time) -> Iterator[Any]:
    """(app, parts, past) after a whole round over such wires, and the run stopped."""
    with memory_folder() as folder:
        app, past = new_app(folder, clock), list[tuple[str, httpx.Request]]()
        parts: Parts = app.app.state.parts  # pyright: ignore
        SCRIPTS[which](lambda name: link_over(name, wire(app, name, past)), lambda turn: perform(parts, turn))
        parts.service.stop_run("run", "admin")
        yield app, parts, past
        parts.store.close()


@pytest.fixture
def undisturbed(which: str) -> dict[str, Any]:
    with played(which) as (_, parts, _):
        return facts(parts)


class Twice(Wire):
    """The reply is lost: the agent asks again. What it hears then is what it would have heard."""

    polls = 0

    def poll(self, request: httpx.Request) -> httpx.Response:
        """The same poll is handed nothing; the agent's next one, after a lost answer, is handed the work anew."""

        def number() -> dict[str, str]:
            self.polls += 1
            return {"murmur-poll": f"00000000.{self.polls}"}

        once = number()
        deliver(self.app, request, once).read()
        repeated = deliver(self.app, request, once)
        repeated.read()
        assert repeated.json()["assignment"] is None
        return deliver(self.app, request, number())

    def carry(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/poll":
            return self.poll(request)
        first = deliver(self.app, request)
        if "signature" in request.headers:
            assert code(deliver(self.app, request)) == "replayed", "the very same bytes are no second request"
        second = deliver(self.app, request, signed_anew(self.name, request))
        first.read(), second.read()
        path = request.url.path
        if path == "/v1/token":  # a new one
            assert first.status_code == second.status_code
            return answer(second.status_code, second.headers, second.content)
        if request.method == "PATCH":
            assert code(second) == "wrong_offset" and second.json()["offset"] == first.json()["offset"]
        elif path.endswith("/failure"):
            assert code(second) == "too_late"
        else:
            assert (first.status_code, first.content) == (second.status_code, second.content), path
        return answer(first.status_code, first.headers, first.content)


@BOTH
def test_every_request_delivered_twice_changes_nothing(which: str, undisturbed: dict[str, Any]):
    with played(which, Twice) as (_, parts, _):
        assert facts(parts) == undisturbed


class Late(Wire):
    """Old requests arrive once more, in any order, before each new one."""

    draw = random.Random(12)

    def carry(self, request: httpx.Request) -> httpx.Response:
        for name, again in self.draw.sample(self.past[:-1], min(3, len(self.past) - 1)):
            found = code(deliver(self.app, again))
            assert found == "replayed" if "signature" in again.headers else found in REFUSALS | {""}, (name, again.url)
            if again.url.path not in ("/v1/enrol", "/v1/token"):
                assert code(deliver(self.app, again, signed_anew(name, again))) in REFUSALS | {""}, (name, again.url)
        return deliver(self.app, request)


@BOTH
def test_old_requests_in_between_change_nothing(which: str, undisturbed: dict[str, Any]):
    with played(which, Late) as (_, parts, _):
        assert facts(parts) == undisturbed


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_a_recording_replayed_in_any_order_after_the_end_changes_nothing(which: str, seed: int):
    with played(which) as (app, parts, past):
        before, draw = facts(parts), random.Random(seed)
        draw.shuffle(past)
        for name, request in past:
            found = code(deliver(app, request))
            assert found == "replayed" if "signature" in request.headers else found in REFUSALS | {""}, request.url
            assert code(deliver(app, request, signed_anew(name, request))) in REFUSALS | {""}, request.url
        assert facts(parts) == before


@BOTH
def test_a_recording_is_worth_nothing_once_its_nonces_are_forgotten(which: str):
    """Nonces are kept for longer than a signature is good."""
    ahead_s = 0.0
    with played(which, clock=lambda: time.time() + ahead_s) as (app, parts, past):
        before, ahead_s, steady = facts(parts), 700.0, parts.store.db.clock
        parts.store.db.clock = lambda: steady() + 700.0
        for name, request in past:
            found = deliver(app, request)
            assert found.status_code == 401, (name, request.url)
            assert code(found) == ("replayed" if "signature" in request.headers else "not_authenticated")
        assert facts(parts) == before
