"""How a run is followed to its end, and how runs and versions read on a terminal."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from rich.console import Console

from murmur import client as client_module
from murmur.client import Client
from murmur.protocol.errors import NotFound, Unavailable
from murmur.protocol.recipe import Recipe
from murmur.protocol.registry import AliasView
from murmur.protocol.views import (
    LATE,
    AssignmentView,
    EventView,
    Missing,
    PrivacyView,
    RoundView,
    RunDetail,
    RunView,
    SimulationView,
    VersionView,
    WorldRound,
)

with warnings.catch_warnings():  # typer asks a newer click for a name that it deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from murmur import runs, watching

AT = datetime(2026, 3, 2, 9, tzinfo=UTC)
FULL = "the disk is full: [2 GB] are needed"


def event(id: int, kind: str, **data: Any) -> EventView:
    return EventView(id=id, at=AT, run="r", kind=kind, data=data)


def view(state: str = "running", **values: Any) -> RunView:
    given = {"id": "r", "name": "r", "state": state, "recipe": Recipe(name="r", task="t"), "round": 1, "rounds": 2}
    return RunView.model_validate(given | {"version": 1, "created_at": AT, "finished_at": None} | values)


def version(n: int, run: str = "r", **values: Any) -> VersionView:
    given = {"run": run, "run_name": run, "n": n, "sha256": f"{n}{run}".ljust(64, "0"), "bytes": 10, "parent": None}
    return VersionView.model_validate(given | {"contributors": 0, "created_at": AT} | values)


class Scripted(Client):
    """A coordinator whose stream of events breaks off where an error stands in it."""

    def __init__(self, *script: EventView | Exception, versions: tuple[VersionView, ...] = ()) -> None:
        self.script, self.known = list(script), versions
        self.asked: list[int] = []
        self.listed: list[str | None] = []

    def _stream(self, run: str, after: int, until: float | None = None) -> Iterator[EventView]:
        self.asked.append(after)
        while self.script:
            said = self.script.pop(0)
            if isinstance(said, Exception):
                raise said
            yield said

    def runs(self) -> list[RunView]:
        return []

    def aliases(self, model: str | None = None) -> list[AliasView]:
        return []

    def versions(self, run: str | None = None) -> list[VersionView]:
        self.listed.append(run)
        return [v for v in self.known if run in (None, v.run)]


STORY = (
    event(1, "run", state="running", by="ada", name="r"),
    event(2, "phase", round=1, attempt=1, state="selecting"),
    event(3, "phase", round=1, attempt=1, state="selecting", reason="2 clients are online, 3 are needed"),
    event(4, "run", state="paused", by="ada", reason="paused by ada"),
    event(5, "run", state="running", by="bob"),
    event(6, "run", state="paused", by="coordinator", reason=FULL),
    event(7, "run", state="running", by="coordinator"),
    event(8, "client", client="va", state="dropped", round=1, attempt=1, reason="not heard for 60 s"),
    event(9, "phase", round=1, attempt=1, state="committed"),
    event(10, "phase", round=3, attempt=1, state="selecting", reason="2 clients are online, 3 are needed"),
    event(11, "phase", round=3, attempt=1, state="committed"),
    event(12, "run", state="finished"),
    event(13, "run", state="running", by="nobody"),
)


def test_a_pause_does_not_end_what_follows_a_run_and_its_end_does():
    assert [e.id for e in Scripted(*STORY).watch("r")] == list(range(1, 13))


@pytest.mark.parametrize("lost", [httpx.ReadError("reset"), Unavailable("recovering")])
def test_a_lost_stream_is_taken_up_again_where_it_broke_after_a_moment(
    monkeypatch: pytest.MonkeyPatch, lost: Exception
):
    waited: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    coordinator = Scripted(*STORY[:4], lost, lost, *STORY[4:])
    assert [e.id for e in coordinator.watch("r")] == list(range(1, 13))
    assert coordinator.asked == [0, 4, 4] and waited == [client_module.AGAIN_S] * 2


def test_pauses_and_waiting_are_told_in_lines():
    screen = Console(file=io.StringIO(), width=60, highlight=False)
    states = [state for _, state in watching.follow(Scripted(*STORY), RunDetail(run=view(), current=None), screen)]
    assert states[3:7] == ["paused", "running", "paused", "running"] and states[-1] == "finished"
    assert screen.file.getvalue().splitlines() == [
        "round 1 waits: 2 clients are online, 3 are needed",
        "paused by ada",
        "resumed by bob",
        f"paused: {FULL}",
        "resumed by the coordinator",
        "va: not heard for 60 s",
        "round 1 of 2 committed",
        "final evaluation waits: 2 clients are online, 3 are needed",
        "final evaluation done",
    ]


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("running", "", "running"),
        ("paused", "paused by ada", "paused by ada"),
        ("paused", FULL, f"paused: {FULL}"),
        ("stopped", "stopped by ada", "stopped by ada"),
        ("failed", "2 clients left", "failed: 2 clients left"),
    ],
)
def test_a_state_is_told_with_its_reason(state: str, reason: str, said: str):
    assert watching.standing(view(state, reason=reason)) == said


def test_a_version_is_shown_with_who_is_in_it_and_who_is_missing(capsys: pytest.CaptureFixture[str]):
    missing = (Missing(client="va", reason="not heard for 60 s"),)
    runs.show_version(version(2, contributors=2, who=("bay", "st-mary"), missing=missing, metrics={"loss": 0.25}))
    said = capsys.readouterr().out
    assert "r@2  10 bytes, loss 0.25, made 2026-03-02 09:00:00 UTC" in said
    assert "version 2 is made from 2 of 3 clients: bay, st-mary" in said
    assert said.splitlines()[-1].split(maxsplit=1) == ["va", "not heard for 60 s"]


def test_a_whole_cohort_has_no_table_of_the_missing(capsys: pytest.CaptureFixture[str]):
    runs.show_contributors(version(1, contributors=1, who=("bay",)))
    runs.show_contributors(version(0))
    assert capsys.readouterr().out == (
        "version 1 is made from 1 of 1 clients: bay\nversion 0 is what the run started from: no client is in it\n"
    )


def test_a_version_is_found_by_run_number_and_hash_with_who_is_in_it():
    coordinator = Scripted(versions=(version(1), version(0), version(7, "other")))
    assert runs.find_version(coordinator, "r@0").n == 0
    assert runs.find_version(coordinator, "r").n == 1
    assert coordinator.listed == ["r", "r"]  # of one run, so that names come with it
    assert runs.find_version(coordinator, "7other00").run == "other"
    assert coordinator.listed[-1] == "other"
    for unknown in ("r@9", "nobody", "nobody@1", "7other", "r@production"):
        with pytest.raises(NotFound):
            runs.find_version(coordinator, unknown)


def test_a_private_run_is_shown_with_all_that_its_epsilon_rests_on(capsys: pytest.CaptureFixture[str]):
    spent = PrivacyView(
        value=4.3771,
        delta=1e-5,
        unit="client",
        accountant="pld",
        assumptions=("the coordinator is trusted", "[nothing] else"),
        budget=5.0,
        spent=3,
        meaning="Client-level: little is learned.",
    )
    runs.show(RunDetail(run=view(privacy=spent), current=None), version(0))
    said = capsys.readouterr().out
    assert "epsilon 4.38 at delta 1e-05, client-level, by PLD, budget 5, spent by 3 sums" in said
    assert "Client-level: little is learned." in said
    assert "assumed: the coordinator is trusted; [nothing] else" in said
    runs.show(RunDetail(run=view(), current=None), version(0))
    assert "epsilon" not in capsys.readouterr().out


def test_a_simulated_run_says_so_with_its_world_s_clock_and_how_it_goes_on(capsys: pytest.CaptureFixture[str]):
    why = "interrupted (its process was killed): murmur simulate --resume r goes on"
    virtual = SimulationView(clients=3, backend="vectorized", secure="off")
    run = view("paused", reason=why, paused_by="ada", simulation=virtual)
    late = AssignmentView(client="bay", state="dropped", reason=LATE)
    lost = AssignmentView(client="va", state="dropped", reason="it left in the midst of its work")
    lived = WorldRound(begins_s=0, ends_s=90, down_bytes=3000, up_bytes=1000)
    given = {"n": 1, "kind": "train", "attempt": 1, "state": "committed", "opened_at": AT, "closed_at": AT}
    done = RoundView.model_validate(given | {"assignments": (late, lost), "world": lived})
    runs.show(RunDetail(run=run, current=None, rounds=(done,)), version(0))
    said = capsys.readouterr().out
    assert f"r  fedavg, masked, simulated, round 1 of 2, {why}" in said
    assert "simulated: 3 virtual clients, vectorized" in said
    assert "1 min 30 s in the world, 3.0 kB to the clients, 1.0 kB from them" in said
    row = runs._of_world(done)  # pyright: ignore[reportPrivateUsage]: the table itself breaks where a terminal is narrow
    assert row == ("1 min 30 s", "1 min 30 s", 1, 1)


def detail_of(**values: Any) -> RunDetail:
    points = [{"version": n, "name": "accuracy", "value": v, "count": 10} for n, v in enumerate((0.5, 0.75, 1.0))]
    parts = [
        {"client": "bay", "state": "working", "phase": "training", "step": 3, "steps": 12},
        {"client": "[va]", "state": "dropped", "reason": "not heard for 60 s"},
    ]
    current = {"n": 2, "kind": "train", "attempt": 1, "state": "collecting", "opened_at": AT, "closed_at": None}
    run = view(**{"round": 1, "rounds": 4} | values)
    return RunDetail.model_validate({"run": run, "current": current | {"assignments": parts}, "metrics": points})


def shown(detail: RunDetail) -> list[str]:
    screen = Console(file=io.StringIO(), width=100, highlight=False)
    screen.print(watching.board(detail, AT + timedelta(seconds=20)))
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


def test_the_board_shows_rounds_time_left_metric_and_each_client():
    lines = shown(detail_of())
    assert lines[0] == "r  fedavg, masked, running"
    assert "1 of 4 rounds" in lines[1] and "about 0:01:00 left" in lines[1]  # 20 s a round, three are left
    assert lines[2] == "accuracy 1  ▁▅█"  # 0.75 lies at 3.5 of 7: half to even
    assert lines[3].startswith("bay") and "Training, 3 of 12" in lines[3]
    assert lines[4].startswith("[va]") and "Dropped out" in lines[4]
    over = shown(detail_of(state="finished", round=4))
    assert len(over) == 3 and "left" not in over[1]


def test_following_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(client_module.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(client_module.time, "sleep", lambda _: None)
    seen: list[int] = []
    with pytest.raises(TimeoutError, match="has not ended after 3 s"):
        for event in Scripted(*STORY).watch("r", timeout_s=3):
            seen.append(event.id)
    assert seen == [1, 2, 3]
