"""What somebody should look at, worked out from the runs, the clients and the newest events; the last first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ..protocol.views import LATE, ClientView, EventView, RunDetail, RunView
from . import refusals, words
from .language import _

MOST = 8
BUDGET = 0.8  # of the epsilon that a run may spend
LOST = 1 / 3  # of a round's clients


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One thing, with its tone (warn or bad), the run that it is about, and since when where that is known."""

    said: str
    tone: str
    run: RunView | None = None
    at: datetime | None = None


def alerts(
    running: Sequence[RunDetail], runs: Sequence[RunView], clients: Iterable[ClientView], events: Sequence[EventView]
) -> list[Alert]:
    """At most `MOST`: what lasts comes first, then what has happened. events: the newest last."""
    offline = {c.id: c for c in clients if c.state == "active" and not c.online}
    found = [alert for detail in running for alert in _standing(detail, offline)]
    by_id = {r.id: r for r in runs}
    return [*found, *_happened(events, by_id)][:MOST]


def _standing(detail: RunDetail, offline: dict[str, ClientView]) -> Iterable[Alert]:
    """What is the matter with a run as long as it is."""
    run, current = detail.run, detail.current
    if run.paused_by == "":  # by the coordinator itself: a full disk, or the like
        yield Alert(said=words.first_sentence(words.reason_of(run)), tone="bad", run=run)
    for name, value in run.latest.items():
        if not math.isfinite(value):
            said = _("{metric} of version {n} is not a number", metric=words.metric(name), n=run.version)
            yield Alert(said=said, tone="bad", run=run)
    spent = run.privacy
    if spent and spent.budget and spent.value is not None and spent.value >= BUDGET * spent.budget:
        said = _(
            "{share:.0%} of the privacy budget is spent: epsilon {value:.3g} of {budget:g}",
            share=spent.value / spent.budget,
            value=spent.value,
            budget=spent.budget,
        )
        yield Alert(said=said, tone="warn", run=run)
    if current is None:
        return
    here = words.in_round(current.n, final=current.kind == "evaluate")
    gone = [a.client for a in current.assignments if a.state in ("offered", "working") and a.client in offline]
    for name in gone[:3]:
        yield Alert(
            said=_("{client} is offline in the middle of {round}", client=name, round=here),
            tone="bad",
            run=run,
            at=offline[name].seen_at,
        )
    lost = [a.client for a in current.assignments if a.lost and not a.late]
    if lost and len(lost) > LOST * len(current.assignments):
        said = _(
            "{lost} of {asked} clients have dropped out of {round}",
            lost=len(lost),
            asked=len(current.assignments),
            round=here,
        )
        yield Alert(said=said, tone="warn", run=run)


def _happened(events: Sequence[EventView], runs: dict[str, RunView]) -> Iterable[Alert]:
    """Failed runs and attempts, and clients that were lost, the last first."""
    planned = {id: r.rounds for id, r in runs.items()}
    alike: dict[object, list[EventView]] = {}  # clients of one round that were lost for one reason are one alert
    for e in reversed(events):
        state = e.data.get("state")
        failed = e.kind in ("run", "phase") and state == "failed"
        lost = e.kind == "client" and state in ("failed", "dropped") and e.data.get("reason") != LATE
        if failed or lost:
            facts = (e.run, state, *(e.data.get(name) for name in ("round", "attempt", "reason")))
            alike.setdefault(facts if lost else e.id, []).append(e)
    for last, *more in alike.values():
        names = refusals.names([e.data["client"] for e in reversed((last, *more))]) if more else ""
        told = last.model_copy(update={"data": last.data | {"client": names}}) if more else last
        tone = "warn" if last.kind == "client" else "bad"
        yield Alert(said=words.event(told, planned)[0], tone=tone, run=runs.get(last.run or ""), at=last.at)
