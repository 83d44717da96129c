"""A round's timeline: who did what when, who is behind, who left and why. Seconds since the cohort was asked."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any
from xml.etree import ElementTree

from fastapi.testclient import TestClient

from murmur.protocol.views import LATE, AssignmentView, Phase, RoundView
from murmur.web import gantt
from murmur.web.timeline import Timeline, timeline

from .fakes import START, FakeConsole

RUN = "/runs/heart-disease"


def at(second: float):
    return START + timedelta(seconds=second)


def part(client: str, state: str, *phases: tuple[str, float], heard: float = 0, **values: Any) -> AssignmentView:
    began = tuple(Phase(name=name, at=at(second)) for name, second in phases)
    given = {"client": client, "state": state, "phases": began, "started_at": START, "heard_at": at(heard)}
    return AssignmentView.model_validate(given | {"updated_at": at(heard)} | values)


def drawn(*parts: AssignmentView, now: float, closed: float | None = None, patience_s: float = 60) -> Timeline:
    round = RoundView(
        n=1,
        kind="train",
        attempt=1,
        state="collecting" if closed is None else "committed",
        opened_at=START,
        closed_at=None if closed is None else at(closed),
        assignments=parts,
    )
    return timeline(round, at(now), patience_s=patience_s, secure=True)


def spans(shown: Timeline, row: int = 0) -> list[tuple[str, float, float]]:
    """(kind, from, width) of a row's bars, in percent of the axis."""
    svg = ElementTree.fromstring(str(shown.rows[row].bar))
    number = lambda r, name: float(r.get(name, "").rstrip("%"))  # noqa: E731
    return [((r.get("class") or "").split()[1], number(r, "x"), number(r, "width")) for r in svg.iter("rect")]


def marks(shown: Timeline, row: int = 0) -> list[str]:
    return re.findall(r'class="mark-(\w+)"', str(shown.rows[row].bar))


def test_each_phase_is_a_bar_as_long_as_it_took() -> None:
    done = part("a", "uploaded", ("downloading", 0), ("training", 10), ("uploading", 35), ("sent", 40), heard=40)
    shown = drawn(done, now=40)
    assert spans(shown) == [("downloading", 0, 25), ("training", 25, 62.5), ("uploading", 87.5, 12.5)]
    assert marks(shown) == ["sent"]


def test_a_training_is_drawn_on_to_where_its_pace_will_end_it() -> None:
    going_on = part("a", "working", ("training", 0), heard=10, phase="training", step=5, steps=20)
    shown = drawn(going_on, now=10)  # 5 steps in 10 s: 20 in 40 s, so the axis ends there
    assert spans(shown) == [("training", 0, 25), ("rest", 25, 75)]
    assert shown.rows[0].said == ("Training, 5 of 20", "live")


def test_a_quiet_client_has_its_deadline_in_the_picture_and_in_words() -> None:
    quiet = part("a", "working", ("training", 0), heard=5, phase="training")
    shown = drawn(quiet, now=35)
    assert [kind for kind, _, _ in spans(shown)] == ["training", "silent"]
    assert marks(shown) == ["deadline"]
    assert shown.rows[0].said == ("Silent for 30 s", "warn")
    assert shown.rows[0].why == "Dropped in 30 s unless it is heard."


def test_a_client_that_is_heard_has_no_deadline() -> None:
    assert marks(drawn(part("a", "working", ("training", 0), heard=30, phase="training"), now=35)) == []


def test_who_takes_half_as_long_again_as_the_middle_one_is_behind() -> None:
    sent = [part(name, "uploaded", ("training", 0), ("sent", 10)) for name in "ab"]
    slow = part("c", "working", ("training", 0), heard=15, phase="training")
    assert drawn(*sent, slow, now=15).rows[2].why == ""
    behind = drawn(*sent, slow, now=15.5).rows[2]
    assert (behind.said[1], behind.why) == ("warn", "Behind the others, who took 10.0 s.")


def test_nobody_is_behind_before_half_have_sent() -> None:
    sent = part("a", "uploaded", ("training", 0), ("sent", 1))
    rest = [part(name, "working", ("training", 0), heard=9, phase="training") for name in "bcd"]
    assert {row.why for row in drawn(sent, *rest, now=9).rows} == {""}


def test_a_drop_out_is_told_apart_from_one_that_came_too_late() -> None:
    gone = part("a", "dropped", ("training", 0), heard=5, lost_at=at(65), reason="not heard for 60 s while collecting")
    late = part("b", "dropped", ("training", 0), heard=79, reason=LATE)
    shown = drawn(gone, late, now=90, closed=80)
    assert [row.said for row in shown.rows] == [("Dropped out", "bad"), ("Came too late", "warn")]
    assert shown.rows[0].why == "not heard for 60 s while training and sending"
    assert [marks(shown, i) for i in (0, 1)] == [["lost"], ["late"]]


def test_the_axis_of_a_round_that_is_over_ends_with_it() -> None:
    shown = drawn(part("a", "counted", ("training", 0), ("sent", 20)), now=5000, closed=40)
    assert spans(shown) == [("training", 0, 50)]


def test_a_phase_of_an_instant_is_seen_and_stays_inside() -> None:
    bar = gantt.bar([gantt.Span(kind="training", since=10, until=10, title="t")], [], end=10, label="a")
    rect = ElementTree.fromstring(str(bar)).find("rect")
    assert rect is not None and (rect.get("x"), rect.get("width")) == ("99.4%", "0.6%")


def test_names_and_reasons_are_escaped() -> None:
    shown = drawn(part("<b>", "failed", ('"><script>', 0), reason="<i>"), now=5)
    assert "<script>" not in str(shown.rows[0].bar) and "<b>" not in str(shown.rows[0].bar)


def test_a_rounds_page_shows_its_timeline(admin: TestClient, console: FakeConsole) -> None:
    page = admin.get(f"{RUN}/rounds/17").text
    assert "Round 17" in page and 'class="gantt"' in page and "Dropped out" in page
    assert f'href="{RUN}/rounds/17"' in admin.get(RUN).text
    assert admin.get(f"{RUN}/rounds/99").status_code == 404
    assert admin.get(f"{RUN}/rounds/{1 << 63}").status_code == 404
