"""What each client of a round did when: the rows of its timeline, who is behind the others, and who left and why."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from markupsafe import Markup

from ..protocol.views import AssignmentView, RoundView
from . import figures, gantt, words
from .gantt import Mark, Span
from .language import _
from .refusals import in_words

QUIET = 1 / 3  # of the patience: who is silent for longer is drawn so, with its deadline
BEHIND = 1.5  # times the median of those who have sent
DOING = {
    "waiting": "Waiting",
    "downloading": "Downloading the model",
    "training": "Training",
    "uploading": "Sending its update",
    "silent": "Not heard",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A client with its status in words, a tone, more to say beneath it, and its bar."""

    part: AssignmentView
    said: tuple[str, str]
    why: str
    bar: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    rows: list[Row]
    scale: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clock:
    """Seconds since the cohort was asked, and where the round stands now or ended."""

    begin: datetime
    now: float
    open: bool

    def s(self, at: datetime) -> float:
        return max((at - self.begin).total_seconds(), 0.0)


def timeline(round: RoundView, now: datetime, *, patience_s: float, secure: bool) -> Timeline:
    """The rows of a round's timeline, at most `figures.TABLE_CLIENTS`.

    patience_s: how long a client may be silent before it is dropped. Its deadline is drawn once it is quiet.
    """
    shown = figures.shown_clients(round)
    begin = min((a.started_at for a in round.assignments if a.started_at), default=round.opened_at)
    end = round.closed_at or now
    if round.world:
        end = round.opened_at + timedelta(seconds=round.world.seconds)
    clock = _Clock(begin=begin, now=max((end - begin).total_seconds(), 0.0), open=round.closed_at is None)
    typical = _typical(round, clock)
    drawn = [_row(a, clock, patience_s) for a in shown]
    until = max([0.1, clock.now, *(row[2] for row in drawn)])
    rows: list[Row] = []
    for a, (spans, marks, _until) in zip(shown, drawn, strict=True):
        said, why = _standing(a, clock, typical, patience_s, secure=secure)
        told = ", ".join(dict.fromkeys(s.title for s in spans)) or _("nothing heard yet")
        label = _("{client}: {told}. {said}", client=a.client, told=told, said=said[0])
        rows.append(Row(part=a, said=said, why=why, bar=gantt.bar(spans, marks, end=until, label=label)))
    return Timeline(rows=rows, scale=gantt.scale(end=until))


def _typical(round: RoundView, clock: _Clock) -> float | None:
    """Seconds in which the middle one of those who have sent was done; None before half of the cohort has."""
    sent = [clock.s(at) for a in round.assignments if (at := _sent_at(a))]
    return median(sent) if sent and 2 * len(sent) >= len(round.assignments) else None


def _sent_at(a: AssignmentView) -> datetime | None:
    return next((p.at for p in a.phases if p.name == "sent"), None)


def _row(a: AssignmentView, clock: _Clock, patience_s: float) -> tuple[list[Span], list[Mark], float]:
    """A client's bars and marks, and up to which second the axis must reach for them."""
    spans: list[Span] = []
    until, gone = clock.now, clock.s(a.lost_at) if a.lost_at else None
    if a.state == "failed" and a.updated_at:
        gone = clock.s(a.updated_at)
    last = _heard(a, clock) if a.state in ("dropped", "working") else None
    for i, phase in enumerate(a.phases):
        if phase.name == "sent":
            break
        since = clock.s(phase.at)
        after = clock.s(a.phases[i + 1].at) if i + 1 < len(a.phases) else None
        stop = after if after is not None else min(until, gone if gone is not None else until)
        if after is None and last is not None and stop - last > patience_s * QUIET:
            spans += [_span(phase.name, since, max(last, since)), _span("silent", max(last, since), stop)]
        else:
            spans.append(_span(phase.name, since, stop))
    if not a.phases and a.state in ("offered", "dropped"):
        spans.append(_span("silent", 0.0, gone if gone is not None else until))
    marks: list[Mark] = []
    reach = 0.0
    if (at := _sent_at(a)) is not None:
        marks.append(
            Mark(kind="sent", at=clock.s(at), title=_("Update received after {span}", span=words.took(clock.s(at))))
        )
    if a.late:
        marks.append(Mark(kind="late", at=clock.now, title=_("The round had closed")))
    elif a.lost:
        at_s = gone if gone is not None else clock.now
        said = _("{said} after {span}", said=words.ASSIGNMENT[a.state][0], span=words.took(at_s))
        marks.append(Mark(kind="lost", at=at_s, title=said))
    if clock.open and a.state in ("offered", "working"):
        rest = _rest(a, clock)
        if rest is not None:
            said = _("about {span} more", span=words.span(rest - clock.now))
            spans.append(Span(kind="rest", since=clock.now, until=rest, title=said))
            reach = rest
        deadline = _heard(a, clock) + patience_s
        if clock.now - _heard(a, clock) > patience_s * QUIET:
            marks.append(Mark(kind="deadline", at=deadline, title=_("Dropped unless it is heard until then")))
            reach = max(reach, deadline * 1.01)
    return spans, marks, reach


def _span(kind: str, since: float, until: float) -> Span:
    word = _(DOING[kind]) if kind in DOING else kind.capitalize()
    title = _("{doing} for {span}", doing=word, span=words.took(until - since))
    return Span(kind=kind, since=since, until=until, title=title)


def _heard(a: AssignmentView, clock: _Clock) -> float:
    last = max((at for at in (a.heard_at, a.updated_at, a.started_at) if at), default=clock.begin)
    return clock.s(last)


def _rest(a: AssignmentView, clock: _Clock) -> float | None:
    """When a training will be done at its pace so far; None before it has a pace."""
    began = next((p.at for p in reversed(a.phases) if p.name == "training"), None)
    if a.phase != "training" or began is None or not 0 < a.step < a.steps or not a.updated_at:
        return None
    spent = (a.updated_at - began).total_seconds()
    end = clock.s(began) + spent * a.steps / a.step
    return end if spent > 0 and clock.now < end < 10 * max(clock.now, 1.0) else None


def _standing(
    a: AssignmentView, clock: _Clock, typical: float | None, patience_s: float, *, secure: bool
) -> tuple[tuple[str, str], str]:
    """A client's status with its tone, and what else is to be said of it."""
    said, why = words.assignment(a, secure=secure), in_words(a.reason) if a.reason and not a.late else ""
    if a.late:
        return said, _("Its work is whole; it is asked again in later rounds.")
    if not clock.open or a.state not in ("offered", "working"):
        return said, why
    silent_s = clock.now - _heard(a, clock)
    if silent_s > patience_s * QUIET:
        left = max(patience_s - silent_s, 0)
        silent = _("Silent for {span}", span=words.span(silent_s))
        return (silent, "warn"), _("Dropped in {span} unless it is heard.", span=words.span(left))
    if typical is not None and clock.now > BEHIND * typical:
        return (said[0], "warn"), _("Behind the others, who took {span}.", span=words.took(typical))
    return said, why
