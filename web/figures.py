"""What the run page works out from a run's views: steps, counts, remaining time, charts. Pure functions, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from ..protocol.views import AssignmentView, RoundView, RunDetail
from . import refusals, svg, words
from .language import _, many
from .reasons import told

STRIP_CELLS = 120  # of more rounds, neighbours share a cell
TABLE_CLIENTS = 40  # rows of the cohort's table; the rest is counted below it
SENT = ("uploaded", "counted")
FIRST = {"accuracy": 0, "loss": 1}  # where metrics of these names stand; others follow in the recipe's order


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A phase of the round; `state` is done, now or todo."""

    key: str
    word: str
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortCount:
    """The clients of an attempt: asked, still taking part, sent, lost; and how many the sum needs (0: groups tell)."""

    asked: int
    left: int
    sent: int
    lost: int
    needed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A metric with its newest value, its change over the last version, and its line."""

    name: str
    newest: float
    change: float | None
    version: int
    picture: Markup
    ink: str


def steps(round: RoundView | None, *, secure: bool) -> list[Step]:
    """The phases of a round with the current one marked; all are still to come while there is no round."""
    table = words.SECURE if secure else words.PLAIN
    state = round.state if round else ""
    evaluate = bool(round and round.kind == "evaluate")
    order = [row[0] for row in table]
    at = len(order) if state == "committed" else order.index(state) if state in order else -1
    found: list[Step] = []
    for i, key in enumerate(order):
        now, done = words.phase(key, secure=secure, evaluate=evaluate) or (key, key)
        place = "done" if i < at else "now" if i == at else "todo"
        found.append(Step(key=key, word=now if place == "now" else done, state=place))
    return found


def position(detail: RunDetail) -> tuple[str, str]:
    """Where a run stands, in two pieces: "Round 18", "of 25"; or "Final evaluation", "after 25 rounds"."""
    run, current = detail.run, detail.current
    if run.over:
        return many(run.round, "round"), _("of {n}", n=run.rounds)
    if current and current.kind == "evaluate":
        return _("Final evaluation"), _("after {rounds}", rounds=many(run.round, "round"))
    return _("Round {n}", n=min(run.round + 1, run.rounds)), _("of {n}", n=run.rounds)


def cohort(round: RoundView) -> CohortCount:
    lost = sum(a.lost for a in round.assignments)
    return CohortCount(
        asked=len(round.assignments),
        left=len(round.assignments) - lost,
        sent=sum(a.state in SENT for a in round.assignments),
        lost=lost,
        needed=0 if round.groups else round.threshold,
    )


def groups(round: RoundView) -> list[tuple[str, str]]:
    """Each group's size, or why it was dropped, with a tone; nothing where the cohort is one sum."""
    found: list[tuple[str, str]] = []
    for g in round.groups:
        if g.left == g.clients:
            found.append((_("Group {n}: {said}", n=g.n, said=many(g.clients, "client")), "mute"))
        elif g.left:
            said = _("{n} of {clients}", n=g.left, clients=many(g.clients, "client"))
            found.append((_("Group {n}: {said}", n=g.n, said=said), "warn"))
        else:
            found.append((_("Group {n}: {said}", n=g.n, said=told(g.reason) or _("lost")), "bad"))
    return found


def waits_for(round: RoundView | None) -> str:
    """Why a round's clients are not chosen yet; empty where they are, or where it is not known."""
    return told(round.reason) if round and round.state == "selecting" else ""


def absent(round: RoundView) -> list[str]:
    """Who was asked for a round and is not in it, with the reason, for a row of a table."""
    return refusals.absent((a.client, a.reason) for a in round.assignments if a.lost)


def standing(count: CohortCount, *, secure: bool) -> tuple[str, str]:
    """In a sentence with its tone, how far the attempt is from being given up."""
    if not count.asked:
        return _("The clients of this round are not chosen yet."), "mute"
    if not count.needed:
        return _("{clients} taking part.", clients=many(count.left, "client")), "mute"
    spare = count.left - count.needed
    clients = many(count.left, "client")
    end = _("this attempt is dropped and no update of it can be read") if secure else _("this attempt is tried again")
    if spare < 0:
        return _("{clients} left, {n} needed: {end}.", clients=clients, n=count.needed, end=end), "bad"
    if spare == 0:
        said = _("All {n} remaining clients are needed. If one more is lost, {end}.", n=count.left, end=end)
        return said, "warn"
    return _("{clients} taking part; the round can lose {n} more.", clients=clients, n=spare), "ok"


def shown_clients(round: RoundView) -> list[AssignmentView]:
    """The rows of the cohort's table: all by name, or of a large cohort those that need attention first."""
    if len(round.assignments) <= TABLE_CLIENTS:
        return sorted(round.assignments, key=lambda a: a.client)
    rank = {"failed": 0, "dropped": 0, "working": 1, "offered": 2, "uploaded": 3, "counted": 4}
    return sorted(round.assignments, key=lambda a: (rank[a.state], a.client))[:TABLE_CLIENTS]


def share(a: AssignmentView) -> float | None:
    """How much of its own work a client has done, 0 to 1; None where it cannot be told."""
    if a.state in SENT:
        return 1.0
    return min(a.step / a.steps, 1.0) if a.state == "working" and a.steps else None


def remaining_s(detail: RunDetail, now: datetime) -> float | None:
    """Seconds until the run's last round, from the pace of its last ten; None where it cannot be told.

    That is before two rounds are done, while the run is paused, and while it waits for clients.
    """
    run = detail.run
    done = [r for r in detail.rounds if r.kind == "train" and r.state == "committed" and r.closed_at][-11:]
    if run.state != "running" or waits_for(detail.current) or len(done) < 2:
        return None
    first, last = done[0].closed_at, done[-1].closed_at
    assert first is not None and last is not None
    pace_s = (last - first).total_seconds() / (len(done) - 1)
    since_s = min((now - last).total_seconds(), pace_s)  # a round that takes longer does not move the end forward
    return max(0.0, pace_s * (run.rounds - run.round) - since_s)


def progress_strip(detail: RunDetail) -> Markup:
    """One cell per round of the run, done, failed, in progress or to come."""
    run = detail.run
    failed = {r.n for r in detail.rounds if r.kind == "train" and r.state == "failed"}
    going_on = detail.current and detail.current.state != "committed" and not run.over
    current = detail.current.n if detail.current and going_on else None
    cells: list[svg.Cell] = []
    count = min(run.rounds, STRIP_CELLS)
    for i in range(count):
        first, last = run.rounds * i // count + 1, run.rounds * (i + 1) // count
        held = range(first, last + 1)
        tone, said = "todo", _("to come")
        if current in held:
            tone, said = "now", _("paused") if run.state == "paused" else _("in progress")
        elif last <= run.round:
            tone, said = "ok", _("done")
        elif any(n in failed for n in held):
            tone, said = "bad", _("failed")
        name = _("Round {n}", n=first) if first == last else _("Rounds {first} to {last}", first=first, last=last)
        cells.append(svg.Cell(tone=tone, title=_("{name}: {said}", name=name, said=said)))
    return svg.strip(cells, label=_("{n} of {of} rounds done", n=run.round, of=run.rounds))


def charts(detail: RunDetail, *, log: bool = False) -> list[Chart]:
    """A chart for each metric that has values; accuracy and loss first. log: with logarithmic y axes."""
    by_name: dict[str, list[svg.Point]] = {}
    for m in detail.metrics:
        note = _(
            "Version {n}: {value} over {count:,.0f} examples", n=m.version, value=words.number(m.value), count=m.count
        )
        by_name.setdefault(m.name, []).append(svg.Point(x=m.version, y=m.value, note=note))
    wanted = list(detail.run.recipe.metrics)
    wanted += [n for n in by_name if n not in wanted]
    found: list[Chart] = []
    for name in sorted((n for n in wanted if n in by_name), key=lambda n: FIRST.get(n, 2)):
        points = sorted(by_name[name], key=lambda p: p.x)
        newest = points[-1]
        ink = {0: "a", 1: "b"}.get(FIRST.get(name, 2), "cd"[len(found) % 2])
        label = _(
            "{metric} by version: {first} at version {from_n:.0f}, {newest} at version {n:.0f}",
            metric=name,
            first=words.number(points[0].y),
            from_n=points[0].x,
            newest=words.number(newest.y),
            n=newest.x,
        )
        # a quarter of the axis is filled at least, so that a long run's first rounds can be seen
        end = min(detail.run.rounds, max(4 * newest.x, 8))
        picture = svg.line(
            [svg.Series(name=name, points=points, ink=ink)],
            label=label,
            x_range=(points[0].x, max(end, newest.x)),
            x_label=_("version"),
            log=log,
        )
        change = newest.y - points[-2].y if len(points) > 1 else None
        found.append(Chart(name=name, newest=newest.y, change=change, version=int(newest.x), picture=picture, ink=ink))
    return found


def main_metrics(names: Iterable[str]) -> list[str]:
    """The two metrics that stand in a table's columns."""
    return sorted(dict.fromkeys(names), key=lambda n: FIRST.get(n, 2))[:2]


def trend(detail: RunDetail, name: str) -> list[float]:
    """The values of one metric by version, for a sparkline."""
    return [m.value for m in sorted(detail.metrics, key=lambda m: m.version) if m.name == name]


def picture_of_sum(round: RoundView) -> Markup:
    """The cohort as lines that run into one sum; which lines are masked, which broke off, whether the sum is open."""
    opened = round.state in ("aggregating", "committed")
    state = {"failed": "lost", "dropped": "lost", "uploaded": "sent", "counted": "sent"}
    voices = [svg.Voice(name=a.client, state=state.get(a.state, "waiting")) for a in round.assignments]
    count = cohort(round)
    said = {"n": count.sent, "of": count.asked, "lost": count.lost}
    if opened:
        label = _("{n} of {of} masked updates received, {lost} clients lost, the sum is unmasked", **said)
    else:
        label = _("{n} of {of} masked updates received, {lost} clients lost, the sum is still masked", **said)
    return svg.confluence(voices, label=label, sum_state="open" if opened else "hidden")
