"""Signs of life, many in one transaction: they come from every client all the time, and each alone is worth little.

A sign tells two things apart. That it came at all: the client is not gone (`heard_at`). That it counts more bytes or
steps than the one before, or another phase: the client gets on (`progress_at`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, or_, select, update

from ...protocol.errors import MurmurError, NotFound
from ...protocol.messages import Progress
from .attempts import HELD, phases_with, refusal, same_attempt
from .database import Database, Transaction
from .tables import assignment, attempt, client, event
from .times import ONLINE_S

EVENT_S = 1.0  # the log hears at most so often that a run's clients get on: pages then read the rows


@dataclass(frozen=True, slots=True)
class Sign:
    """How far a client's assignment has come. fence: None where the agent does not say which of its holders it is."""

    client: str
    assignment: str
    fence: int | None
    said: Progress


@dataclass(frozen=True, slots=True)
class Seen:
    """A client asked for work. expected_s: how long it will now be silent if all is well."""

    client: str
    info: dict[str, Any]
    expected_s: float = 0.0


class Signs:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._told: dict[str, tuple[float, int]] = {}  # run -> when the log last heard of its progress, in which event

    def note(self, seen: Sequence[Seen], signs: Sequence[Sign]) -> list[MurmurError | None]:
        """Write them all; returns for each of `signs` why it was refused, or None."""
        with self._db.write() as t:
            if seen:
                _see(t, {s.client: s for s in seen})
            return self._get_on(t, signs) if signs else []

    def _get_on(self, t: Transaction, signs: Sequence[Sign]) -> list[MurmurError | None]:
        rows = {row.id: row for row in t.execute(_PARTS, {"ids": list({s.assignment for s in signs})})}
        refused: list[MurmurError | None] = []
        moved, turned, heard = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
        runs = set[str]()
        for sign in signs:
            row = rows.get(sign.assignment)
            refused.append(_refusal(row, sign))
            if row is None or refused[-1] is not None:
                continue
            counts = _counts(sign.said)
            if row.state == "uploaded":  # what it sent was counted when it was whole
                counts = (*counts[:3], row.bytes)
            key = {"_id": row.id, "_fence": row.fence, "_now": t.now}
            if counts == (row.phase, row.step, row.steps, row.bytes):
                heard.append(key)
                continue
            phase, step, steps, sent = counts
            gap_s = max(row.gap_s, t.now - row.progress_at)
            values = {**key, "_phase": phase, "_step": step, "_steps": steps, "_bytes": sent, "_gap_s": gap_s}
            if phase == row.phase:
                moved.append(values)
            else:
                turned.append({**values, "_phases": phases_with(row.phases, phase, t.now)})
            runs.add(row.run)
        if moved:
            t.execute(_MOVED, moved)
        if turned:
            t.execute(_TURNED, turned)
        if heard:
            t.execute(_HEARD, heard)
        for run in sorted(runs):
            self._tell(t, run)
        return refused

    def _tell(self, t: Transaction, run: str) -> None:
        """One event says that a run's clients get on; the next one takes its place, or it would fill the log."""
        told_at, last = self._told.get(run, (0.0, 0))
        if t.now - told_at < EVENT_S:
            return
        if last:
            t.execute(delete(event).where(event.c.id == last))
        t.append("progress", run)
        self._told[run] = (t.now, t.newest_event)


_PARTS = (
    select(
        *(assignment.c[name] for name in ("id", "run", "client", "state", "fence", "phase", "step", "steps", "bytes"))
    )
    .add_columns(assignment.c.progress_at, assignment.c.gap_s, assignment.c.reason, assignment.c.phases)
    .add_columns(attempt.c.closed_at)
    .join(attempt, same_attempt())
    .where(assignment.c.id.in_(bindparam("ids", expanding=True)))
)
_STILL = or_(*(assignment.c.state == state for state in HELD))  # SQLAlchemy has no IN for many parameter sets
_MINE = (assignment.c.id == bindparam("_id"), assignment.c.fence == bindparam("_fence"), _STILL)
_HEARD = update(assignment).where(*_MINE).values(heard_at=bindparam("_now"))
_MOVED = _HEARD.values(
    progress_at=bindparam("_now"),
    phase=bindparam("_phase"),
    step=bindparam("_step"),
    steps=bindparam("_steps"),
    bytes=bindparam("_bytes"),
    gap_s=bindparam("_gap_s"),
)
_TURNED = _MOVED.values(phases=bindparam("_phases"))  # begun another phase


def _counts(said: Progress) -> tuple[str, int, int, int]:
    """(phase, step, steps, bytes sent); bytes that come in are steps, for nothing leaves the building with them."""
    if said.phase == "downloading":
        return said.phase, said.bytes, said.steps, 0
    return said.phase, said.step, said.steps, said.bytes if said.phase == "uploading" else 0


def _refusal(row: Any, sign: Sign) -> MurmurError | None:
    if row is None or row.client != sign.client:
        return NotFound(f"no assignment {sign.assignment!r} of this client")
    return refusal(row._mapping, sign.fence)


def _see(t: Transaction, seen: dict[str, Seen]) -> None:
    rows = {row.id: row for row in t.execute(_BEFORE, {"names": list(seen)})}
    for name, row in rows.items():
        if (row.expected_at or 0.0) < t.now:
            t.append("client", client=name, online=True)
    until = [{"_id": name, "_now": t.now, "_expected_at": t.now + seen[name].expected_s + ONLINE_S} for name in rows]
    if until:
        t.execute(_SEEN, until)
    for name, row in rows.items():
        if seen[name].info and row.info != seen[name].info:
            t.execute(update(client).where(client.c.id == name).values(info=seen[name].info))


_BEFORE = select(client.c.id, client.c.expected_at, client.c.info).where(
    client.c.id.in_(bindparam("names", expanding=True))
)
_SEEN = (
    update(client)
    .where(client.c.id == bindparam("_id"))
    .values(seen_at=bindparam("_now"), expected_at=bindparam("_expected_at"))
)
