"""What clients have done so far: how many of their parts arrived, and how fast their updates came."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from sqlalchemy import case, func, or_, select

from ...protocol.views import LATE, Track
from .attempts import SENT
from .database import Database
from .tables import assignment, update

FRESH_S = 10.0  # pages ask at every event, and the answer changes once a round
MEASURED = 400  # of the newest updates
SLOW_S = 2.0  # a transfer below it is shorter than the time between two signs of life, and not measured


class Records:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._found: tuple[float, dict[str, Track]] = (-FRESH_S, {})

    def all(self) -> dict[str, Track]:
        """By client, as it was a few seconds ago; who was never asked is not in it."""
        if time.monotonic() - self._found[0] > FRESH_S:
            self._found = (time.monotonic(), self._read())
        return self._found[1]

    def _read(self) -> dict[str, Track]:
        done = case((assignment.c.state.in_(("uploaded", "counted")), 1), else_=0)
        lost = case((assignment.c.state.in_(("failed", "dropped")), 1), else_=0)
        on_time = or_(assignment.c.state != "dropped", assignment.c.reason != LATE)  # late is no failure
        counts = select(assignment.c.client, func.sum(done), func.sum(lost)).where(on_time)
        newest = select(assignment.c.client, assignment.c.phases, update.c.bytes)
        newest = newest.join(update, update.c.assignment == assignment.c.id).order_by(update.c.received_at.desc())
        speeds: dict[str, list[float]] = {}
        with self._db.read() as c:
            for name, phases, size in c.execute(newest.limit(MEASURED)):
                if speed := _speed(phases, size):
                    speeds.setdefault(name, []).append(speed)
            rows = c.execute(counts.group_by(assignment.c.client)).all()
        return {
            name: Track(done=int(done), lost=int(lost), upload_bytes_s=median(speeds[name]) if name in speeds else None)
            for name, done, lost in rows
        }


def _speed(phases: list[tuple[str, float]], size: int) -> float | None:
    """Bytes per second of an upload, from when the client said that it began; None where that is too short to tell."""
    at: dict[str, Any] = dict(phases)
    if SENT not in at or "uploading" not in at or at[SENT] - at["uploading"] < SLOW_S:
        return None
    return size / (at[SENT] - at["uploading"])
