"""The facts of rounds as the conductor moves them: who was asked, who is waited for, what came out.

Every write here is compare-and-set on the state it needs, so two that race cannot both be right: the loser gets False
and has changed nothing. Several coordinators on one database have one conductor: each write checks its lease.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, case, func, insert, select, update

from ...privacy.manifest import digest_of
from ...protocol.errors import NotFound
from ...protocol.recipe import Recipe
from ...protocol.views import LATE
from ..rounds import State
from . import tables
from .attempts import HELD, Attempt, Key, Outcome, drop_group, drop_part, in_attempt, part_of_row, unsummed
from .database import Database, Transaction
from .leases import Lease
from .privacy import Spent, spend
from .runs import end_run, open_attempt, open_round
from .tables import answer, assignment, attempt, manifest, round_, run, version

RECIPES = 64  # kept at a time
REMEMBERED = 10  # assignments of a client from which its pace is known


class Waiting(NamedTuple):
    """Whom a collecting attempt waits for, in numbers."""

    missing: int
    uploaded: int
    heard_at: float  # the longest silent of the missing
    progress_at: float  # the one of them that came no further for longest


class Rounds:
    def __init__(self, db: Database, lease: Lease) -> None:
        self._db, self._lease = db, lease
        self._recipes: dict[str, Recipe] = {}  # a run's never changes, and checking one takes longer than a query

    @contextmanager
    def _write(self) -> Generator[Transaction]:
        """A transaction of the conductor; raises LeaseLost where another process has taken over."""
        with self._db.write() as t:
            self._lease.check(t)
            yield t

    def open(self) -> list[Key]:
        """Every attempt that has not ended and whose run is neither paused nor simulated, oldest first."""
        query = select(attempt.c.run, attempt.c.round, attempt.c.n).join(run, run.c.id == attempt.c.run)
        query = query.where(attempt.c.closed_at.is_(None), run.c.held_by.is_(None), run.c.simulation.is_(None))
        with self._db.read() as c:
            return [Key(*row) for row in c.execute(query.order_by(attempt.c.opened_at))]

    def resume(self) -> None:
        """Count every deadline from now on: nobody could make progress while the coordinator was away."""
        with self._db.write() as t:
            t.execute(update(attempt).where(attempt.c.closed_at.is_(None)).values(state_at=t.now))
            for column in (assignment.c.heard_at, assignment.c.progress_at):  # the clock may have been set back
                t.execute(update(assignment).where(column > t.now).values({column: t.now}))

    def named_blobs(self) -> set[str]:
        """SHA-256 of every blob that a version or an update that still counts needs."""
        with self._db.read() as c:
            found = {*c.scalars(select(version.c.sha256)), *c.scalars(unsummed())}
            return found | set(c.scalars(select(version.c.optimizer).where(version.c.optimizer.is_not(None))))

    def load(self, key: Key) -> Attempt:
        """An attempt with everything that was delivered; its parts are sorted by client."""
        mine = in_attempt(key)
        delivered = select(assignment, tables.update.c.sha256, tables.update.c.weight, tables.update.c.metrics)
        delivered = delivered.outerjoin(tables.update, tables.update.c.assignment == assignment.c.id)
        said = select(answer).join(assignment, assignment.c.id == answer.c.assignment).where(*mine)
        with self._db.read() as c:
            found = self.head(c, key)
            parts = c.execute(delivered.where(*mine).order_by(assignment.c.client)).mappings().all()
            answers: dict[str, dict[str, str]] = {}
            if found.threshold:
                for a in c.execute(said).mappings():
                    answers.setdefault(a["assignment"], {})[a["kind"]] = a["body"]
        return found.with_parts(tuple(part_of_row(p, answers.get(p["id"], {})) for p in parts))

    def head_of(self, key: Key) -> Attempt:
        with self._db.read() as c:
            return self.head(c, key)

    def head(self, c: Connection, key: Key) -> Attempt:
        """An attempt without its parts; raises NotFound."""
        row = c.execute(_HEAD, key._asdict()).first()
        if row is None:
            raise NotFound(f"no attempt {key}")
        recipe = self._recipe(key.run, row.recipe)
        return Attempt(
            key=key,
            kind=row.kind,
            state=State(row.state),
            threshold=row.threshold,
            state_at=row.state_at,
            recipe=recipe,
            dp=recipe.dp_of_round(row.clip_norm),
            base=row.sha256,
            base_bytes=row.bytes,
            optimizer=row.optimizer,
            parts=(),
            total_weight=row.total_weight,
        )

    def _recipe(self, run_id: str, values: Any) -> Recipe:
        if run_id not in self._recipes:
            if len(self._recipes) >= RECIPES:
                self._recipes.clear()
            self._recipes[run_id] = Recipe.model_validate(values)
        return self._recipes[run_id]

    def waiting(self, key: Key) -> Waiting:
        """Whom an attempt waits for while it collects: counted where the rows are, for they may be many."""
        due = and_(assignment.c.state.in_(("offered", "working")), assignment.c.phase != "lost")
        query = select(
            func.coalesce(func.sum(case((due, 1), else_=0)), 0),
            func.coalesce(func.sum(case((assignment.c.state == "uploaded", 1), else_=0)), 0),
            func.min(case((due, assignment.c.heard_at))),
            func.min(case((due, assignment.c.progress_at))),
        )
        with self._db.read() as c:
            missing, uploaded, heard_at, progress_at = c.execute(query.where(*in_attempt(key))).one()
        return Waiting(int(missing), int(uploaded), heard_at or 0.0, progress_at or 0.0)

    def gaps_s(self, client: str) -> list[float]:
        """The longest time without progress in each of this client's last assignments that are over, newest first."""
        over = (assignment.c.gap_s > 0, assignment.c.state.not_in(("offered", "working")))
        query = select(assignment.c.gap_s).where(assignment.c.client == client, *over)
        with self._db.read() as c:
            return list(c.scalars(query.order_by(assignment.c.offered_at.desc()).limit(REMEMBERED)))

    def explain(self, key: Key, why: str) -> None:
        """Say what an attempt waits for before it can begin."""
        with self._db.read() as c:
            if c.scalar(_only(select(attempt.c.reason), key)) == why:
                return
        with self._write() as t:
            if t.execute(
                _only(update(attempt).where(attempt.c.state == State.SELECTING).values(reason=why), key)
            ).rowcount:
                t.append("phase", key.run, round=key.round, attempt=key.attempt, state=State.SELECTING, reason=why)

    def groups_of(self, run_id: str) -> dict[str, int]:
        """The group of each client that was asked before in this run: it stays in it."""
        query = select(assignment.c.client, assignment.c.group_n).distinct()
        with self._db.read() as c:
            return {name: n for name, n in c.execute(query.where(assignment.c.run == run_id, assignment.c.group_n > 0))}

    def weighed(self, key: Key) -> tuple[int, list[str]]:
        """What the updates of the round before weighed together, and whose they were; (0, []) where nobody knows."""
        query = select(version.c.weight, version.c.contributors)
        with self._db.read() as c:
            row = c.execute(query.where(version.c.run == key.run, version.c.n == key.round - 1)).first()
        return (row.weight, row.contributors) if row else (0, [])

    def choose(self, key: Key, clients: Mapping[str, int], to: State, threshold: int, total_weight: int = 0) -> bool:
        """Fix the cohort of an attempt, each client with its group (0 without any), and offer each its part."""
        with self._write() as t:
            terms = {"threshold": threshold, "total_weight": total_weight}
            if not _move(t, key, State.SELECTING, to, reason="", **terms):
                return False
            rows: list[dict[str, Any]] = []
            for name, group in clients.items():
                row: dict[str, Any] = {"id": key.assignment(name), "client": name, "state": "offered", "group_n": group}
                row |= {"offered_at": t.now, "progress_at": t.now, "heard_at": t.now}
                rows.append(row | {"run": key.run, "round": key.round, "attempt": key.attempt})
            t.execute(insert(assignment), rows)
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=to, cohort=list(clients))
            return True

    def move(self, key: Key, before: State, after: State, spent: Spent | None = None) -> bool:
        """Bring an attempt into its next state, if it is still in `before`.

        spent: what this step makes irrevocable, noted with it in the privacy ledger.
        """
        with self._write() as t:
            if not _move(t, key, before, after):
                return False
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=after)
            if spent is not None:
                spend(t, key, spent)
            return True

    def drop(self, key: Key, clients: Collection[str], reason: str) -> None:
        """Wait no longer for these clients. What one of them has uploaded already still counts."""
        with self._write() as t:
            for name in clients:
                drop_part(t, key, name, reason)

    def drop_group(self, key: Key, n: int, reason: str) -> None:
        """Go on without a group: nothing of it is summed, whatever its members have delivered."""
        with self._write() as t:
            drop_group(t, key, n, reason)

    def fail(self, key: Key, before: State, reason: str, *, retry: bool) -> bool:
        """End an attempt without a result; open the next one, or fail the run."""
        with self._write() as t:
            if not _move(t, key, before, State.FAILED, reason=reason, closed_at=t.now):
                return False
            _forget_updates(t, key)
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=State.FAILED, reason=reason)
            if retry:
                open_attempt(t, key.run, key.round, key.attempt + 1)
            else:
                end_run(t, key.run, "failed", reason, by="coordinator")
            return True

    def to_sum(self, found: Attempt) -> Attempt:
        """An attempt with those of its updates that are no blobs, and with the manifest that its own will name."""
        table = tables.update
        query = select(table.c.sha256, table.c.data).join(assignment, assignment.c.id == table.c.assignment)
        with self._db.read() as c:
            rows = c.execute(query.where(*in_attempt(found.key), table.c.data.is_not(None)))
            inline = {sha256: data for sha256, data in rows}
            before = (manifest.c.run == found.key.run, manifest.c.round == found.key.round - 1)
            return replace(found, inline=inline, previous=c.scalar(select(manifest.c.sha256).where(*before)))

    def spent(self, key: Key) -> list[str]:
        """Blobs of a closed attempt's updates that nothing else names: single updates are not kept."""
        mine = select(tables.update.c.sha256).join(assignment, assignment.c.id == tables.update.c.assignment)
        mine = mine.where(*in_attempt(key))
        named = select(version.c.sha256)
        with self._db.read() as c:
            return list(c.scalars(mine.where(tables.update.c.sha256.not_in(named.union(unsummed())))))

    def publish(self, key: Key, base: str, included: Sequence[str], outcome: Outcome) -> bool:
        """Write a round's result and go on: version, metrics, manifest, and the next round or the end of the run."""
        with self._write() as t:
            if not _move(t, key, State.AGGREGATING, State.COMMITTED, closed_at=t.now):
                return False
            mine = in_attempt(key)
            for n, reason in outcome.left_out.items():
                drop_group(t, key, n, reason)
            t.execute(update(assignment).where(*mine, assignment.c.state == "uploaded").values(state="counted"))
            _forget_updates(t, key)
            late = {"state": "dropped", "reason": LATE}
            t.execute(update(assignment).where(*mine, assignment.c.state.in_(HELD)).values(**late))
            closed = (round_.c.run == key.run, round_.c.n == key.round)
            t.execute(update(round_).where(*closed).values(closed_at=t.now))
            if outcome.sha256:
                made = {"run": key.run, "n": key.round, "sha256": outcome.sha256, "bytes": outcome.bytes}
                made |= {"parent": base, "optimizer": outcome.optimizer, "contributors": list(included)}
                made |= {"weight": outcome.weight}
                t.execute(insert(version).values(**made, created_at=t.now))
            for n, metrics in outcome.metrics.items():
                for name, (total, count) in metrics.items():
                    row = {"run": key.run, "version": n, "name": name, "value": total / count, "count": count}
                    t.execute(insert(tables.metric).values(**row))
            t.execute(insert(manifest).values(**_manifest(key, outcome.manifest), at=t.now))
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=State.COMMITTED)
            if outcome.sha256:
                facts = {"version": key.round, "sha256": outcome.sha256, "contributors": len(included)}
                t.append("model", key.run, **facts, **outcome.facts)
            _open_next(t, key, evaluated=outcome.sha256 is None, clip_norm=outcome.clip_norm)
            return True


_HEAD = (
    select(attempt.c.state, attempt.c.threshold, attempt.c.state_at, attempt.c.total_weight)
    .add_columns(
        round_.c.kind, round_.c.clip_norm, run.c.recipe, version.c.sha256, version.c.bytes, version.c.optimizer
    )
    .join(round_, and_(round_.c.run == attempt.c.run, round_.c.n == attempt.c.round))
    .join(run, run.c.id == attempt.c.run)
    .join(version, and_(version.c.run == run.c.id, version.c.n == attempt.c.round - 1))
    .where(
        attempt.c.run == bindparam("run"), attempt.c.round == bindparam("round"), attempt.c.n == bindparam("attempt")
    )
)


def _manifest(key: Key, body: str) -> dict[str, Any]:
    return key._asdict() | {"body": body, "sha256": digest_of(body)}


def _open_next(t: Transaction, key: Key, *, evaluated: bool, clip_norm: float | None) -> None:
    recipe = Recipe.model_validate(t.scalar(select(run.c.recipe).where(run.c.id == key.run)))
    if evaluated:
        end_run(t, key.run, "finished", by="coordinator")
    else:
        kind = "train" if key.round < recipe.rounds else "evaluate"
        open_round(t, key.run, key.round + 1, kind, clip_norm=clip_norm)


def _forget_updates(t: Transaction, key: Key) -> None:
    """One organization's update is nobody's to keep."""
    mine = select(assignment.c.id).where(*in_attempt(key))
    t.execute(update(tables.update).where(tables.update.c.assignment.in_(mine)).values(data=None))


def _move(t: Transaction, key: Key, before: State, after: State, **values: Any) -> bool:
    statement = update(attempt).where(attempt.c.state == before).values(state=after, state_at=t.now, **values)
    return bool(t.execute(_only(statement, key)).rowcount)


def _only(statement: Any, key: Key) -> Any:
    return statement.where(attempt.c.run == key.run, attempt.c.round == key.round, attempt.c.n == key.attempt)
