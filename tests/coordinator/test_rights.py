"""Who may do what: every route of pages and API with the right it needs, and each right tried by each role."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from murmur.coordinator.http import Parts, person
from murmur.protocol.roles import Right

from .test_admin_api import app as one_run
from .test_agents_api import BASE

_ = one_run
OPEN = {
    "GET /login",
    "POST /login",
    "POST /logout",
    "POST /language",
    "GET /live",
    "GET /healthz",
    "GET /healthz/ready",
}
# What is not here and no agent's address needs the right to read.
NEEDS = {
    Right.START: {"GET /runs/new", "POST /runs/new", "PUT /v1/admin/models", "POST /v1/admin/runs"},
    Right.STEER: {
        *(f"POST /runs/{{id}}/{action}" for action in ("stop", "pause", "resume")),
        *(f"POST /v1/admin/runs/{{run}}/{action}" for action in ("stop", "pause", "resume")),
    },
    Right.CREDENTIAL: {
        "POST /settings/password",
        "POST /settings/tokens",
        "POST /settings/credentials/{credential}/withdraw",
        "POST /v1/admin/tokens",
        "DELETE /v1/admin/credentials/{credential}",
    },
    Right.ADMINISTER: {
        "POST /clients/{id}/approve",
        "POST /clients/{id}/revoke",
        "POST /invitations",
        "POST /runs/{id}/versions/{n:int}/promote",
        "POST /models/named/{name}/rollback",
        "POST /models/named/{name}/remove",
        "POST /settings/users",
        "POST /settings/users/{user}/role",
        "POST /settings/users/{user}/remove",
        "POST /v1/admin/clients/{client}/approve",
        "POST /v1/admin/clients/{client}/revoke",
        "POST /v1/admin/invitations",
        "POST /v1/admin/runs/{run}/versions/{n}/promote",
        "POST /v1/admin/aliases/{model}/{alias}/rollback",
        "DELETE /v1/admin/aliases/{model}/{alias}",
        "POST /v1/admin/users",
        "PUT /v1/admin/users/{user}/role",
        "DELETE /v1/admin/users/{user}",
    },
}
READS = {"POST /v1/admin/runs/estimate"}  # the one address that is not a GET and changes nothing


@pytest.fixture
def app(one_run: FastAPI) -> Iterator[FastAPI]:
    """An app with a run of ada's, one of rhea's, and three people."""
    parts: Parts = one_run.state.parts
    parts.service.address = ("127.0.0.1", 8443, None)
    for name, role in (("ada", "admin"), ("rhea", "researcher"), ("vera", "viewer")):
        parts.people.add(name, role, None)
    view = parts.store.runs.detail("run").run
    version = parts.store.runs.versions("run")[0]
    parts.store.runs.start("hers", view.recipe, sha256=version.sha256, size=version.bytes, by="rhea")
    yield one_run


def calls(dependant: Dependant) -> Iterator[object]:
    yield dependant.call
    for below in dependant.dependencies:
        yield from calls(below)


def test_every_route_needs_the_right_that_the_table_says(app: FastAPI):
    table = {route: right for right, routes in NEEDS.items() for route in routes}
    found = set[str]()
    routers = [r.original_router for r in app.routes if hasattr(r, "original_router")]  # pyright: ignore
    for route in [*app.routes, *(route for router in routers for route in router.routes)]:
        if not isinstance(route, APIRoute) or (route.path.startswith("/v1/") and "/admin/" not in route.path):
            continue
        (method,) = route.methods
        name = f"{method} {route.path}"
        found.add(name)
        asked = list(calls(route.dependant))
        rights = {call.right for call in asked if hasattr(call, "right")}  # pyright: ignore
        if name in OPEN:
            assert not rights
        elif name in table:
            assert rights == {table[name]}, name
        else:
            assert method == "GET" or name in READS, f"{name} changes something: which right does it need?"
            assert rights == {Right.READ} or person in asked, f"{name} is open to everybody"
    assert set(table) <= found


def token(app: FastAPI, name: str, role: str | None = None) -> dict[str, str]:
    people = app.state.parts.people
    return {"Authorization": f"Bearer {people.api_token(name, lifetime_s=60, role=role).token}"}


def page(app: FastAPI, name: str) -> TestClient:
    people = app.state.parts.people
    client = TestClient(app, base_url=BASE, headers={"sec-fetch-site": "same-origin"}, follow_redirects=False)
    client.cookies.set("murmur", people.redeem(people.link(name)))
    return client


# What each role gets of: a page, a run to start, ada's run and rhea's to pause, an invitation.
GETS = {
    "ada": (200, 200, 303, 303, 200),
    "rhea": (200, 200, 403, 303, 403),
    "vera": (200, 403, 403, 403, 403),
}


@pytest.mark.parametrize("name", GETS)
def test_a_role_gets_of_the_pages_what_it_may_have(app: FastAPI, name: str):
    http = page(app, name)
    got = (
        http.get("/audit").status_code,
        http.get("/runs/new").status_code,
        http.post("/runs/run/pause", data={"a": "b"}).status_code,
        http.post("/runs/hers/pause", data={"a": "b"}).status_code,
        http.post("/invitations", data={"name": "north"}).status_code,
    )
    assert got == GETS[name]


@pytest.mark.parametrize("name", GETS)
def test_a_role_gets_of_the_api_what_it_may_have(app: FastAPI, name: str):
    http = TestClient(app, base_url=BASE, headers=token(app, name))
    start = http.post("/v1/admin/runs", json={}).status_code  # refused for who asks before it is read
    got = (
        http.get("/v1/admin/audit").status_code,
        {422: 200}.get(start, start),
        {200: 303}.get(code := http.post("/v1/admin/runs/run/pause").status_code, code),
        {200: 303}.get(code := http.post("/v1/admin/runs/hers/pause").status_code, code),
        {201: 200}.get(code := http.post("/v1/admin/invitations", json={"name": "south"}).status_code, code),
    )
    assert got == GETS[name]


def test_a_token_with_a_lesser_role_gets_what_that_role_may_and_makes_no_greater_one(app: FastAPI):
    http = TestClient(app, base_url=BASE, headers=token(app, "ada", "viewer"))
    assert http.post("/v1/admin/runs/run/stop").status_code == 403
    made = http.post("/v1/admin/tokens", json={"name": "more", "role": "admin"}).json()
    assert made["role"] == "viewer"


def test_one_ends_ones_own_sessions_and_an_admin_everybodys(app: FastAPI):
    rhea, vera, ada = (page(app, name) for name in ("rhea", "vera", "ada"))
    people = app.state.parts.people
    (hers,) = people.credentials("rhea")
    assert vera.post(f"/settings/credentials/{hers.id}/withdraw", data={"a": "b"}).status_code == 403
    assert "rhea" not in {c["account"] for c in _held(app, "vera")}
    assert "rhea" in {c["account"] for c in _held(app, "ada")}
    assert rhea.get("/settings").status_code == 200
    assert ada.post(f"/settings/credentials/{hers.id}/withdraw", data={"a": "b"}).status_code == 303
    assert rhea.get("/settings").status_code == 303  # to sign in
    assert vera.post("/settings/credentials/none/withdraw", data={"a": "b"}).status_code == 404


def test_sign_ins_that_fail_are_in_the_log_with_the_address_that_they_came_from(app: FastAPI):
    http = TestClient(app, base_url=BASE, headers={"sec-fetch-site": "same-origin"}, client=("192.0.2.7", 1))
    for user in ("ada", "nobody here"):
        assert http.post("/login", data={"user": user, "password": "wrong"}).status_code == 401
    assert http.get("/login?link=used").status_code == 401
    app.state.parts.service.failed_sign_ins.write()
    (entry,) = app.state.parts.store.audit.entries(what="sign-in failed")
    assert (entry.by, entry.subject, entry.details) == ("nobody", "192.0.2.7", {"tries": "3", "accounts": "ada"})


def _held(app: FastAPI, name: str) -> list[dict[str, str]]:
    return TestClient(app, base_url=BASE, headers=token(app, name)).get("/v1/admin/credentials").json()


def test_users_are_added_changed_and_removed_over_the_api(app: FastAPI):
    http = TestClient(app, base_url=BASE, headers=token(app, "ada"))
    link = http.post("/v1/admin/users", json={"name": "bo", "role": "viewer"}).json()["link"]
    assert app.state.parts.people.redeem(link)
    assert http.post("/v1/admin/users", json={"name": "bo", "role": "admin"}).status_code == 409
    assert http.put("/v1/admin/users/bo/role", json={"role": "researcher"}).json() == {"role": "researcher"}
    assert {u["name"]: u["role"] for u in http.get("/v1/admin/users").json()}["bo"] == "researcher"
    assert http.delete("/v1/admin/users/bo").status_code == 204
    assert http.delete("/v1/admin/users/bo").status_code == 404
    assert http.get("/v1/admin/audit/check").json()["wrong"] == []
    lines = http.get("/v1/admin/audit/log?what=bo").text.splitlines()
    assert [line.split('"action":"')[1].split('"')[0] for line in lines] == [
        "user added",
        "signed in",
        "user changed",
        "user removed",
    ]
    assert http.get("/v1/admin/privacy").json()[0]["mode"] == "off"
