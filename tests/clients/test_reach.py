"""What a check says of the way to the coordinator: every trouble that an agent could have with it, told beforehand."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from murmur.clients.check import Report
from murmur.clients.identity import create_identity
from murmur.clients.reach import LEAST_BYTES, reach
from murmur.clients.settings import Settings, parse_settings
from murmur.protocol.errors import MurmurError, NotApproved, NotAuthenticated, NotFound

from .coordinator_double import Wire
from .scripted import ok
from .servers import Authority, serve


def settings(folder: Path, url: str = "http://127.0.0.1:1") -> Settings:
    folder.mkdir(exist_ok=True)
    if not (folder / "identity.pem").exists():
        create_identity(folder / "identity.pem")
    return parse_settings({"name": "alpha", "coordinator": url}, folder)


def coordinator(fails: MurmurError | None = None, *, clock_ahead_s: float = 0.0) -> Callable[[httpx.Request], Any]:
    """A coordinator whose tokens, or whose transfers, fail in one way; `taken` are the sizes that it was sent."""
    taken: list[int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        date = email.utils.formatdate(time.time() - clock_ahead_s, usegmt=True)
        if fails is not None and (request.url.path == "/v1/token") == (not isinstance(fails, NotFound)):
            response = httpx.Response(fails.status, json=fails.problem(), headers={"Murmur-Protocol": "1"})
        elif request.url.path == "/v1/token":
            response = ok({"token": "t", "expires_s": 600})
        elif request.method == "GET":
            content = bytes(int(request.url.params["bytes"]))
            response = httpx.Response(200, content=content, headers={"Murmur-Protocol": "1"})
        else:
            taken.append(len(request.read()))
            response = ok({"accepted": True})
        response.headers["Date"] = date
        return response

    handle.taken = taken  # pyright: ignore
    return handle


def said(
    folder: Path, handle: Callable[[httpx.Request], httpx.Response], **facts: Any
) -> tuple[dict[str, Any], Report]:
    report = Report()
    report.facts |= facts
    reach(settings(folder), report, transport=Wire(handle))
    return {f.subject: (f.level, f.said, f.todo) for f in report.findings}, report


def test_a_coordinator_that_answers_is_measured_with_the_models_size(tmp_path: Path):
    handle = coordinator()
    found, report = said(tmp_path, handle, model_bytes=300_000)
    assert {name: level for name, (level, *_) in found.items()} == {
        "TLS": "yellow", "coordinator": "green", "clock": "green", "bandwidth": "green",
    }  # fmt: skip
    assert handle.taken == [0, 300_000]  # pyright: ignore
    assert report.facts["down_bytes_per_s"] > 0 and report.facts["up_bytes_per_s"] > 0
    small = coordinator()
    said(tmp_path, small, model_bytes=10)
    assert small.taken == [0, LEAST_BYTES]  # pyright: ignore


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (NotApproved("an admin has to approve this client's key first"), "yellow", "has yet to approve this client"),
        (NotAuthenticated(), "red", "does not accept this client"),
        (NotFound("no such address"), "yellow", "its release cannot measure transfers"),
    ],
)
def test_what_a_coordinator_refuses_is_told_with_what_to_do(tmp_path: Path, error: MurmurError, level: str, words: str):
    found, report = said(tmp_path, coordinator(error))
    at, text, todo = found["coordinator"]
    assert at == level and words in text and todo
    assert "bandwidth" not in found and report.ok == (level == "yellow")


def test_a_client_that_waits_for_approval_is_told_its_fingerprint(tmp_path: Path):
    found, _ = said(tmp_path, coordinator(NotApproved("later")))
    from murmur.clients.identity import load_identity

    assert load_identity(tmp_path / "identity.pem").fingerprint in found["coordinator"][2]


@pytest.mark.parametrize(("ahead_s", "words"), [(90.0, "90 s ahead of"), (-90.0, "90 s behind")])
def test_a_clock_that_is_wrong_is_yellow_before_anything_is_refused(tmp_path: Path, ahead_s: float, words: str):
    found, _ = said(tmp_path, coordinator(clock_ahead_s=ahead_s))
    level, text, _ = found["clock"]
    assert (
        level == "yellow"
        and words.split()[1] in text
        and any(f"{n} s {words.split()[2]}" in text for n in (89, 90, 91))
    )


def test_nobody_at_the_address_is_red(tmp_path: Path):
    report = Report()
    reach(settings(tmp_path), report)  # nobody listens at port 1
    assert [(f.subject, f.level) for f in report.findings if f.level == "red"] == [("coordinator", "red")]
    assert "cannot be reached" in report.findings[-1].said


def test_a_certificate_is_told_with_its_last_day_and_one_of_another_ca_is_red(tmp_path: Path):
    mine, other = Authority.new(), Authority.new()
    with serve(coordinator(), certificate=mine.issue(tmp_path / "server.pem")) as url:
        for authority, level in ((mine, "yellow"), (other, "red")):  # it is good for one more day
            report = Report()
            site = settings(tmp_path / level, url)
            site.ca_file.write_bytes(authority.pem)
            reach(site, report)
            found = {f.subject: f for f in report.findings}
            assert found["TLS"].level == level and report.ok == (level == "yellow")
            assert ("is good until 20" if level == "yellow" else "is not believed") in found["TLS"].said
    assert found["coordinator"].level == "red"
