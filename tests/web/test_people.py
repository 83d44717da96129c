"""The pages for privacy, the audit log and settings: what is shown to whom, and what is shown once."""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.testclient import TestClient

from murmur.protocol.audit import AuditView, verify_log

from .fakes import FakeConsole
from .test_pages import HOSTILE, Tags, text_of


def test_the_privacy_page_says_what_is_spent_and_what_is_to_come_with_unit_and_accountant(viewer: TestClient):
    said = text_of(viewer.get("/privacy").text)
    for words in ("3.2", "4.1", "1e-05", "client, RDP", "17 of 25 rounds", "17 sums taken, distributed noise"):
        assert words in said
    assert "Accounted for at each site" in said
    assert "1 run without differential privacy: no bound is stated" in said  # of each hospital


def test_epsilon_of_a_data_owner_is_the_sum_over_its_runs(viewer: TestClient, console: FakeConsole):
    again = console.run_budgets[0].model_copy(update={"run": "second", "rounds": {"va": 3}})
    console.run_budgets.append(again)
    row = next(r for r in viewer.get("/privacy").text.split("<tr>") if 'href="/clients/va"' in r)
    assert "6.4" in row and "2e-05" in row and "2 runs with a bound" in text_of(row)


def test_an_infinite_epsilon_of_one_run_is_that_of_its_owners(viewer: TestClient, console: FakeConsole):
    spent = console.run_budgets[0].spent
    assert spent
    lost = spent.model_copy(update={"value": None})
    console.run_budgets.append(console.run_budgets[0].model_copy(update={"run": "second", "spent": lost}))
    row = next(r for r in viewer.get("/privacy").text.split("<tr>") if 'href="/clients/va"' in r)
    assert "∞" in row


def test_the_audit_log_is_filtered_and_exported_as_it_can_be_verified(viewer: TestClient, console: FakeConsole):
    said = text_of(viewer.get("/audit?by=ada&what=invited").text)
    assert "client invited st-mary" in said and "run started" not in said and "1 entry" in said
    whole = [AuditView.model_validate_json(line) for line in viewer.get("/audit.jsonl").text.splitlines()]
    assert verify_log(whole).head == console.entries[-1].sha256
    assert [json.loads(line)["n"] for line in viewer.get("/audit.jsonl?by=ada").text.splitlines()] == [1, 2, 5]


def test_the_verify_button_finds_a_changed_entry(viewer: TestClient, console: FakeConsole):
    good = text_of(viewer.get("/audit?check=true").text)
    assert "5 entries fit" in good and console.entries[-1].sha256 in good
    console.entries[1] = console.entries[1].model_copy(update={"by": "eve"})
    assert "entry 2 was changed" in text_of(viewer.get("/audit?check=true").text)


def test_a_new_token_is_shown_once(admin: TestClient):
    made = admin.post("/settings/tokens", data={"name": "notebook", "role": "researcher", "days": "30"})
    assert made.status_code == 200 and "secret-notebook" in made.text
    again = admin.get("/settings").text
    assert "secret-notebook" not in again and "notebook" in again


def test_a_new_user_gets_a_link_that_is_shown_once(admin: TestClient, console: FakeConsole):
    made = admin.post("/settings/users", data={"name": "bo", "role": "researcher"})
    assert "http://127.0.0.1/login?link=welcome-bo" in made.text
    assert "welcome-bo" not in admin.get("/settings").text
    assert console.people["bo"] == "researcher"
    taken = admin.post("/settings/users", data={"name": "bo", "role": "viewer"})
    assert taken.status_code == 409 and "There is a user named bo already." in taken.text
    wrong = admin.post("/settings/users", data={"name": "Bo Li", "role": "viewer"})
    assert wrong.status_code == 400 and "small letters" in wrong.text


def test_a_role_that_is_none_is_refused(admin: TestClient, console: FakeConsole):
    assert admin.post("/settings/users/vera/role", data={"role": "root"}).status_code == 422
    assert console.people["vera"] == "viewer"
    assert admin.post("/settings/users/vera/role", data={"role": "researcher"}).status_code == 303
    assert console.people["vera"] == "researcher"


def test_a_viewer_sees_only_what_is_its_own_to_end(viewer: TestClient, console: FakeConsole, admin: TestClient):
    actions = [a["action"] for a in Tags(viewer.get("/settings").text).all("form")]
    ended = [a for a in actions if a and a.endswith("/withdraw")]
    (mine,) = console.credentials("vera")
    assert ended == [f"/settings/credentials/{mine.id}/withdraw"]
    assert len(console.held) > 1


def test_a_wrong_password_is_said_beside_the_form_and_nobody_is_signed_out(viewer: TestClient):
    answer = viewer.post("/settings/password", data={"before": "wrong", "password": "a long enough one"})
    assert answer.status_code == 400 and "another one" in answer.text
    good = viewer.post("/settings/password", data={"before": "right", "password": "a long enough one"})
    assert "Your password is changed." in good.text


def test_a_researcher_has_the_buttons_of_its_own_runs_only(browse: Callable[[str], TestClient], console: FakeConsole):
    rhea = browse("rhea")
    for owner, shown in (("ada", False), ("rhea", True)):
        detail = console.details["heart-disease"]
        run = detail.run.model_copy(update={"created_by": owner})
        console.details["heart-disease"] = detail.model_copy(update={"run": run})
        assert ("/runs/heart-disease/pause" in rhea.get("/runs/heart-disease").text) is shown
        assert rhea.post("/runs/heart-disease/pause", data={"a": "b"}).status_code == (303 if shown else 403)
    assert "/runs/new" in rhea.get("/runs").text
    assert "/clients/st-mary/approve" not in rhea.get("/clients").text


def test_hostile_names_stay_text(admin: TestClient, console: FakeConsole):
    console.people[HOSTILE] = "viewer"
    console.note(HOSTILE, HOSTILE, by=HOSTILE, key=HOSTILE)
    console.grant("api", HOSTILE, HOSTILE, "viewer", days=1)
    console.run_budgets.append(
        console.run_budgets[0].model_copy(update={"run": HOSTILE, "name": HOSTILE, "rounds": {HOSTILE: 1}})
    )
    for path in ("/privacy", "/audit", "/settings"):
        html = admin.get(path).text
        assert "<script>alert" not in html and "<img" not in html
        assert "&lt;script&gt;" in html


def test_a_client_s_page_tells_what_arrived_and_a_revoked_one_is_invited_again(admin: TestClient, viewer: TestClient):
    said = text_of(viewer.get("/clients/cleveland").text)
    assert "38 of 40 (95 %)" in said and "1.2 MB/s" in said
    assert "95 %" in text_of(viewer.get("/clients").text)
    assert "Invite again" in admin.get("/clients/old-clinic").text
    assert "Invite again" not in admin.get("/clients/cleveland").text + viewer.get("/clients/old-clinic").text
