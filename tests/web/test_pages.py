"""Every page as HTML, for the three kinds of visitor; forms, errors, hostile names, and what no page may contain."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from murmur.protocol.errors import NotFound
from murmur.protocol.sections import Dp
from murmur.protocol.views import ClientView, EventView, PrivacyView

from .fakes import FakeConsole, sha

PAGES = [
    "/",
    "/runs",
    "/runs/heart-disease",
    "/runs/heart-pilot",
    "/runs/heart-first-try",
    "/runs/heart-disease/rounds",
    "/runs/heart-disease/versions/17",
    "/runs/heart-disease/versions/0",
    "/clients",
    "/clients/cleveland",
    "/clients/st-mary",
    "/models",
    "/models?run=heart-disease",
    "/models/named/heart-disease",
    "/privacy",
    "/audit",
    "/audit?check=true&by=ada",
    "/settings",
]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """All tags with their attributes, and whether each open tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_well_formed_and_has_one_heading(admin: TestClient, path: str) -> None:
    answer = admin.get(path)
    assert answer.status_code == 200
    tags = Tags(answer.text)
    assert tags.open == []
    assert len(tags.all("h1")) == 1
    ids = [a["id"] for _, a in tags.tags if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", [*PAGES, "/login", "/runs/none"])
def test_a_page_obeys_the_content_security_policy(admin: TestClient, path: str) -> None:
    answer = admin.get(path)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for tag, attrs in Tags(answer.text).tags:
        assert tag != "style"
        assert "style" not in attrs and not [a for a in attrs if a.startswith("on")]
        if tag == "script":
            assert (attrs["src"] or "").startswith("/static/")
        for name in ("src", "href", "action"):
            assert (attrs.get(name) or "/")[0] in "/#?", f"{tag} leads away: {attrs}"


@pytest.mark.parametrize("path", PAGES)
def test_every_input_has_a_label_and_every_table_a_caption(admin: TestClient, path: str) -> None:
    tags = Tags(admin.get(path).text)
    labelled = {a.get("for") for a in tags.all("label")}
    for attrs in tags.all("input") + tags.all("select"):
        assert attrs.get("type") == "hidden" or attrs["id"] in labelled
    assert len(tags.all("caption")) == len(tags.all("table"))


@pytest.mark.parametrize("path", PAGES)
def test_a_stranger_is_asked_to_sign_in_and_then_led_back(stranger: TestClient, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    if path != "/":
        asked = stranger.get(answer.headers["location"])
        (field,) = [a for a in Tags(asked.text).all("input") if a["name"] == "next"]
        assert field["value"] == path


@pytest.mark.parametrize("path", PAGES)
def test_a_viewer_sees_every_page_and_no_action(viewer: TestClient, path: str) -> None:
    answer = viewer.get(path)
    assert answer.status_code == 200
    forms = {a["action"] or "" for a in Tags(answer.text).all("form")}
    own = {"/settings/password", "/settings/tokens"} | {f for f in forms if f.startswith("/settings/credentials/")}
    assert forms - own <= {"/logout", "/language", "/models", "/runs", "/audit"}


@pytest.mark.parametrize(
    "path",
    [
        "/clients/st-mary/approve",
        "/clients/va/revoke",
        "/invitations",
        *(f"/runs/heart-disease/{action}" for action in ("stop", "pause", "resume")),
    ],
)
def test_a_viewer_may_not_act(viewer: TestClient, console: FakeConsole, path: str) -> None:
    before = len(console.log)
    assert viewer.post(path, data={"name": "bay-view"}).status_code == 403
    assert len(console.log) == before


def test_a_run_in_groups_shows_each_with_its_size_or_why_it_was_dropped(
    admin: TestClient, console: FakeConsole
) -> None:
    detail = console.details["heart-disease"]
    current = detail.current
    assert current is not None
    why = "its group 1 was dropped: 2 clients left while keys, 3 needed"
    changes = [{"group": 1, "state": "dropped", "reason": why}, *[{"group": 2, "state": "working"}] * 3]
    rows = tuple(a.model_copy(update=c) for a, c in zip(current.assignments, changes, strict=True))
    current = current.model_copy(update={"assignments": rows})
    console.details["heart-disease"] = detail.model_copy(update={"current": current})
    said = text_of(admin.get("/runs/heart-disease").text)
    assert "Group 1: dropped: 2 clients left while keys, 3 needed" in said
    assert "Group 2: 3 clients" in said and f"{rows[1].client} group 2" in said


def test_a_run_shows_its_round_phases_cohort_and_sum(admin: TestClient) -> None:
    html = admin.get("/runs/heart-disease").text
    said = text_of(html)
    for words in (
        "Round 18 of 25",
        "about 2 min left",
        "Training, masking, sending",
        "Accuracy",
        "Training, 14 of 20",
        "no progress for 60 s",
        "All 3 remaining clients are needed",
        "Needed to unmask",
        "va dropped out of round 18",
        "All 18 rounds",
    ):
        assert words in said
    assert html.count('aria-current="step"') == 1
    assert html.count('class="chart"') == 2


def test_a_run_without_masks_says_that_updates_can_be_read(admin: TestClient) -> None:
    said = text_of(admin.get("/runs/heart-pilot").text)
    assert "Secure aggregation is off for this run: the coordinator can read each client" in said
    assert "Only the sum of all updates can be read" not in said


def test_a_failed_run_says_why(admin: TestClient) -> None:
    assert "2 clients left, 3 needed to unmask" in text_of(admin.get("/runs/heart-first-try").text)


def test_no_page_shows_a_metric_of_one_client(admin: TestClient) -> None:
    for path in ("/clients", "/clients/cleveland"):
        assert not re.search(r"accuracy|loss", admin.get(path).text, re.IGNORECASE)


def test_a_new_coordinator_says_what_to_do_next(browse: Callable[[str], TestClient], console: FakeConsole) -> None:
    console.__init__()
    admin = browse("ada")
    assert "Invite the first one" in text_of(admin.get("/").text)
    assert "murmur run start recipe.toml" in text_of(admin.get("/runs").text)
    assert "No model yet" in text_of(admin.get("/models").text)
    assert "No client is approved yet" in text_of(admin.get("/clients").text)


def test_a_run_that_just_began_has_a_page(admin: TestClient, console: FakeConsole) -> None:
    console.add_run("young", 0)
    said = text_of(admin.get("/runs/young").text)
    assert "Round 1 of 25" in said and "appear here after the first round" in said
    assert "NaN" not in said


def test_approving_a_client_is_one_press(admin: TestClient, console: FakeConsole) -> None:
    page = admin.get("/clients").text
    for group in console.client_views["st-mary"].fingerprint.split():
        assert f"<code>{group}</code>" in page
    answer = admin.post("/clients/st-mary/approve")
    assert (answer.status_code, answer.headers["location"]) == (303, "/clients")
    assert console.client_views["st-mary"].state == "active"
    assert console.log[-1].data == {"client": "st-mary", "state": "active", "by": "ada"}


def test_revoking_a_client_names_who_did_it(admin: TestClient, console: FakeConsole) -> None:
    assert admin.post("/clients/va/revoke").status_code == 303
    assert console.client_views["va"].state == "revoked"
    assert console.log[-1].data["by"] == "ada"


def test_an_invitations_line_is_shown_once(admin: TestClient) -> None:
    line = (
        f"murmur client enroll 'murmur://one-time-bay-view@murmur.example:8440?ca={sha('bay-view', 0)}' --name bay-view"
    )
    made = admin.post("/invitations", data={"name": "bay-view"})
    assert made.status_code == 200 and line in unescape(made.text)
    assert made.headers["cache-control"] == "no-store"
    again = admin.get("/clients").text
    assert "bay-view" in again and "one-time" not in again


@pytest.mark.parametrize("name", ["Bay View", "../etc", "x" * 64 + "y", "<b>", "bay\n"])
def test_a_name_that_no_client_may_have_is_refused(admin: TestClient, console: FakeConsole, name: str) -> None:
    before = list(console.invitation_views)
    answer = admin.post("/invitations", data={"name": name})
    assert answer.status_code in (200, 422)
    assert "copyline" not in answer.text
    assert console.invitation_views == before


def test_an_invitation_that_conflicts_says_why(admin: TestClient) -> None:
    assert "va is already enrolled." in text_of(admin.post("/invitations", data={"name": "va"}).text)


def test_a_run_is_stopped_once(admin: TestClient, console: FakeConsole) -> None:
    assert admin.post("/runs/heart-disease/stop").headers["location"] == "/runs/heart-disease"
    assert console.details["heart-disease"].run.state == "stopped"
    assert "Stop this run" not in admin.get("/runs/heart-disease").text
    again = admin.post("/runs/heart-disease/stop")
    assert again.status_code == 409 and "is stopped already" in text_of(again.text)


@pytest.mark.parametrize(
    "path",
    ["/runs/none", "/runs/none/rounds", "/runs/heart-disease/versions/99", "/clients/none", "/models?run=none"],
)
def test_what_is_not_there_is_a_page_too(admin: TestClient, path: str) -> None:
    answer = admin.get(path)
    assert answer.status_code == 404
    assert "Not found" in answer.text and answer.headers["content-type"].startswith("text/html")


def test_a_page_number_that_makes_no_sense_is_refused(admin: TestClient) -> None:
    assert admin.get("/models?page=0").status_code == 422
    assert admin.get("/models?page=x").status_code == 422


def test_versions_come_fifty_to_a_page(admin: TestClient, console: FakeConsole) -> None:
    console.add_run("long", 120, rounds=200)
    first, third = admin.get("/models?run=long"), admin.get("/models?run=long&page=3")
    assert "1 to 50 of 121" in text_of(first.text) and "Version 120" in first.text
    assert "101 to 121 of 121" in text_of(third.text) and "Version 0<" in third.text
    assert "data-live" in first.text and "data-live" not in third.text


def test_models_of_one_run_leave_out_the_others(admin: TestClient) -> None:
    page = admin.get("/models?run=heart-pilot").text
    assert sha("heart-pilot", 12) in page and sha("heart-disease", 17) not in page
    assert sha("heart-disease", 17) in admin.get("/models").text


def test_a_version_shows_its_line_of_parents(admin: TestClient) -> None:
    page = admin.get("/runs/heart-disease/versions/2").text.partition('class="lineage"')[2]
    hashes = re.findall(r'title="([0-9a-f]{64})"', page)
    assert hashes == [sha("heart-disease", n) for n in (2, 1, 0)]
    assert "start" in text_of(page)


def test_a_version_is_downloaded_under_its_hash(admin: TestClient) -> None:
    digest = sha("heart-disease", 17)
    answer = admin.get(f"/models/{digest}.safetensors")
    assert answer.content == b"weights of " + digest.encode()
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["etag"] == f'"{digest}"'


@pytest.mark.parametrize("name", ["0" * 64, "passwd", "..%2f..%2fetc%2fpasswd", "A" * 64])
def test_only_hashes_of_versions_can_be_downloaded(admin: TestClient, console: FakeConsole, name: str) -> None:
    def find(sha256: str) -> Path:
        assert sha256 == "0" * 64, "what is no hash is not even looked for"
        raise NotFound("There is no such version.")

    console.version_file = find
    assert admin.get(f"/models/{name}.safetensors").status_code == 404


def test_a_stranger_downloads_nothing(stranger: TestClient) -> None:
    assert stranger.get(f"/models/{sha('heart-disease', 17)}.safetensors").status_code == 303


def test_the_manifest_of_a_round_is_one_click_away(admin: TestClient) -> None:
    link = "/runs/heart-disease/rounds/17/manifest.json"
    assert f'href="{link}"' in admin.get("/runs/heart-disease/versions/17").text
    assert "manifest.json" not in admin.get("/runs/heart-disease/versions/0").text
    answer = admin.get(link)
    assert (answer.text, answer.headers["content-disposition"]) == ('{"round":17}', "attachment")
    assert admin.get(f"/runs/heart-disease/rounds/{1 << 70}/manifest.json").status_code == 404
    assert admin.get("/runs/heart-disease/rounds/99/manifest.json").status_code == 404


def test_all_manifests_of_a_run_come_as_one_file(admin: TestClient) -> None:
    link = "/runs/heart-disease/manifests.jsonl"
    assert f'href="{link}"' in admin.get("/runs/heart-disease").text
    assert admin.get(link).text.splitlines()[:2] == ['{"round":1}', '{"round":2}']
    assert admin.get("/runs/no-such-run/manifests.jsonl").status_code == 404


def test_a_stranger_reads_no_manifest(stranger: TestClient) -> None:
    for path in ("manifests.jsonl", "rounds/17/manifest.json"):
        assert stranger.get(f"/runs/heart-disease/{path}").status_code == 303


def test_metrics_come_as_csv(admin: TestClient) -> None:
    rows = admin.get("/runs/heart-disease/metrics.csv").text.splitlines()
    assert rows[0] == "version,metric,value,count"
    assert len(rows) == 1 + 2 * 17
    assert rows[1].startswith("1,loss,0.6")


def test_hostile_names_stay_text_on_every_page(admin: TestClient, console: FakeConsole) -> None:
    # The protocol refuses such names; the pages must not depend on it.
    for id, client in list(console.client_views.items()):
        console.client_views[id] = client.model_copy(update={"info": {"version": HOSTILE, HOSTILE: [HOSTILE]}})
    console.client_views[HOSTILE] = ClientView.model_construct(
        **(console.client_views["va"].model_dump() | {"id": HOSTILE, "fingerprint": HOSTILE, "state": "pending"})
    )
    detail = console.details["heart-disease"]
    assert detail.current is not None
    rows = tuple(a.model_copy(update={"client": HOSTILE, "reason": HOSTILE}) for a in detail.current.assignments)
    current = detail.current.model_copy(update={"assignments": rows, "reason": HOSTILE, "state": "failed"})
    run = detail.run.model_copy(update={"name": HOSTILE, "reason": HOSTILE, "created_by": HOSTILE})
    metrics = tuple(m.model_copy(update={"name": HOSTILE}) for m in detail.metrics)
    console.details["heart-disease"] = detail.model_copy(update={"run": run, "current": current, "metrics": metrics})
    console.version_views = [v.model_copy(update={"run_name": HOSTILE}) for v in console.version_views]
    console.log += [
        EventView(id=len(console.log) + 1, at=console.time, run="heart-disease", kind=HOSTILE, data={HOSTILE: HOSTILE})
    ]
    for path in PAGES:
        html = admin.get(path).text
        assert "<script>alert" not in html and "<img" not in html
        assert Tags(html).open == []


def test_the_same_fragment_is_first_painted_and_streamed(admin: TestClient, console: FakeConsole) -> None:
    """Every part of a live page is a fragment that its stream knows, and the other way round."""
    from murmur.web.boards import PAGES as LIVE

    for name, path in {"overview": "/", "runs": "/runs", "run": "/runs/heart-disease"}.items():
        parts = {a["data-part"] for _, a in Tags(admin.get(path).text).tags if "data-part" in a}
        assert parts == set(LIVE[name].fragments)
    for name, path in {"clients": "/clients", "models": "/models"}.items():
        parts = {a["data-part"] for _, a in Tags(admin.get(path).text).tags if "data-part" in a}
        assert parts == set(LIVE[name].fragments)


def test_no_fragment_holds_something_to_press_or_to_fill_in(console: FakeConsole) -> None:
    from murmur.web.boards import PAGES as LIVE
    from murmur.web.rendering import Renderer

    for name, page in LIVE.items():
        run = "heart-disease" if page.one_run else ""
        for html in Renderer(console).fragments(name, run, list(page.fragments)).values():
            assert not {t for t, _ in Tags(html).tags} & {"form", "input", "button", "select", "textarea"}
            assert all("data-keep" in a for a in Tags(html).all("details"))  # by which app.js leaves it unfolded


def test_static_files_may_be_kept_under_the_address_of_their_content(admin: TestClient) -> None:
    page = admin.get("/").text
    for address in re.findall(r'"(/static/[^"]+)"', page):
        assert "immutable" in admin.get(address).headers["cache-control"]
    assert admin.get("/static/app.css").headers["cache-control"] == "no-cache"
    assert admin.get("/static/app.css?v=old").headers["cache-control"] == "no-cache"
    assert admin.get("/static/none.css").status_code == 404


def test_the_page_of_a_private_run_says_what_its_epsilon_rests_on(admin: TestClient, console: FakeConsole) -> None:
    detail = console.details["heart-disease"]
    assert "Off: no bound is stated" in admin.get("/runs/heart-disease").text
    dp = Dp(mode="central", noise_multiplier=1.5, clip_norm=2.0, budget=8.0)
    recipe = detail.run.recipe.model_copy(update={"dp": dp})
    run = detail.run.model_copy(update={"recipe": recipe})
    console.details["heart-disease"] = detail.model_copy(update={"run": run})
    page = admin.get("/runs/heart-disease").text
    assert "Nothing is spent yet." in page
    assert "clipped to the bound of 2. The coordinator adds noise of 1.5 times that to the sum." in page
    spent = PrivacyView(
        value=3.14159,
        delta=1e-5,
        unit="client",
        accountant="rdp",
        assumptions=("the coordinator is <trusted>",),
        budget=8.0,
        spent=4,
        meaning="Client-level: little is learned.",
    )
    console.details["heart-disease"] = detail.model_copy(update={"run": run.model_copy(update={"privacy": spent})})
    page = admin.get("/runs/heart-disease").text
    assert "Epsilon 3.14 at delta 1e-05, client-level, by RDP, budget 8." in page
    assert "Client-level: little is learned." in page and "the coordinator is &lt;trusted&gt;" in page
