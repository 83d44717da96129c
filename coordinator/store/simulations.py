"""Simulated runs: the rows of real ones, written by the process that simulates, and what it needs to go on with them.

The conductor leaves them alone. Each process that begins a run or goes on with it takes the run's next fence, and every
write of a process checks that its own is still the newest, so of two that simulate one run only the later writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, insert, select, update

from ...protocol.errors import Conflict, NotFound
from ...protocol.recipe import Recipe
from ..rounds import State
from .attempts import Key
from .database import Database, Transaction
from .privacy import Spent, spend
from .runs import end_run, start_run
from .tables import alias, attempt, metric, round_, run, version

Sums = Mapping[str, tuple[float, float]]  # by metric: a sum, and what it is a sum over


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A version: its model and, where the server keeps one, its optimizer's state, both blobs."""

    sha256: str
    bytes: int
    optimizer: str | None
    contributors: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """A simulated run as it stands. rounds: of each committed one, who was asked and what was kept of it, in order.

    clip_norm: the bound of the next round's updates, where it is adaptive.
    """

    fence: int
    recipe: Recipe
    about: dict[str, Any]
    newest: Made
    rounds: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
    clip_norm: float | None


class Simulations:
    def __init__(self, db: Database) -> None:
        self._db = db

    def start(self, run_id: str, recipe: Recipe, about: Mapping[str, Any], first: Made, *, by: str) -> int:
        """Record a run with its version 0 and open its first round; returns its fence."""
        with self._db.write() as t:
            start_run(t, run_id, recipe, sha256=first.sha256, size=first.bytes, by=by)
            t.execute(update(run).where(run.c.id == run_id).values(simulation=dict(about), fence=1))
            _open(t, run_id, 1, "train", None)
        return 1

    def go_on(self, run_id: str, *, by: str) -> Simulated:
        """Take over a run; raises NotFound, and Conflict for one that has ended or that is no simulation."""
        fits = (run.c.id == run_id, run.c.state == "running", run.c.simulation.is_not(None))
        with self._db.write() as t:
            row = t.execute(select(run.c.state, run.c.simulation).where(run.c.id == run_id)).first()
            if row is None:
                raise NotFound(f"no run {run_id!r}")
            if row.simulation is None:
                raise Conflict(f"{run_id} is a run of real clients: the coordinator goes on with it")
            values = {"fence": run.c.fence + 1, "held_by": None, "held_why": ""}
            if not t.execute(update(run).where(*fits).values(**values)).rowcount:
                raise Conflict(f"{run_id} is {row.state}: there is nothing to go on with")
            t.append("run", run_id, state="running", by=by)
        return self.find(run_id)

    def find(self, run_id: str) -> Simulated:
        """A simulated run as it stands; raises NotFound."""
        with self._db.read() as c:
            row = c.execute(select(run).where(run.c.id == run_id, run.c.simulation.is_not(None))).mappings().first()
            if row is None:
                raise NotFound(f"no simulated run {run_id!r}")
            newest = c.execute(
                select(version).where(version.c.run == run_id).order_by(version.c.n.desc()).limit(1)
            ).mappings().one()  # fmt: skip
            same = and_(version.c.run == round_.c.run, version.c.n == round_.c.n)
            done = select(version.c.contributors, round_.c.simulation).join(round_, same)
            rounds = c.execute(done.where(round_.c.run == run_id).order_by(round_.c.n)).all()
            bound = select(round_.c.clip_norm).where(round_.c.run == run_id, round_.c.n == newest["n"] + 1)
            clip_norm = c.scalar(bound)
        made = Made(**{name: newest[name] for name in ("sha256", "bytes", "optimizer", "contributors")})
        return Simulated(
            fence=row["fence"],
            recipe=Recipe.model_validate(row["recipe"]),
            about=row["simulation"],
            newest=made,
            rounds=tuple((tuple(who), kept) for who, kept in rounds),
            clip_norm=clip_norm,
        )

    def unfinished(self, command: str) -> list[tuple[str, int]]:
        """Runs of this command that have not ended, with the number of rounds that each has done; newest first."""
        query = select(run.c.id, run.c.simulation).where(run.c.state == "running", run.c.simulation.is_not(None))
        with self._db.read() as c:
            rows = c.execute(query.order_by(run.c.created_at.desc())).all()
            found = [name for name, about in rows if about.get("command") == command]
            newest = {name: c.scalar(_newest(name)) or 0 for name in found}
        return list(newest.items())

    def commit(
        self,
        key: Key,
        fence: int,
        made: Made,
        metrics: Mapping[int, Sums],
        kept: Mapping[str, Any],
        *,
        spent: Spent | None = None,
        clip_norm: float | None = None,
        facts: Mapping[str, Any],
    ) -> None:
        """Write a round's result and open the next one.

        metrics: by version. kept: what the next rounds need. Raises Conflict where the run was stopped, or another
        process goes on with it; nothing is written then.
        """
        with self._db.write() as t:
            recipe = _check(t, key.run, fence)
            _close(t, key, kept)
            parent = t.scalar(select(version.c.sha256).where(version.c.run == key.run, version.c.n == key.round - 1))
            row = {"run": key.run, "n": key.round, "sha256": made.sha256, "bytes": made.bytes, "parent": parent}
            row |= {"optimizer": made.optimizer, "contributors": list(made.contributors), "created_at": t.now}
            t.execute(insert(version).values(**row))
            _measured(t, key.run, metrics)
            if spent is not None:
                spend(t, key, spent)
            said = {"version": key.round, "sha256": made.sha256, "contributors": len(made.contributors)}
            t.append("model", key.run, **said, **facts)
            kind = "train" if key.round < recipe.rounds else "evaluate"
            _open(t, key.run, key.round + 1, kind, clip_norm)

    def finish(self, key: Key, fence: int, metrics: Sums, why: str = "") -> None:
        """Write what the final version measured, and end the run. why: before its last round."""
        with self._db.write() as t:
            _check(t, key.run, fence)
            _close(t, key, {}, kind="evaluate")
            _measured(t, key.run, {key.round - 1: metrics})
            end_run(t, key.run, "finished", why, by="simulation")

    def interrupt(self, run_id: str, fence: int, what: str, *, by: str) -> None:
        """Say that nobody simulates the run just now, after what; nothing where another process does."""
        why = f"interrupted ({what}): murmur simulate --resume {run_id} goes on"
        fits = (run.c.id == run_id, run.c.state == "running", run.c.fence == fence)
        with self._db.write() as t:
            if t.execute(update(run).where(*fits).values(held_by=by, held_why=why)).rowcount:
                t.append("run", run_id, state="paused", by=by, reason=why)

    def left(self, run_id: str) -> bool:
        """Note of a run whose process is gone that it was interrupted; whether it has ended, and nobody goes on."""
        query = select(run.c.state, run.c.fence, run.c.created_by, run.c.held_by)
        with self._db.read() as c:
            row = c.execute(query.where(run.c.id == run_id, run.c.simulation.is_not(None))).first()
        if row is not None and row.state == "running" and row.held_by is None:
            self.interrupt(run_id, row.fence, "its process was killed", by=row.created_by or "simulator")
        return row is not None and row.state != "running"

    def fail(self, run_id: str, fence: int, why: str) -> None:
        """End a run that can come no further; nothing where another process simulates it."""
        fits = (run.c.id == run_id, run.c.state == "running", run.c.fence == fence)
        with self._db.write() as t:
            if t.execute(update(run).where(*fits).values(state="failed")).rowcount:
                end_run(t, run_id, "failed", why, by="simulation")

    def named(self, blobs: Collection[str], run_id: str, n: int) -> set[str]:
        """Which of these blobs of a version are still needed: an alias points or pointed at it, or others name them."""
        others = ~and_(version.c.run == run_id, version.c.n == n)
        with self._db.read() as c:
            if c.scalar(select(alias.c.n).where(alias.c.run == run_id, alias.c.version == n).limit(1)) is not None:
                return set(blobs)
            found: set[str] = set()
            for column in (version.c.sha256, version.c.optimizer):
                found |= set(c.scalars(select(column).where(column.in_(blobs), others)))
        return found


def _newest(run_id: str) -> Any:
    return select(version.c.n).where(version.c.run == run_id).order_by(version.c.n.desc()).limit(1)


def _check(t: Transaction, run_id: str, fence: int) -> Recipe:
    """The recipe of a run that this process still simulates; its row is locked until the transaction ends."""
    fits = (run.c.id == run_id, run.c.state == "running", run.c.fence == fence)
    if t.execute(update(run).where(*fits).values(fence=fence)).rowcount:
        return Recipe.model_validate(t.scalar(select(run.c.recipe).where(run.c.id == run_id)))
    row = t.execute(select(run.c.state, run.c.reason).where(run.c.id == run_id)).one()
    if row.state != "running":
        raise Conflict(f"{run_id} was ended meanwhile: {row.reason or row.state}")
    raise Conflict(f"another process goes on with {run_id}; this one has written nothing since")


def _open(t: Transaction, run_id: str, n: int, kind: str, clip_norm: float | None) -> None:
    t.execute(insert(round_).values(run=run_id, n=n, kind=kind, attempt=1, opened_at=t.now, clip_norm=clip_norm))
    opened = {"run": run_id, "round": n, "n": 1, "opened_at": t.now, "state_at": t.now}
    t.execute(insert(attempt).values(**opened, state=State.COLLECTING))
    t.append("phase", run_id, round=n, attempt=1, state=State.COLLECTING)


def _close(t: Transaction, key: Key, kept: Mapping[str, Any], **values: Any) -> None:
    mine = (attempt.c.run == key.run, attempt.c.round == key.round)
    ended = {"state": State.COMMITTED, "closed_at": t.now, "state_at": t.now}
    t.execute(update(attempt).where(*mine).values(**ended))
    fits = (round_.c.run == key.run, round_.c.n == key.round)
    t.execute(update(round_).where(*fits).values(closed_at=t.now, simulation=dict(kept), **values))
    t.append("phase", key.run, round=key.round, attempt=1, state=State.COMMITTED)


def _measured(t: Transaction, run_id: str, metrics: Mapping[int, Sums]) -> None:
    for n, sums in metrics.items():
        rows = [
            {"name": name, "value": total / count, "count": count} for name, (total, count) in sums.items() if count
        ]
        if rows:
            t.execute(insert(metric), [{"run": run_id, "version": n, **row} for row in rows])
