"""Signing in and out, the cookie, where forms may come from, and the headers on every answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from murmur.protocol.errors import Unavailable
from murmur.web import SecurityHeaders
from murmur.web.security import HEADERS, MAX_FORM_BYTES, local_path

from .fakes import FakeConsole
from .harness import OWN, application

RIGHT = {"user": "ada", "password": "right"}


def test_signing_in_sets_a_strict_cookie_and_leads_on(stranger: TestClient) -> None:
    answer = stranger.post("/login", data=RIGHT | {"next": "/clients"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/clients")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("murmur=token-of-ada")
    for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
        assert part in cookie
    assert "Secure" not in cookie
    assert stranger.get("/clients").status_code == 200


def test_behind_https_the_cookie_is_bound_to_host_and_https(console: FakeConsole) -> None:
    app = application(console, secure_cookies=True)
    client = TestClient(app, base_url="https://murmur.example", headers=OWN, follow_redirects=False)
    cookie = client.post("/login", data=RIGHT).headers["set-cookie"]
    assert cookie.startswith("__Host-murmur=") and "Secure" in cookie and "Domain" not in cookie
    assert client.get("/").status_code == 200


def test_a_wrong_password_gives_no_cookie_and_no_reason(stranger: TestClient) -> None:
    said = set()
    for given in ({"user": "ada", "password": "wrong"}, {"user": "nobody", "password": "right"}):
        answer = stranger.post("/login", data=given)
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
        said.add(answer.text)
    assert len(said) == 1 and "Name or password is wrong." in said.pop()


def test_too_many_wrong_passwords_are_said_on_the_form(stranger: TestClient, console: FakeConsole) -> None:
    def refuse(user: str, password: str, address: str) -> str | None:
        raise Unavailable("too many wrong passwords for this name; try again in 60 s")

    console.login = refuse
    answer = stranger.post("/login", data=RIGHT)
    assert answer.status_code == 503 and "try again in 60 s" in answer.text and 'name="password"' in answer.text


def test_signing_out_ends_the_session(admin: TestClient, console: FakeConsole) -> None:
    answer = admin.post("/logout")
    assert answer.headers["location"] == "/login" and "Max-Age=0" in answer.headers["set-cookie"]
    assert console.sessions == {}


def test_a_one_time_link_works_once_and_leads_on_without_a_redirect(stranger: TestClient, console: FakeConsole) -> None:
    console.links.add("once")
    answer = stranger.get("/login?link=once", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert '<meta http-equiv="refresh" content="0;url=/">' in answer.text
    assert "HttpOnly" in answer.headers["set-cookie"] and answer.headers["cache-control"] == "no-store"
    assert stranger.get("/").status_code == 200
    again = stranger.get("/login?link=once")
    assert again.status_code == 401 and "was used or has expired" in again.text


def test_a_link_from_another_site_is_asked_again_from_here(stranger: TestClient) -> None:
    """The strict cookie is missing then, though the visitor may well be signed in."""
    answer = stranger.get("/runs/heart-disease?x=1", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert 'content="0;url=/runs/heart-disease?x=1"' in answer.text
    assert "heart-disease</" not in answer.text
    assert stranger.get("/runs/heart-disease?x=1").status_code == 303  # asked again: no loop


def test_after_signing_in_one_stays_on_this_host(stranger: TestClient) -> None:
    elsewhere = ("//evil.example", "/\\evil.example", "/x\\y", "https://evil.example/", "javascript:alert(1)")
    for target, goes_to in {
        "/runs/x?y=1": "/runs/x?y=1",
        **dict.fromkeys((*elsewhere, "/\r\nset-cookie: a=b", ""), "/"),
    }.items():
        assert local_path(target) == goes_to, target
        assert stranger.post("/login", data=RIGHT | {"next": target}).headers["location"] == goes_to, target


FORMS = [
    "/login",
    "/logout",
    "/clients/st-mary/approve",
    "/clients/va/revoke",
    "/invitations",
    "/runs/heart-disease/stop",
]


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8081"},
        {"origin": "null"},
        {},
    ],
)
def test_a_form_from_elsewhere_is_refused(console: FakeConsole, headers: dict[str, str]) -> None:
    client = TestClient(application(console), base_url="http://127.0.0.1", follow_redirects=False)
    client.cookies.set("murmur", console.session("ada"))
    before = len(console.log), len(console.sessions)
    for path in FORMS:
        answer = client.post(path, data=RIGHT | {"name": "bay-view"}, headers=headers)
        assert answer.status_code == 403, path
        assert (len(console.log), len(console.sessions)) == before, path


def test_without_fetch_metadata_the_origin_must_be_the_host(console: FakeConsole) -> None:
    client = TestClient(application(console), base_url="http://murmur.lan:8440", follow_redirects=False)
    answer = client.post("/login", data=RIGHT, headers={"origin": "http://murmur.lan:8440"})
    assert answer.status_code == 303


def test_a_long_form_is_refused_before_it_is_read(stranger: TestClient) -> None:
    answer = stranger.post("/login", data={"user": "a", "password": "b" * MAX_FORM_BYTES})
    assert answer.status_code == 413


def test_a_form_without_a_length_is_refused(stranger: TestClient) -> None:
    answer = stranger.post("/login", content=iter((b"user=ada",)))
    assert answer.status_code == 413


def test_a_form_with_a_missing_field_is_a_page(stranger: TestClient) -> None:
    answer = stranger.post("/login", data={"user": "ada"})
    assert answer.status_code == 422 and "password" in answer.text


@pytest.mark.parametrize("path", ["/", "/login", "/runs", "/none", "/static/app.css", "/live?page=run"])
def test_every_answer_carries_the_security_headers(stranger: TestClient, path: str) -> None:
    answer = stranger.get(path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    policy = HEADERS["content-security-policy"]
    for word in ("unsafe", "http", "*", "data:", "blob:"):
        assert word not in policy
    assert policy.startswith("default-src 'self'; ")


def test_an_endpoint_may_set_a_header_of_its_own() -> None:
    async def app(scope, receive, send) -> None:
        await PlainTextResponse("x", headers={"referrer-policy": "no-referrer"})(scope, receive, send)

    answer = TestClient(SecurityHeaders(app)).get("/")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_are_never_kept_by_caches(browse: Callable[[str], TestClient]) -> None:
    for user, path in (("ada", "/"), ("", "/"), ("", "/login"), ("ada", "/runs/none")):
        assert browse(user).get(path).headers["cache-control"] == "no-store"
