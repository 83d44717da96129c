"""A client's part in an attempt, from its side: what it is handed, what it says, the update it delivers.

Every write is compare-and-set on the state it needs, so two that race cannot both be right: the loser gets False or
TooLate and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, Select, Table, and_, bindparam, exists, insert, or_, select, update

from ...protocol.errors import Conflict, NotAllowed, NotFound, TooLate
from ...protocol.messages import AnswerKind
from ..rounds import State
from . import tables
from .attempts import HELD, SENT, Attempt, Key, Part, drop_part, part_of_row, phases_with, refusal, same_attempt
from .database import Database, Transaction
from .rounds import Rounds
from .tables import answer, assignment, attempt, run, version
from .tables import client as clients

WANTS = {  # in which state an answer is taken
    AnswerKind.ADVERT: State.KEYS,
    AnswerKind.SHARES: State.SHARES,
    AnswerKind.AGREE: State.AGREEING,
    AnswerKind.REVEAL: State.REVEALING,
}


class Assignments:
    def __init__(self, db: Database, rounds: Rounds) -> None:
        self._db, self._rounds = db, rounds

    def held(self, client: str) -> dict[str, bool]:
        """The assignments that this client has part in just now; true for those that a new process of it is handed."""
        with self._db.read() as c:
            return {name: bool(is_due) for name, is_due in c.execute(_HELD, {"client": client})}

    def hand_out(
        self, client: str, busy: Collection[str], *, poll: tuple[str, int] | None = None
    ) -> tuple[Key, int, int] | None:
        """(attempt, fence, group) of what this client should work on now; nothing of a run that is paused.

        One that was handed out before and that the agent no longer knows (it was restarted) is handed out again in a
        plain round. In a masked one its secrets died with it: it is dropped.

        poll: the agent's process and the number of its poll. A poll that the network brings a second time is older
        than the one that was answered, and is handed nothing.
        """
        with self._db.write() as t:
            said = poll and {"_id": client, "_instance": poll[0], "_polled": poll[1]}
            if said and not t.execute(_POLLED, said).rowcount:
                return None
            for row in t.execute(_TO_HAND_OUT, {"client": client}).mappings().all():
                key = Key(row["run"], row["round"], row["attempt"])
                if row["id"] in busy:
                    continue
                if row["said"]:
                    drop_part(t, key, client, "the agent was restarted, and the secrets of its masks went with it")
                    continue
                fence = row["fence"] + 1
                values = {"_id": row["id"], "_fence": row["fence"], "state": "working", "fence": fence}
                values |= {"phase": "waiting", "progress_at": t.now, "heard_at": t.now}
                values["phases"] = phases_with(row["phases"], "waiting", t.now)
                if t.execute(_HANDED, values).rowcount:
                    t.append("client", key.run, client=client, round=key.round, attempt=key.attempt, state="working")
                    return key, fence, row["group_n"]
        return None

    def mine(self, assignment_id: str, client: str) -> tuple[Attempt, Part]:
        """An assignment and its attempt; of a plain one without the other clients' parts, which may be thousands.

        Of one in groups it is the client's group: the others do not concern it.

        Raises NotFound, and NotAllowed for one that is another client's.
        """
        with self._db.read() as c:
            row = c.execute(_MINE, {"id": assignment_id}).mappings().first()
            if row is None:
                raise NotFound(f"no assignment {assignment_id!r}")
            if row["client"] != client:
                raise NotAllowed(f"assignment {assignment_id!r} is not {client!r}'s")
            key = Key(row["run"], row["round"], row["attempt"])
            found = self._rounds.head(c, key)
            if not found.threshold:
                part = part_of_row(row, {})
                return found.with_parts((part,)), part
        whole = self._rounds.load(key)
        part = whole.part(client)
        return whole.group(part.group), part

    def may_read(self, client: str, sha256: str) -> bool:
        """Whether this is the model of a round that the client was asked to take part in."""
        with self._db.read() as c:
            return c.scalar(_READABLE, {"client": client, "sha256": sha256}) is not None

    def answer(self, assignment_id: str, fence: int, kind: AnswerKind, body: str) -> bool:
        """Take a client's word in the protocol, once; False when these very bytes were taken before.

        Raises Conflict for other bytes than the first time, TooLate when the attempt is past the state that takes it.
        """
        with self._db.write() as t:
            row = _locked(t, _AND_ANSWER, assignment_id, kind=kind)
            if row["first"] is not None:
                if row["first"] != body:
                    raise Conflict(f"another {kind} was accepted before; each is said once")
                return False
            _check_held(row, fence)
            if row["attempt_state"] != WANTS[kind]:
                raise TooLate(f"{kind} is taken while a round is {WANTS[kind]}; it is {row['attempt_state']}")
            t.execute(insert(answer), {"assignment": assignment_id, "kind": kind, "body": body, "at": t.now})
            t.execute(_CHANGED, {"_id": assignment_id, "progress_at": t.now, "heard_at": t.now})
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"]}
            t.append("secure", row["run"], said=kind, **facts)
            return True

    def offer_upload(self, assignment_id: str, fence: int, sha256: str, size: int) -> str:
        """Note what will be uploaded; returns the name of the part file, another one for another content."""
        offered = {"fence": fence, "sha256": sha256, "size": size}
        table = tables.upload
        with self._db.write() as t:
            row = _locked(t, _AND_UPLOAD, assignment_id)
            _check_held(row, fence)
            if row["attempt_state"] not in (State.KEYS, State.SHARES, State.COLLECTING):
                raise TooLate("the round has closed its collection")
            if row["first"] is None:
                t.execute(insert(table).values(assignment=assignment_id, **offered))
            else:
                t.execute(update(table).where(table.c.assignment == assignment_id).values(**offered))
        return part_name(assignment_id, sha256)

    def upload(self, assignment_id: str, client: str, fence: int) -> tuple[str, str, int]:
        """(part file, sha256, size) of the upload under way; raises TooLate where none is."""
        with self._db.read() as c:
            row = c.execute(_UPLOAD, {"id": assignment_id, "client": client, "fence": fence}).first()
        if row is None:
            raise TooLate("no upload of this assignment is under way by its present holder")
        return part_name(assignment_id, row[0]), row[0], row[1]

    def parts_under_way(self) -> set[str]:
        """Names of the part files that an open attempt may still need."""
        table = tables.upload
        query = select(table.c.assignment, table.c.sha256).join(assignment, assignment.c.id == table.c.assignment)
        query = query.join(attempt, same_attempt()).where(attempt.c.closed_at.is_(None))
        with self._db.read() as c:
            return {part_name(*row) for row in c.execute(query)}

    def accept_update(
        self,
        assignment_id: str,
        fence: int,
        *,
        sha256: str,
        size: int,
        weight: float | None,
        metrics: dict[str, Any] | None,
        data: bytes | None = None,
    ) -> bool:
        """Count an update, once; False when this very update was accepted before.

        data: the update itself where it is no blob.

        Raises Conflict for another update than the first, TooLate when the collection is closed.
        """
        with self._db.write() as t:
            row = _locked(t, _AND_UPDATE, assignment_id)
            if row["first"] is not None:
                if row["first"] != sha256:
                    raise Conflict("another update was accepted for this assignment; the first one counts")
                return False
            _check_held(row, fence)
            if row["attempt_state"] != State.COLLECTING:
                raise TooLate(f"updates are taken while a round is collecting; it is {row['attempt_state']}")
            values = {"sha256": sha256, "bytes": size, "weight": weight, "metrics": metrics, "received_at": t.now}
            t.execute(_ACCEPTED, {"assignment": assignment_id, **values, "data": data})
            done = {"state": "uploaded", "phase": "waiting", "bytes": size, "progress_at": t.now, "heard_at": t.now}
            phases = phases_with(row["phases"], SENT, t.now)
            t.execute(_CHANGED, {"_id": assignment_id, "phases": phases, **done})
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"], "bytes": size}
            t.append("client", row["run"], state="uploaded", **facts)
            return True

    def fail(self, assignment_id: str, fence: int, reason: str) -> None:
        """The client cannot deliver, or what it delivered cannot be counted."""
        with self._db.write() as t:
            row = _locked(t, _AND_UPDATE, assignment_id)
            _check_held(row, fence)
            t.execute(_CHANGED, {"_id": assignment_id, "state": "failed", "reason": reason, "progress_at": t.now})
            facts = {"client": row["client"], "round": row["round"], "attempt": row["attempt"]}
            t.append("client", row["run"], state="failed", reason=reason, **facts)


def part_name(assignment_id: str, sha256: str) -> str:
    return f"{assignment_id}-{sha256[:16]}"


# What every request asks is put together once: SQLAlchemy takes longer to build a statement than SQLite to answer it.
_THEIRS = (
    assignment.c.client == bindparam("client"),
    assignment.c.state.in_(HELD),
    assignment.c.phase != "lost",
    attempt.c.closed_at.is_(None),
)
_SAID = exists(select(answer.c.kind).where(answer.c.assignment == assignment.c.id))
_DUE = and_(  # work for a new process of the agent: nothing that has come to its sum, and no update that is there
    run.c.held_by.is_(None),
    attempt.c.state != State.AGGREGATING,
    or_(assignment.c.state != "uploaded", _SAID),
)
_HELD = (
    select(assignment.c.id, _DUE).join(attempt, same_attempt()).join(run, run.c.id == assignment.c.run).where(*_THEIRS)
)
_TO_HAND_OUT = (
    select(assignment, _SAID.label("said"))
    .join(attempt, same_attempt())
    .join(run, run.c.id == assignment.c.run)
    .where(*_THEIRS, _DUE)
    .order_by(assignment.c.offered_at)
)
_MINE = (
    select(assignment, tables.update.c.sha256, tables.update.c.weight, tables.update.c.metrics)
    .outerjoin(tables.update, tables.update.c.assignment == assignment.c.id)
    .where(assignment.c.id == bindparam("id"))
)
_READABLE = (
    select(assignment.c.id)
    .join(version, and_(version.c.run == assignment.c.run, version.c.n == assignment.c.round - 1))
    .where(assignment.c.client == bindparam("client"), version.c.sha256 == bindparam("sha256"))
    .limit(1)
)
_UPLOAD = (
    select(tables.upload.c.sha256, tables.upload.c.size)
    .join(assignment, assignment.c.id == tables.upload.c.assignment)
    .join(attempt, same_attempt())
    .where(
        assignment.c.id == bindparam("id"),
        assignment.c.client == bindparam("client"),
        assignment.c.state == "working",
        tables.upload.c.fence == bindparam("fence"),
        attempt.c.closed_at.is_(None),
    )
)


def _and(table: Table, column: str, *also: ColumnElement[bool]) -> Select[Any]:
    """An assignment with its attempt's state, and as `first` what `table` has of it already."""
    query = select(
        assignment, attempt.c.state.label("attempt_state"), attempt.c.closed_at, table.c[column].label("first")
    )
    query = query.join(attempt, same_attempt()).where(assignment.c.id == bindparam("id"))
    return query.outerjoin(table, and_(table.c.assignment == assignment.c.id, *also))


_AND_ANSWER = _and(answer, "body", answer.c.kind == bindparam("kind"))
_AND_UPLOAD = _and(tables.upload, "fence")
_AND_UPDATE = _and(tables.update, "sha256")
_LOCK = (
    select(attempt.c.state)
    .join(assignment, same_attempt())
    .where(assignment.c.id == bindparam("id"))
    .with_for_update(of=[attempt, assignment])
)
# What these set is whatever columns are named when they are executed.
_CHANGED = update(assignment).where(assignment.c.id == bindparam("_id"))
_HANDED = _CHANGED.where(assignment.c.fence == bindparam("_fence"))
_ACCEPTED = insert(tables.update)
_POLLED = (
    update(clients)
    .where(clients.c.id == bindparam("_id"))
    .where(
        or_(
            clients.c.instance.is_(None),
            clients.c.instance != bindparam("_instance"),
            clients.c.polled < bindparam("_polled"),
        )
    )
    .values(instance=bindparam("_instance"), polled=bindparam("_polled"))
)


def _locked(t: Transaction, query: Select[Any], assignment_id: str, **values: Any) -> RowMapping:
    """The row of an assignment that `query` finds.

    Nobody else changes the assignment or its attempt's state before we commit; SQLite locks all anyway.
    """
    if t.shared:  # a statement of its own: what waited for the lock would look at `first` as it was before
        t.execute(_LOCK, {"id": assignment_id})
    return t.execute(query, {"id": assignment_id, **values}).mappings().one()


def _check_held(row: RowMapping, fence: int) -> None:
    if (why := refusal(row, fence)) is not None:
        raise why
