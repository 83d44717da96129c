"""A paused run, a round that waits, and a version that lacks somebody, as the pages show them."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from murmur.protocol.sections import Cohort
from murmur.web import figures, refusals
from murmur.web.rendering import Renderer

from .fakes import SAID_SILENT, START, FakeConsole
from .test_pages import Tags, text_of

RUN = "/runs/heart-disease"
FULL = "the disk is full: 1.2 GB are free and 3.4 GB are needed. Free some space; work goes on once there is room"


def forms(page: str) -> set[str | None]:
    return {form["action"] for form in Tags(page).all("form")}


def test_a_run_is_paused_and_resumed_by_one_press_each(admin: TestClient, console: FakeConsole) -> None:
    assert {f"{RUN}/pause", f"{RUN}/resume", f"{RUN}/stop"} <= forms(admin.get(RUN).text)
    answer = admin.post(f"{RUN}/pause")
    assert (answer.status_code, answer.headers["location"]) == (303, RUN)
    page = admin.get(RUN).text
    assert 'data-state="paused"' in page and "Paused by ada. Clients may deliver" in text_of(page)
    assert "Run paused by ada" in text_of(page)
    assert admin.post(f"{RUN}/resume").status_code == 303
    page = admin.get(RUN).text
    assert 'data-state="running"' in page and "Run resumed by ada" in text_of(page)
    assert [e.data["by"] for e in console.log[-2:]] == ["ada", "ada"]


@pytest.mark.parametrize("action", ["pause", "resume"])
def test_a_viewer_has_no_buttons_and_may_not_use_their_addresses(
    viewer: TestClient, console: FakeConsole, action: str
) -> None:
    assert forms(viewer.get(RUN).text) == {"/logout", "/language"}
    assert viewer.post(f"{RUN}/{action}").status_code == 403
    assert console.details["heart-disease"].run.state == "running"


def test_a_run_that_is_over_has_no_buttons_and_cannot_be_paused(admin: TestClient) -> None:
    assert forms(admin.get("/runs/heart-pilot").text) == {"/logout", "/language"}
    for action in ("pause", "resume"):
        answer = admin.post(f"/runs/heart-pilot/{action}")
        assert answer.status_code == 409 and "finished already" in text_of(answer.text)
        assert admin.post(f"/runs/none/{action}").status_code == 404


def test_a_paused_run_can_be_stopped(admin: TestClient, console: FakeConsole) -> None:
    console.pause_run("heart-disease", "ada")
    assert admin.post(f"{RUN}/stop").status_code == 303
    assert console.details["heart-disease"].run.state == "stopped"


def test_a_pause_by_the_coordinator_gives_its_reason_and_that_it_ends_by_itself(
    admin: TestClient, console: FakeConsole
) -> None:
    console.hold("heart-disease", FULL)
    said = text_of(admin.get(RUN).text)
    assert f"Paused by the coordinator, and goes on by itself: {FULL}." in said
    assert "Run paused by the coordinator: the disk is full: 1.2 GB are free and 3.4 GB are needed" in said
    for path in ("/", "/runs"):  # rows have its first sentence
        said = text_of(admin.get(path).text)
        assert "3.4 GB are needed" in said and "Free some space" not in said
    console.resume_run("heart-disease", "")
    assert "Run resumed by the coordinator" in text_of(admin.get(RUN).text)


def test_a_paused_run_is_not_over(admin: TestClient, console: FakeConsole) -> None:
    console.pause_run("heart-disease", "ada")
    said = text_of(admin.get("/").text)
    assert "1 of 3 runs, 1 paused" in said and "Round 18 of 25 · paused by ada" in said
    page = admin.get(RUN).text
    said = text_of(page)
    assert "Round 18 of 25" in said and "Training, masking, sending" in said
    assert "min left" not in said  # nobody knows when it goes on
    assert "All 3 remaining clients are needed" in said
    assert "Round 18: paused" in page and page.count('aria-current="step"') == 1
    assert "/runs/heart-disease/versions/17" in page


def test_a_round_says_what_it_waits_for(admin: TestClient, console: FakeConsole) -> None:
    why = "2 clients are online, 3 are needed"
    console.open_round("heart-disease", "selecting", reason=why)
    console.emit("phase", run="heart-disease", round=18, attempt=1, state="selecting", reason=why)
    said = text_of(admin.get(RUN).text)
    assert f"Waiting for clients: {why}" in said
    assert f"The clients of this round are not chosen yet: {why}." in said
    assert f"Round 18 waits: {why}" in said and "left" not in said.split("Clients of")[0]
    assert f"Choosing clients: {why}" in text_of(admin.get("/").text)


def test_no_time_is_promised_while_a_round_waits(console: FakeConsole) -> None:
    assert figures.remaining_s(console.details["heart-disease"], START) is not None
    console.open_round("heart-disease", "selecting", reason="2 clients are online, 3 are needed")
    assert figures.remaining_s(console.details["heart-disease"], START) is None


def test_a_version_tells_who_is_in_it_and_who_is_missing(admin: TestClient) -> None:
    page = admin.get(f"{RUN}/versions/17").text
    said = text_of(page)
    assert "From 3 of 4 clients" in said and f"va {SAID_SILENT}" in said
    assert "Who is in the sum is known; what each of them sent is not." in said
    assert all(f'href="/clients/{name}"' in page for name in ("cleveland", "hungarian", "switzerland", "va"))
    whole = text_of(admin.get(f"{RUN}/versions/16").text)
    assert "4 clients contributed" in whole and SAID_SILENT not in whole
    assert "what each of them sent" not in text_of(admin.get("/runs/heart-pilot/versions/9").text)  # it is readable
    first = text_of(admin.get(f"{RUN}/versions/0").text)
    assert "What the run started from" in first and "Missing" not in first


def test_rows_of_rounds_and_versions_count_who_is_missing(admin: TestClient) -> None:
    for path in (RUN, f"{RUN}/rounds"):
        said = text_of(admin.get(path).text)
        assert f"Committed va: {SAID_SILENT} 3 of 4" in said
    assert " 3 of 4 " in text_of(admin.get("/models?run=heart-disease").text)


def test_a_run_that_asks_more_clients_than_it_needs_says_so(admin: TestClient, console: FakeConsole) -> None:
    detail = console.details["heart-disease"]
    recipe = detail.run.recipe.model_copy(update={"cohort": Cohort(min=3, size=10, over_select=1.25)})
    run = detail.run.model_copy(update={"recipe": recipe})
    console.details["heart-disease"] = detail.model_copy(update={"run": run})
    assert "3 to 10, the first of 13 asked" in text_of(admin.get(RUN).text)
    assert "the first of" not in text_of(admin.get("/runs/heart-pilot").text)


def test_those_of_one_reason_stand_together_and_many_are_counted() -> None:
    gone = [(f"site-{i}", "not heard for 60 s") for i in range(5)]
    assert refusals.absent([("va", "no progress for 300 s"), *gone]) == [
        "site-0, site-1, site-2 and 2 more: not heard for 60 s",
        "va: no progress for 300 s",
    ]
    assert refusals.absent([("va", "")]) == ["va"]


@pytest.mark.parametrize(
    ("reason", "brief", "said"),
    [
        ("privacy_refusal:policy_plain: secure only", True, "refused: its policy takes part in masked rounds only"),
        (
            "privacy_refusal:summed_before: over 4 clients",
            False,
            "refused: its update was already summed, over other clients (over 4 clients)",
        ),
        ("privacy_refusal:of_tomorrow: two moons", True, "refused: two moons"),
        ("privacy_refusal:of_tomorrow", False, "refused: of_tomorrow"),
        ("not heard for 60 s", False, "not heard for 60 s"),
    ],
)
def test_a_refusal_is_told_in_words(reason: str, brief: bool, said: str) -> None:
    assert refusals.in_words(reason, brief=brief) == said


def test_a_refusal_is_in_words_in_the_cohort_the_rows_and_the_log(admin: TestClient, console: FakeConsole) -> None:
    reason = "privacy_refusal:policy_min_clients: 4 clients in the cohort, this site asks for 5"
    console.open_round("heart-disease", "collecting", console.assignment("va", "failed", reason=reason))
    console.emit("client", run="heart-disease", client="va", round=18, attempt=1, state="failed", reason=reason)
    said = text_of(admin.get(RUN).text)
    asks = "refused: its policy asks for more clients in a sum"
    assert f"{asks} (4 clients in the cohort, this site asks for 5)" in said
    assert f"va: {asks} " in said and f"va failed in round 18: {asks} " in said
    assert "privacy_refusal" not in said


def test_a_pause_touches_the_parts_that_show_it(console: FakeConsole) -> None:
    from murmur.web.boards import PAGES

    console.pause_run("heart-disease", "ada")
    stale = PAGES["run"].stale(console.log[-1:])
    drawn = Renderer(console).fragments("run", "heart-disease", stale)
    assert "Paused by ada" in drawn["run_head"] and "Paused" in drawn["run_now"] and "paused by ada" in drawn["log"]
    assert {"overview_figures", "overview_runs"} <= set(PAGES["overview"].stale(console.log[-1:]))
