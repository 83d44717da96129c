"""An attempt at a round as its rows tell it, and what came out of it: what the rest of the coordinator reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sqlalchemy import RowMapping, and_, case, exists, or_, select, update

from ...protocol.errors import TooLate
from ...protocol.messages import AnswerKind
from ...protocol.recipe import Recipe
from ...protocol.sections import Dp
from ..rounds import State
from . import tables
from .database import Transaction
from .tables import assignment, attempt

HELD = ("offered", "working", "uploaded")  # assignments that may still come to something
MOST_PHASES = 32  # kept of an assignment: an agent that goes to and fro does not fill the row
SENT = "sent"  # the phase of an assignment whose update is here


class Key(NamedTuple):
    """One attempt."""

    run: str
    round: int
    attempt: int

    def assignment(self, client: str) -> str:
        return f"{self.run}.{self.round}.{self.attempt}.{client}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One client's part in an attempt, with what it has delivered."""

    id: str
    client: str
    state: str
    phase: str
    fence: int
    heard_at: float
    progress_at: float
    reason: str
    answers: Mapping[str, str]
    update: str | None
    weight: float | None
    metrics: Mapping[str, Any] | None
    group: int = 0

    @property
    def lost(self) -> bool:
        """Nothing more will come from this client in this attempt."""
        return self.state not in HELD or self.phase == "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An attempt as its rows tell it."""

    key: Key
    kind: str
    state: State
    threshold: int
    state_at: float
    recipe: Recipe
    dp: Dp
    base: str
    base_bytes: int
    optimizer: str | None
    parts: tuple[Part, ...]
    total_weight: int = 0
    """What the weights of a masked attempt may add up to; 0: only `max_weight` bounds each of them."""
    inline: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Updates that are no blobs, by their SHA-256; filled in when they are summed."""
    previous: str | None = None
    """SHA-256 of the manifest of the round before; filled in when they are summed."""

    @property
    def cohort(self) -> tuple[str, ...]:
        return tuple(p.client for p in self.parts)

    def part(self, client: str) -> Part:
        return next(p for p in self.parts if p.client == client)

    def groups(self) -> tuple[Attempt, ...]:
        """What is summed apart: each group that is still in it as an attempt of its own; without groups the whole."""
        if not self.recipe.secure.groups:
            return (self,)
        groups = (self.group(n) for n in sorted({p.group for p in self.parts}))
        return tuple(group for group in groups if any(p.update or not p.lost for p in group.parts))

    def group(self, n: int) -> Attempt:
        """The attempt as the members of group n see it, with their threshold; 0 is the whole."""
        mine = tuple(p for p in self.parts if p.group == n)
        return replace(self, parts=mine, threshold=self.recipe.mask_graph(len(mine)).threshold) if n else self

    def with_parts(self, parts: tuple[Part, ...]) -> Attempt:
        return replace(self, parts=parts)

    def answers(self, kind: AnswerKind) -> dict[str, str]:
        return {p.client: p.answers[kind] for p in self.parts if kind in p.answers}

    @property
    def uploaded(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if p.update)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came out of an attempt: a version (absent after an evaluation), metrics by version, and its manifest.

    left_out: groups that are not in it though their updates are there, with the reason. weight: of a masked round's
    updates together.
    """

    sha256: str | None
    bytes: int
    optimizer: str | None
    metrics: Mapping[int, Mapping[str, tuple[float, float]]]
    facts: Mapping[str, Any]
    manifest: str
    weight: int = 0
    left_out: Mapping[int, str] = field(default_factory=dict[int, str])
    clip_norm: float | None = None
    """Of the next round, where it is adaptive."""


def part_of_row(row: RowMapping, answers: Mapping[str, str]) -> Part:
    """A part; one that was dropped with its group has an update that counts for nothing."""
    return Part(
        id=row["id"],
        client=row["client"],
        state=row["state"],
        phase=row["phase"],
        fence=row["fence"],
        heard_at=row["heard_at"],
        progress_at=row["progress_at"],
        reason=row["reason"],
        answers=answers,
        update=row["sha256"] if row["state"] != "dropped" else None,
        weight=row["weight"],
        metrics=row["metrics"],
        group=row["group_n"],
    )


def phases_with(phases: Sequence[Any], phase: str, now: float) -> list[Any]:
    """When each phase of an assignment began, with this one if it is another than the last."""
    if (phases and phases[-1][0] == phase) or (len(phases) >= MOST_PHASES and phase != SENT):
        return list(phases)
    return [*phases, [phase, now]]


def refusal(row: RowMapping, fence: int | None) -> TooLate | None:
    """Why this holder may not write to an assignment any more; None where it may.

    row: of the assignment, with its attempt's `closed_at`. fence: None for a holder that does not say which it is.
    """
    if row["closed_at"] is not None or row["state"] not in HELD or row["phase"] == "lost":
        return TooLate(row["reason"] or "the round has ended")
    if fence not in (None, row["fence"]):
        return TooLate("this assignment was handed out again since; its newer holder goes on with it")
    return None


def drop_part(t: Transaction, key: Key, client: str, reason: str) -> None:
    """An uploader that goes missing stays `uploaded`, since its update counts; it is only waited for no longer."""
    mine = assignment.c.id == key.assignment(client)
    columns = (assignment.c.state, assignment.c.heard_at, assignment.c.progress_at, assignment.c.gap_s)
    row = t.execute(select(*columns).where(mine)).one()
    values: dict[str, Any] = {"phase": "lost"} if row.state == "uploaded" else {"state": "dropped", "phase": "lost"}
    if row.heard_at > row.progress_at:  # it lived and was slow: next time it is given longer
        values["gap_s"] = max(row.gap_s, t.now - row.progress_at)
    t.execute(update(assignment).where(mine).values(reason=reason, lost_at=t.now, **values))
    facts = {"client": client, "round": key.round, "attempt": key.attempt}
    t.append("client", key.run, state="dropped", reason=reason, **facts)


def drop_group(t: Transaction, key: Key, n: int, reason: str) -> None:
    """Drop a whole group, those who have uploaded too. Who was lost before keeps its own reason."""
    delivered = exists(select(tables.update.c.sha256).where(tables.update.c.assignment == assignment.c.id))
    mine = (*in_attempt(key), assignment.c.group_n == n, or_(assignment.c.state.in_(HELD), delivered))
    why = case((assignment.c.reason == "", reason), else_=assignment.c.reason)
    members = t.execute(select(assignment.c.client).where(*mine).order_by(assignment.c.client)).all()
    t.execute(update(assignment).where(*mine).values(state="dropped", phase="lost", reason=why))
    for (client,) in members:
        facts = {"client": client, "round": key.round, "attempt": key.attempt}
        t.append("client", key.run, state="dropped", reason=reason, **facts)


def unsummed() -> Any:
    """Blobs of the updates that are accepted and not in a version yet; small ones lie in their rows."""
    query = select(tables.update.c.sha256).join(assignment, assignment.c.id == tables.update.c.assignment)
    return query.join(attempt, same_attempt()).where(attempt.c.closed_at.is_(None), tables.update.c.data.is_(None))


def same_attempt() -> Any:
    return and_(
        attempt.c.run == assignment.c.run, attempt.c.round == assignment.c.round, attempt.c.n == assignment.c.attempt
    )


def in_attempt(key: Key) -> Any:
    return assignment.c.run == key.run, assignment.c.round == key.round, assignment.c.attempt == key.attempt
