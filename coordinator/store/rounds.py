"""The facts of rounds: who was asked, what each answered, which update counts, what came out.

Every write here is compare-and-set on the state it needs, so two that race cannot both be right: the loser gets False
or TooLate and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import RowMapping, and_, insert, select, update

from ...protocol.errors import Conflict, NotAllowed, NotFound, TooLate
from ...protocol.messages import AnswerKind, Progress
from ...protocol.recipe import Recipe
from ..rounds import State
from . import tables
from .attempts import HELD, Attempt, Key, Outcome, part_of_row
from .database import Database, Transaction
from .runs import close_run, open_attempt, open_round
from .tables import answer, assignment, attempt, round_, run, version

WANTS = {  # in which state an answer is taken
    AnswerKind.ADVERT: State.KEYS,
    AnswerKind.SHARES: State.SHARES,
    AnswerKind.AGREE: State.AGREEING,
    AnswerKind.REVEAL: State.REVEALING,
}


class Rounds:
    def __init__(self, db: Database) -> None:
        self._db = db

    def open(self) -> list[Key]:
        """Every attempt that has not ended, oldest first."""
        query = select(attempt.c.run, attempt.c.round, attempt.c.n).where(attempt.c.closed_at.is_(None))
        with self._db.read() as c:
            return [Key(*row) for row in c.execute(query.order_by(attempt.c.opened_at))]

    def resume(self) -> None:
        """Count every deadline from now on: nobody could make progress while the coordinator was away."""
        with self._db.write() as t:
            t.execute(update(attempt).where(attempt.c.closed_at.is_(None)).values(state_at=t.now))

    def named_blobs(self) -> set[str]:
        """SHA-256 of every blob that a version or an update that still counts needs."""
        with self._db.read() as c:
            found = {*c.scalars(select(version.c.sha256)), *c.scalars(_unsummed())}
            return found | set(c.scalars(select(version.c.optimizer).where(version.c.optimizer.is_not(None))))

    def load(self, key: Key) -> Attempt:
        """An attempt with everything that was delivered; its parts are sorted by client."""
        head = (
            select(attempt, round_.c.kind, run.c.recipe, version.c.sha256, version.c.bytes, version.c.optimizer)
            .join(round_, and_(round_.c.run == attempt.c.run, round_.c.n == attempt.c.round))
            .join(run, run.c.id == attempt.c.run)
            .join(version, and_(version.c.run == run.c.id, version.c.n == attempt.c.round - 1))
        )
        mine = _in_attempt(key)
        delivered = select(assignment, tables.update.c.sha256, tables.update.c.weight, tables.update.c.metrics)
        delivered = delivered.outerjoin(tables.update, tables.update.c.assignment == assignment.c.id)
        said = select(answer).join(assignment, assignment.c.id == answer.c.assignment).where(*mine)
        with self._db.read() as c:
            row = c.execute(_only(head, key)).mappings().first()
            if row is None:
                raise NotFound(f"no attempt {key}")
            parts = c.execute(delivered.where(*mine).order_by(assignment.c.client)).mappings().all()
            answers: dict[str, dict[str, str]] = {}
            for a in c.execute(said).mappings():
                answers.setdefault(a["assignment"], {})[a["kind"]] = a["body"]
        return Attempt(
            key=key,
            kind=row["kind"],
            state=State(row["state"]),
            threshold=row["threshold"],
            state_at=row["state_at"],
            recipe=Recipe.model_validate(row["recipe"]),
            base=row["sha256"],
            base_bytes=row["bytes"],
            optimizer=row["optimizer"],
            parts=tuple(part_of_row(p, answers.get(p["id"], {})) for p in parts),
        )

    def of_assignment(self, assignment_id: str, client: str) -> tuple[Key, RowMapping]:
        """The attempt of an assignment and its row; one that is not this client's raises NotAllowed."""
        with self._db.read() as c:
            row = c.execute(select(assignment).where(assignment.c.id == assignment_id)).mappings().first()
        if row is None:
            raise NotFound(f"no assignment {assignment_id!r}")
        if row["client"] != client:
            raise NotAllowed(f"assignment {assignment_id!r} is not {client!r}'s")
        return Key(row["run"], row["round"], row["attempt"]), row

    def choose(self, key: Key, clients: Sequence[str], to: State, threshold: int) -> bool:
        """Fix the cohort of an attempt and offer each client its part."""
        with self._db.write() as t:
            if not _move(t, key, State.SELECTING, to, threshold=threshold):
                return False
            for name in clients:
                row = {"id": key.assignment(name), "client": name, "state": "offered"}
                row |= {"offered_at": t.now, "progress_at": t.now, **key._asdict()}
                t.execute(insert(assignment).values(**row))
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=to, cohort=list(clients))
            return True

    def move(self, key: Key, before: State, after: State) -> bool:
        """Bring an attempt into its next state, if it is still in `before`."""
        with self._db.write() as t:
            if not _move(t, key, before, after):
                return False
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=after)
            return True

    def drop(self, key: Key, clients: Collection[str], reason: str) -> None:
        """Wait no longer for these clients. What one of them has uploaded already still counts."""
        with self._db.write() as t:
            for name in clients:
                _drop(t, key, name, reason)

    def fail(self, key: Key, before: State, reason: str, *, retry: bool) -> bool:
        """End an attempt without a result; open the next one, or fail the run."""
        with self._db.write() as t:
            if not _move(t, key, before, State.FAILED, reason=reason, closed_at=t.now):
                return False
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=State.FAILED, reason=reason)
            if retry:
                open_attempt(t, key.run, key.round, key.attempt + 1)
            else:
                t.execute(update(run).where(run.c.id == key.run).values(state="failed", reason=reason))
                close_run(t, key.run, reason)
                t.append("run", key.run, state="failed", reason=reason)
            return True

    def hand_out(self, client: str, busy: Collection[str]) -> tuple[Key, int] | None:
        """The attempt this client should work on now, with its new fence.

        An assignment that was handed out before and that the agent no longer knows (it was restarted) is handed out
        again in a plain round. In a masked one its secrets died with it: it is dropped.
        """
        with self._db.write() as t:
            query = select(assignment).join(attempt, _same_attempt()).where(attempt.c.closed_at.is_(None))
            mine = query.where(
                assignment.c.client == client, assignment.c.state.in_(HELD), assignment.c.phase != "lost"
            )
            for row in t.execute(mine.order_by(assignment.c.offered_at)).mappings().all():
                key = Key(row["run"], row["round"], row["attempt"])
                if row["id"] in busy:
                    continue
                if row["state"] != "offered":
                    said = t.scalar(select(answer.c.kind).where(answer.c.assignment == row["id"]).limit(1))
                    if said is not None:
                        _drop(t, key, client, "the agent was restarted, and the secrets of its masks went with it")
                        continue
                    if row["state"] == "uploaded":
                        continue
                fence = row["fence"] + 1
                fits = (assignment.c.id == row["id"], assignment.c.fence == row["fence"])
                values = {"state": "working", "fence": fence, "phase": "waiting", "progress_at": t.now}
                if t.execute(update(assignment).where(*fits).values(**values)).rowcount:
                    t.append("client", key.run, client=client, round=key.round, attempt=key.attempt, state="working")
                    return key, fence
        return None

    def void(self, client: str, busy: Collection[str]) -> tuple[str, ...]:
        """Those of `busy` on which this client need not work any longer."""
        held = select(assignment.c.id).join(attempt, _same_attempt()).where(attempt.c.closed_at.is_(None))
        held = held.where(assignment.c.client == client, assignment.c.state.in_(HELD), assignment.c.id.in_(busy))
        with self._db.read() as c:
            alive = set(c.scalars(held))
        return tuple(sorted(set(busy) - alive))

    def may_read(self, client: str, sha256: str) -> bool:
        """Whether this is the model of a round that the client was asked to take part in."""
        same = and_(version.c.run == assignment.c.run, version.c.n == assignment.c.round - 1)
        query = select(assignment.c.id).join(version, same)
        query = query.where(assignment.c.client == client, version.c.sha256 == sha256)
        with self._db.read() as c:
            return c.scalar(query.limit(1)) is not None

    def spent(self, key: Key) -> list[str]:
        """Blobs of a closed attempt's updates that nothing else names: single updates are not kept."""
        mine = select(tables.update.c.sha256).join(assignment, assignment.c.id == tables.update.c.assignment)
        mine = mine.where(*_in_attempt(key))
        named = select(version.c.sha256)
        with self._db.read() as c:
            return list(c.scalars(mine.where(tables.update.c.sha256.not_in(named.union(_unsummed())))))

    def progress(self, assignment_id: str, fence: int, said: Progress) -> None:
        """Note how far an assignment has come; raises TooLate where nobody waits for it."""
        sent = said.bytes if said.phase == "uploading" else 0  # what it downloads is not what leaves the building
        values = {"phase": said.phase, "step": said.step, "steps": said.steps, "bytes": sent}
        with self._db.write() as t:
            row = _held(t, assignment_id, fence)
            t.execute(update(assignment).where(assignment.c.id == assignment_id).values(progress_at=t.now, **values))
            if any(row[name] != value for name, value in values.items()):
                t.append("progress", row["run"], client=row["client"], round=row["round"], **values)

    def answer(self, assignment_id: str, fence: int, kind: AnswerKind, body: str) -> bool:
        """Take a client's word in the protocol, once; False when these very bytes were taken before.

        Raises Conflict for other bytes than the first time, TooLate when the attempt is past the state that takes it.
        """
        with self._db.write() as t:
            _lock(t, assignment_id)
            fits = (answer.c.assignment == assignment_id, answer.c.kind == kind)
            first = t.scalar(select(answer.c.body).where(*fits))
            if first is not None:
                if first != body:
                    raise Conflict(f"another {kind} was accepted before; each is said once")
                return False
            row = _held(t, assignment_id, fence)
            if row["attempt_state"] != WANTS[kind]:
                raise TooLate(f"{kind} is taken while a round is {WANTS[kind]}; it is {row['attempt_state']}")
            t.execute(insert(answer).values(assignment=assignment_id, kind=kind, body=body, at=t.now))
            t.execute(update(assignment).where(assignment.c.id == assignment_id).values(progress_at=t.now))
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"]}
            t.append("secure", row["run"], said=kind, **facts)
            return True

    def offer_upload(self, assignment_id: str, fence: int, sha256: str, size: int) -> str:
        """Note what will be uploaded; returns the name of the part file, another one for another content."""
        row = {"fence": fence, "sha256": sha256, "size": size}
        with self._db.write() as t:
            _lock(t, assignment_id)
            held = _held(t, assignment_id, fence)
            if held["attempt_state"] not in (State.KEYS, State.SHARES, State.COLLECTING):
                raise TooLate("the round has closed its collection")
            table, mine = tables.upload, tables.upload.c.assignment == assignment_id
            if t.scalar(select(table.c.fence).where(mine)) is None:
                t.execute(insert(table).values(assignment=assignment_id, **row))
            else:
                t.execute(update(table).where(mine).values(**row))
        return part_name(assignment_id, sha256)

    def upload(self, assignment_id: str, fence: int) -> tuple[str, str, int]:
        """(part file, sha256, size) of the upload under way; raises NotFound where none was offered."""
        table = tables.upload
        with self._db.read() as c:
            query = select(table.c.sha256, table.c.size).where(table.c.assignment == assignment_id)
            row = c.execute(query.where(table.c.fence == fence)).first()
        if row is None:
            raise NotFound("no upload was announced for this assignment by its present holder")
        return part_name(assignment_id, row[0]), row[0], row[1]

    def accept_update(
        self,
        assignment_id: str,
        fence: int,
        *,
        sha256: str,
        size: int,
        weight: float | None,
        metrics: dict[str, Any] | None,
    ) -> bool:
        """Count an update, once; False when this very update was accepted before.

        Raises Conflict for another update than the first, TooLate when the collection is closed.
        """
        table = tables.update
        with self._db.write() as t:
            _lock(t, assignment_id)
            first = t.scalar(select(table.c.sha256).where(table.c.assignment == assignment_id))
            if first is not None:
                if first != sha256:
                    raise Conflict("another update was accepted for this assignment; the first one counts")
                return False
            row = _held(t, assignment_id, fence)
            if row["attempt_state"] != State.COLLECTING:
                raise TooLate(f"updates are taken while a round is collecting; it is {row['attempt_state']}")
            values = {"sha256": sha256, "bytes": size, "weight": weight, "metrics": metrics, "received_at": t.now}
            t.execute(insert(table).values(assignment=assignment_id, **values))
            done = {"state": "uploaded", "phase": "waiting", "bytes": size, "progress_at": t.now}
            t.execute(update(assignment).where(assignment.c.id == assignment_id).values(**done))
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"], "bytes": size}
            t.append("client", row["run"], state="uploaded", **facts)
            return True

    def fail_assignment(self, assignment_id: str, fence: int, reason: str) -> None:
        """The client cannot deliver, or what it delivered cannot be counted."""
        with self._db.write() as t:
            row = _held(t, assignment_id, fence)
            fits = assignment.c.id == assignment_id
            t.execute(update(assignment).where(fits).values(state="failed", reason=reason, progress_at=t.now))
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"]}
            t.append("client", row["run"], state="failed", reason=reason, **facts)

    def publish(self, key: Key, base: str, included: Sequence[str], outcome: Outcome) -> bool:
        """Write a round's result and go on: the version, its metrics, and the next round or the end of the run."""
        with self._db.write() as t:
            if not _move(t, key, State.AGGREGATING, State.COMMITTED, closed_at=t.now):
                return False
            for name in included:
                fits = (assignment.c.id == key.assignment(name), assignment.c.state == "uploaded")
                t.execute(update(assignment).where(*fits).values(state="counted"))
            closed = (round_.c.run == key.run, round_.c.n == key.round)
            t.execute(update(round_).where(*closed).values(closed_at=t.now))
            if outcome.sha256:
                made = {"run": key.run, "n": key.round, "sha256": outcome.sha256, "bytes": outcome.bytes}
                made |= {"parent": base, "optimizer": outcome.optimizer, "contributors": list(included)}
                t.execute(insert(version).values(**made, created_at=t.now))
            for n, metrics in outcome.metrics.items():
                for name, (total, count) in metrics.items():
                    row = {"run": key.run, "version": n, "name": name, "value": total / count, "count": count}
                    t.execute(insert(tables.metric).values(**row))
            t.append("phase", key.run, round=key.round, attempt=key.attempt, state=State.COMMITTED)
            if outcome.sha256:
                facts = {"version": key.round, "sha256": outcome.sha256, "contributors": len(included)}
                t.append("model", key.run, **facts, **outcome.facts)
            _open_next(t, key, evaluated=outcome.sha256 is None)
            return True


def part_name(assignment_id: str, sha256: str) -> str:
    return f"{assignment_id}-{sha256[:16]}"


def _open_next(t: Transaction, key: Key, *, evaluated: bool) -> None:
    recipe = Recipe.model_validate(t.scalar(select(run.c.recipe).where(run.c.id == key.run)))
    if evaluated:
        t.execute(update(run).where(run.c.id == key.run).values(state="finished"))
        close_run(t, key.run, "")
        t.append("run", key.run, state="finished")
    else:
        open_round(t, key.run, key.round + 1, "train" if key.round < recipe.rounds else "evaluate")


def _move(t: Transaction, key: Key, before: State, after: State, **values: Any) -> bool:
    statement = update(attempt).where(attempt.c.state == before).values(state=after, state_at=t.now, **values)
    return bool(t.execute(_only(statement, key)).rowcount)


def _drop(t: Transaction, key: Key, client: str, reason: str) -> None:
    """An uploader that goes missing stays `uploaded`, since its update counts; it is only waited for no longer."""
    mine = assignment.c.id == key.assignment(client)
    before = t.scalar(select(assignment.c.state).where(mine))
    values = {"phase": "lost"} if before == "uploaded" else {"state": "dropped", "phase": "lost"}
    t.execute(update(assignment).where(mine).values(reason=reason, lost_at=t.now, **values))
    facts = {"client": client, "round": key.round, "attempt": key.attempt}
    t.append("client", key.run, state="dropped", reason=reason, **facts)


def _held(t: Transaction, assignment_id: str, fence: int) -> RowMapping:
    """The row of an assignment that this holder may still write to; raises TooLate otherwise."""
    query = select(assignment, attempt.c.state.label("attempt_state"), attempt.c.closed_at)
    query = query.join(attempt, _same_attempt()).where(assignment.c.id == assignment_id)
    row = t.execute(query).mappings().one()
    if row["closed_at"] is not None or row["state"] not in HELD or row["phase"] == "lost":
        raise TooLate(row["reason"] or "the round has ended")
    if row["fence"] != fence:
        raise TooLate("this assignment was handed out again since; its newer holder goes on with it")
    return row


def _lock(t: Transaction, assignment_id: str) -> None:
    """Let nobody else change this assignment or its attempt's state before we commit; SQLite locks all anyway."""
    query = select(attempt.c.state).join(assignment, _same_attempt()).where(assignment.c.id == assignment_id)
    t.execute(query.with_for_update(of=[attempt, assignment]))


def _unsummed() -> Any:
    """Blobs of the updates that are accepted and not in a version yet."""
    query = select(tables.update.c.sha256).join(assignment, assignment.c.id == tables.update.c.assignment)
    return query.join(attempt, _same_attempt()).where(attempt.c.closed_at.is_(None))


def _same_attempt() -> Any:
    return and_(
        attempt.c.run == assignment.c.run, attempt.c.round == assignment.c.round, attempt.c.n == assignment.c.attempt
    )


def _in_attempt(key: Key) -> Any:
    return assignment.c.run == key.run, assignment.c.round == key.round, assignment.c.attempt == key.attempt


def _only(statement: Any, key: Key) -> Any:
    return statement.where(attempt.c.run == key.run, attempt.c.round == key.round, attempt.c.n == key.attempt)
