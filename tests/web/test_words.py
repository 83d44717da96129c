from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from murmur.protocol.views import AssignmentView, EventView
from murmur.web import words

NOW = datetime(2026, 3, 2, 9, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(2, "just now"), (59, "59 s ago"), (60, "1 min ago"), (7199, "1 h ago"), (86_400, "1 d ago"), (-30, "just now")],
)
def test_the_past_is_told_in_its_largest_unit(seconds: int, said: str) -> None:
    assert words.ago(NOW - timedelta(seconds=seconds), NOW) == said


def test_a_client_that_never_called_was_never_seen() -> None:
    assert words.ago(None, NOW) == "never"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (73_912, "73.9 kB"), (999_960, "1.0 MB"), (5 * 10**12, "5.0 TB")],
)
def test_sizes_use_decimal_units(count: int, said: str) -> None:
    assert words.size(count) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.8034, "0.803"), (0.00123, "0.00123"), (12.34567, "12.35"), (math.nan, "not a number")],
)
def test_a_metric_has_four_digits_at_most(value: float | None, said: str) -> None:
    assert words.number(value) == said


def test_a_change_has_a_sign() -> None:
    assert (words.change(0.0087), words.change(-0.013), words.change(math.nan)) == ("+0.009", "−0.013", "not a number")


def test_durations_have_two_units() -> None:
    assert [words.took(s) for s in (8.44, 60, 125, 12_000)] == ["8.4 s", "1 min", "2 min 5 s", "3 h 20 min"]


def test_every_state_of_a_round_has_words() -> None:
    states = ["selecting", "keys", "shares", "collecting", "agreeing", "revealing", "aggregating"]
    assert [key for key, _, _ in words.SECURE] == states
    for state in [*states, "committed", "failed"]:
        word, tone = words.round_state(state, secure=True, evaluate=False)
        assert word != state and tone in ("live", "ok", "bad")


def test_an_evaluation_measures_and_does_not_train() -> None:
    assert words.phase("collecting", secure=True, evaluate=True) == ("Measuring and sending", "Measurements received")
    assert words.phase("collecting", secure=False, evaluate=False) == ("Training and sending", "Updates received")


@pytest.mark.parametrize(
    ("given", "secure", "said"),
    [
        ({"state": "working", "phase": "training", "step": 14, "steps": 20}, True, ("Training, 14 of 20", "live")),
        ({"state": "working", "phase": "uploading"}, True, ("Sending its masked update", "live")),
        ({"state": "working", "phase": "uploading"}, False, ("Sending its update", "live")),
        ({"state": "uploaded"}, True, ("Masked update sent", "ok")),
        ({"state": "uploaded"}, False, ("Update sent", "ok")),
        ({"state": "dropped"}, True, ("Dropped out", "bad")),
        ({"state": "working", "phase": "resting"}, True, ("Resting", "live")),
    ],
)
def test_a_clients_part_is_said_in_words(given: dict[str, Any], secure: bool, said: tuple[str, str]) -> None:
    assert words.assignment(AssignmentView.model_validate({"client": "va", **given}), secure=secure) == said


def event(kind: str, **data: Any) -> tuple[str, str]:
    return words.event(EventView(id=1, at=NOW, run=None, kind=kind, data=data))


def test_a_known_event_is_a_sentence() -> None:
    said = event("client", client="va", state="dropped", round=18, attempt=1, reason="no progress for 60 s")
    assert said == ("va dropped out of round 18: no progress for 60 s", "bad")


def test_a_phase_names_the_attempt_only_if_it_is_not_the_first() -> None:
    assert event("phase", round=3, attempt=1, state="revealing") == ("Round 3: unmasking the sum", "mute")
    assert event("phase", round=3, attempt=2, state="committed") == ("Round 3, attempt 2 committed", "ok")


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("phase", {"state": "selecting"}, "Final evaluation: choosing clients"),
        ("phase", {"state": "collecting"}, "Final evaluation: measuring and sending"),
        ("phase", {"state": "committed", "attempt": 2}, "Final evaluation, attempt 2 committed"),
        ("client", {"client": "va", "state": "uploaded"}, "va sent its update for the final evaluation"),
        ("secure", {"client": "va", "said": "reveal"}, "va helped to unmask the sum of the final evaluation"),
    ],
)
def test_what_follows_the_last_round_is_the_final_evaluation(kind: str, data: dict[str, Any], said: str) -> None:
    e = EventView(id=1, at=NOW, run="r", kind=kind, data={"round": 26, **data})
    assert words.event(e, {"r": 25})[0] == said
    assert "26" in words.event(e, {"r": 26})[0] and "26" in words.event(e)[0]


def test_an_epsilon_in_the_log_names_its_accountant_as_elsewhere() -> None:
    said, _ = event("privacy", value=39.83, delta=1e-5, unit="client", accountant="rdp")
    assert said == "Privacy spent: epsilon 39.83 at delta 1e-05, client-level, by RDP"


def test_a_cohort_is_counted_and_not_listed() -> None:
    said, _ = event("phase", round=1, attempt=1, state="keys", cohort=["a", "b", "c"])
    assert said == "Round 1: 3 clients chosen, exchanging keys"


def test_every_phase_has_a_sentence() -> None:
    for state in [*(key for key, _, _ in words.SECURE), "committed", "failed"]:
        said, _ = event("phase", round=1, attempt=1, state=state, cohort=["a"], reason="two left")
        assert said.startswith("Round 1")


def test_an_unknown_event_is_shown_as_it_is() -> None:
    assert event("weather", to="rain", p=0.12345) == ("weather: to rain, p 0.1235", "mute")


def test_an_event_that_lacks_a_word_is_shown_as_it_is() -> None:
    assert event("client", client="va", state="active") == ("client: client va, state active", "ok")


def test_braces_in_an_events_data_are_only_text() -> None:
    said, _ = event("client", client="{by.__class__}", state="revoked", by="ada")
    assert said == "{by.__class__} revoked by ada"


def test_a_long_value_is_cut() -> None:
    said, _ = event("run", state="failed", reason="x" * 5000)
    assert len(said) < 200


def test_a_version_of_which_many_values_were_cut_says_so() -> None:
    facts = {"version": 3, "contributors": 4, "sha256": "ab"}
    assert event("model", **facts, clipped=0.001)[0] == "Version 3 made from 4 clients"
    said, tone = event("model", **facts, clipped=0.0234)
    assert said == "Version 3 made from 4 clients; 2.34% of their values were cut to secure.clip_value"
    assert tone == "warn"
