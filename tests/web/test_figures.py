from __future__ import annotations

from datetime import timedelta

import pytest

from murmur.protocol.views import AssignmentView, RoundView
from murmur.web import figures

from .fakes import ROUND_S, START, FakeConsole


def round_of(*states: str, needed: int = 3, state: str = "collecting") -> RoundView:
    console = FakeConsole()
    rows = tuple(console.assignment(f"client-{i}", s) for i, s in enumerate(states))
    return RoundView(
        n=1, kind="train", attempt=1, state=state, opened_at=START, closed_at=None, threshold=needed, assignments=rows
    )


def test_steps_before_the_current_one_are_done() -> None:
    found = figures.steps(round_of(state="collecting"), secure=True)
    assert [s.state for s in found] == ["done", "done", "done", "now", "todo", "todo", "todo"]
    assert found[3].word == "Training, masking, sending"
    assert found[2].word == "Key backups stored"


@pytest.mark.parametrize(("state", "expected"), [("committed", "done"), ("failed", "todo"), ("unheard-of", "todo")])
def test_a_round_that_is_in_no_phase_has_no_current_step(state: str, expected: str) -> None:
    assert {s.state for s in figures.steps(round_of(state=state), secure=True)} == {expected}


def test_a_plain_round_has_no_steps_about_keys() -> None:
    assert [s.key for s in figures.steps(None, secure=False)] == ["selecting", "collecting", "aggregating"]


def test_the_cohort_is_counted_by_state() -> None:
    count = figures.cohort(round_of("uploaded", "counted", "working", "offered", "dropped", "failed"))
    assert (count.asked, count.left, count.sent, count.lost, count.needed) == (6, 4, 2, 2, 3)


@pytest.mark.parametrize(
    ("states", "tone", "said"),
    [
        (["working"] * 5, "ok", "5 clients taking part; the round can lose 2 more."),
        (["working"] * 3 + ["dropped"], "warn", "All 3 remaining clients are needed."),
        (["working"] * 2, "bad", "2 clients left, 3 needed"),
        ([], "mute", "not chosen yet"),
    ],
)
def test_the_distance_to_the_threshold_is_a_sentence(states: list[str], tone: str, said: str) -> None:
    sentence, got = figures.standing(figures.cohort(round_of(*states)), secure=True)
    assert got == tone and said in sentence


def test_a_large_cohorts_table_starts_with_what_needs_attention() -> None:
    shown = figures.shown_clients(round_of(*["counted"] * 90, "dropped", "working"))
    assert len(shown) == figures.TABLE_CLIENTS
    assert [a.state for a in shown[:3]] == ["dropped", "working", "counted"]


def test_the_remaining_time_follows_the_pace_of_the_last_rounds(console: FakeConsole) -> None:
    # Round n closes 19 s after (n - 1) * 21 s, give or take a second. The last closed 17 s ago; 8 rounds are left.
    left = figures.remaining_s(console.details["heart-disease"], START)
    assert left == pytest.approx(8 * ROUND_S - 17, abs=2)


def test_a_round_that_takes_long_does_not_promise_less_than_the_others(console: FakeConsole) -> None:
    left = figures.remaining_s(console.details["heart-disease"], START + timedelta(hours=3))
    assert left == pytest.approx(7 * ROUND_S, abs=3)


def test_no_time_is_promised_for_a_run_that_ended_or_just_began(console: FakeConsole) -> None:
    assert figures.remaining_s(console.details["heart-pilot"], START) is None
    console.add_run("new", 1)
    assert figures.remaining_s(console.details["new"], START) is None


def test_the_evaluation_after_the_last_round_is_called_so(console: FakeConsole) -> None:
    console.add_run("last", 25)
    console.open_round("last", "collecting", kind="evaluate")
    assert figures.position(console.details["last"]) == ("Final evaluation", "after 25 rounds")
    assert figures.position(console.details["heart-disease"]) == ("Round 18", "of 25")
    assert figures.position(console.details["heart-pilot"]) == ("12 rounds", "of 12")


def test_the_strip_has_a_cell_per_round(console: FakeConsole) -> None:
    strip = figures.progress_strip(console.details["heart-disease"])
    assert [strip.count(f'"cell {tone}"') for tone in ("ok", "now", "todo")] == [17, 1, 7]


def test_rounds_of_a_long_run_share_cells(console: FakeConsole) -> None:
    console.add_run("long", 500, rounds=1000)
    strip = figures.progress_strip(console.details["long"])
    assert [strip.count(f'"cell {tone}"') for tone in ("ok", "todo")] == [60, 60]
    assert "Rounds 1 to 8: done" in strip


def test_accuracy_stands_before_loss_and_other_metrics(console: FakeConsole) -> None:
    detail = console.details["heart-disease"]
    extra = detail.metrics[0].model_copy(update={"name": "auc"})
    found = figures.charts(detail.model_copy(update={"metrics": (extra, *detail.metrics)}))
    assert [(c.name, c.ink) for c in found] == [("accuracy", "a"), ("loss", "b"), ("auc", "c")]
    assert found[0].version == 17 and found[2].change is None


def test_a_metrics_hover_says_how_many_examples_stand_behind_it(console: FakeConsole) -> None:
    (accuracy, _) = figures.charts(console.details["heart-disease"])
    assert "Version 9: 0.741 over 720 examples" in accuracy.picture  # 303 + 294 + 123: va was lost


def test_groups_are_told_with_their_sizes_and_why_one_was_dropped() -> None:
    why = "its group 2 was dropped: 2 clients left while keys, 3 needed"
    rows = [AssignmentView(client=f"a{k}", state="working", group=1) for k in range(3)]
    rows += [AssignmentView(client=f"b{k}", state="dropped", reason="not heard for 60 s", group=2) for k in range(1)]
    rows += [AssignmentView(client=f"c{k}", state="dropped", reason=why, group=2) for k in range(2)]
    rows += [AssignmentView(client=f"d{k}", state="failed" if k else "uploaded", group=3) for k in range(4)]
    round = round_of().model_copy(update={"assignments": tuple(rows)})
    assert figures.groups(round) == [
        ("Group 1: 3 clients", "mute"),
        ("Group 2: dropped: 2 clients left while keys, 3 needed", "bad"),
        ("Group 3: 1 of 4 clients", "warn"),
    ]
    assert figures.cohort(round).needed == 0  # of no use here: each group has its own
    assert figures.groups(round_of("working", "failed")) == []
