"""Schemathesis: thousands of requests made from the app's own OpenAPI document, as an admin and as an agent; no 500."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as drawn

from murmur.coordinating import openapi_document
from murmur.coordinator import agents_api

from .test_agents_api import Caller, callers, http, parts  # fixtures of the same app

_ = (callers, http, parts)
ENDLESS = {"/v1/admin/events/stream"}  # a reply that does not end; it has tests of its own
CASES = 3  # of each address, as each of the two: about 200 together


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_api, "PARK_S", 0.01)


@pytest.fixture
def tokens(http: TestClient, callers: list[Caller]) -> Iterator[list[dict[str, str]]]:
    people = http.app.state.parts.people  # pyright: ignore
    people.add("root", "admin", None)
    admin = people.api_token("root", lifetime_s=3600).token
    yield [{"Authorization": f"Bearer {admin}"}, {"Authorization": f"Bearer {callers[0].token}"}]


def attack(http: TestClient, tokens: list[dict[str, str]], cases: int, *, derandomize: bool) -> int:
    import schemathesis  # here: it takes seconds, and every worker imports every file

    schema = schemathesis.openapi.from_dict(http.app.openapi())  # pyright: ignore
    http = TestClient(http.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in ENDLESS:
            continue

        def send(case: schemathesis.Case) -> None:
            nonlocal sent
            given = case.as_transport_kwargs(base_url="http://127.0.0.1")
            headers = {k: v for k, v in (given.pop("headers", None) or {}).items() if v.isascii()}
            known = {k: given[k] for k in ("params", "json", "data", "cookies") if given.get(k) is not None}
            if isinstance(known.get("data"), bytes | str):
                known["content"] = known.pop("data")
            http.cookies.clear()
            known.pop("cookies", None)
            for token in tokens:
                try:
                    answer = http.request(
                        given["method"], given["url"], headers={**headers, "Murmur-Protocol": "1", **token}, **known
                    )
                except (httpx.InvalidURL, UnicodeEncodeError):
                    return  # what no client can send
                sent += 1
                assert answer.status_code < 500 or answer.status_code == 503, (case, answer.text)

        run = settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=derandomize,
            print_blob=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )(drawn(operation.as_strategy())(send))
        run()
    return sent


def test_no_request_from_the_schema_is_a_fault_of_ours(http: TestClient, tokens: list[dict[str, str]]):
    sent = attack(http, tokens, CASES, derandomize=True)
    print(f"{sent} requests")
    assert sent > 150


@pytest.mark.slow
def test_no_request_of_thousands_from_the_schema_is_a_fault_of_ours(http: TestClient, tokens: list[dict[str, str]]):
    sent = attack(http, tokens, 40 * CASES, derandomize=False)
    print(f"{sent} requests")
    assert sent >= 4_000  # how many depends on what is drawn


def test_the_document_that_is_published_is_the_apps():
    published = Path(__file__).parents[2] / "docs" / "openapi.json"
    assert published.read_text() == openapi_document(), "write it anew: murmur coordinator openapi > docs/openapi.json"
