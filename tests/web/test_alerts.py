"""What needs a look, on the overview; and who is in the versions of a run."""

from __future__ import annotations

from datetime import timedelta

from fastapi.testclient import TestClient

from murmur.protocol.views import LATE, PrivacyView
from murmur.web.alerts import MOST, Alert, alerts
from murmur.web.people import ROUNDS, ROWS, people

from .fakes import SAID_SILENT, SILENT, FakeConsole, demo

RUN = "heart-disease"


def quiet() -> FakeConsole:
    """A console with one run in progress and nothing the matter."""
    console = FakeConsole()
    for name in ("a", "b", "c"):
        console.add_client(name)
    console.add_run(RUN, 2)
    console.open_round(RUN, "collecting", *(console.assignment(name, "working") for name in ("a", "b", "c")))
    return console


def found(console: FakeConsole) -> list[Alert]:
    running = [d for d in console.details.values() if not d.run.over]
    return alerts(running, console.runs(), console.clients(), console.recent_events(None, 400))


def said(console: FakeConsole) -> list[str]:
    return [a.said for a in found(console)]


def with_run(console: FakeConsole, **values: object) -> FakeConsole:
    detail = console.details[RUN]
    console.details[RUN] = detail.model_copy(update={"run": detail.run.model_copy(update=values)})
    return console


def test_nothing_is_said_while_all_is_well(viewer: TestClient, console: FakeConsole) -> None:
    assert said(quiet()) == []
    console.log.clear()
    console.details = {"heart-pilot": console.details["heart-pilot"]}
    assert "Needs a look" not in viewer.get("/").text


def test_a_client_that_goes_offline_during_a_round_is_named() -> None:
    console = quiet()
    console.add_client("b", online=False)
    console.add_client("elsewhere", online=False)
    assert said(console) == ["b is offline in the middle of round 3"]
    assert found(console)[0].at == console.time - timedelta(seconds=5400)


def test_a_metric_that_is_no_number_is_told() -> None:
    assert said(with_run(quiet(), latest={"loss": float("nan"), "accuracy": 0.5})) == [
        "Loss of version 2 is not a number"
    ]


def test_four_fifths_of_a_privacy_budget_are_told() -> None:
    def spent(value: float) -> list[str]:
        privacy = PrivacyView(value=value, delta=1e-5, unit="client", accountant="rdp", budget=5.0)
        return said(with_run(quiet(), privacy=privacy))

    assert spent(3.99) == []
    assert spent(4.0) == ["80% of the privacy budget is spent: epsilon 4 of 5"]


def test_more_than_a_third_of_a_cohort_lost_is_told_and_late_ones_do_not_count() -> None:
    console = quiet()
    lost = [console.assignment(name, "dropped", reason=SILENT) for name in ("a", "b")]
    late = console.assignment("b", "dropped", reason=LATE)
    console.open_round(RUN, "collecting", lost[0], late, console.assignment("c", "working"))
    assert said(console) == []
    console.open_round(RUN, "collecting", *lost, console.assignment("c", "working"))
    assert said(console) == ["2 of 3 clients have dropped out of round 3"]


def test_a_run_that_the_coordinator_holds_is_told_and_one_that_a_person_paused_is_not() -> None:
    held, paused = quiet(), quiet()
    held.hold(RUN, "the disk has 12 MB left, 40 MB are needed")
    paused.pause_run(RUN, "ada")
    assert "the disk has 12 MB left" in said(held)[0]
    assert said(paused) == []


def test_failures_are_told_the_last_first_and_not_without_end() -> None:
    console = quiet()
    console.emit("client", RUN, client="a", round=3, attempt=1, state="dropped", reason=LATE)
    console.emit("client", RUN, client="a", round=3, attempt=1, state="dropped", reason=SILENT)
    console.emit("phase", RUN, round=3, attempt=1, state="failed", reason="2 left")
    assert [a.tone for a in found(console)] == ["bad", "warn"]
    assert said(console)[0] == "Round 3 failed: 2 left"
    for _ in range(20):
        console.emit("run", RUN, state="failed", reason="x")
    assert len(found(console)) == MOST


def test_clients_lost_in_one_round_for_one_reason_are_one_alert() -> None:
    console = quiet()
    for n, name in enumerate("abcde"):
        reason = "operator_error: training ended in NaN" if n else SILENT
        console.emit("client", RUN, client=name, round=3, attempt=1, state="failed", reason=reason)
    assert said(console) == [
        "b, c, d and 1 more failed in round 3: training ended in NaN",
        f"a failed in round 3: {SAID_SILENT}",
    ]


def test_the_overview_shows_them_escaped(viewer: TestClient, console: FakeConsole) -> None:
    console.emit("phase", RUN, round=3, attempt=1, state="failed", reason="<script>alert(1)</script>")
    page = viewer.get("/").text
    assert "Needs a look" in page and "<script>alert" not in page


def test_each_client_has_a_strip_of_the_versions_that_it_is_in() -> None:
    found = people(demo().run(RUN))
    va = next(p for p in found.rows if p.client == "va")
    assert (va.counted, va.asked, va.missed) == (15, 17, f"round 17: {SAID_SILENT}")
    assert str(va.strip).count('class="cell ok"') == 15 and str(va.strip).count('class="cell bad"') == 2
    assert [(p.counted, p.asked) for p in found.rows if p.client != "va"] == [(17, 17)] * 3
    assert (found.first, found.last, found.more) == (1, 17, 0)


def test_a_round_that_did_not_ask_a_client_is_not_held_against_it() -> None:
    console = quiet()
    detail = console.run(RUN)
    new = detail.rounds[1].model_copy(update={"assignments": (console.assignment("new", "counted"),)})
    console.details[RUN] = detail.model_copy(update={"rounds": (detail.rounds[0], new)})
    row = next(p for p in people(console.run(RUN)).rows if p.client == "new")
    assert (row.counted, row.asked, row.seldom) == (1, 1, False)
    assert str(row.strip).count('class="cell todo"') == 1


def test_a_long_run_of_many_clients_shows_its_newest_rounds_and_who_was_missing_most() -> None:
    console = quiet()
    detail = console.run(RUN)
    one = detail.rounds[0]
    states = {f"c{i:03d}": "dropped" if i == 77 else "counted" for i in range(100)}
    parts = tuple(console.assignment(name, state) for name, state in states.items())
    rounds = tuple(one.model_copy(update={"n": n, "version": n, "assignments": parts}) for n in range(1, 101))
    console.details[RUN] = detail.model_copy(update={"rounds": rounds})
    found = people(console.run(RUN))
    assert (found.first, found.last) == (101 - ROUNDS, 100)
    assert (len(found.rows), found.more) == (ROWS, 100 - ROWS)
    assert found.rows[0].client == "c077" and found.rows[0].seldom
