"""The privacy ledger: what each sum of a run spent, noted in the transaction that makes it irrevocable."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import and_, distinct, func, insert, select
from sqlalchemy import update as change

from ...privacy.dp.accounting import Event
from ...protocol.views import PrivacyView
from .attempts import Key
from .database import Database, Transaction
from .tables import assignment, privacy_event, round_, run, update


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """One more event of a run's ledger, and what the run comes to with it."""

    event: Event
    total: PrivacyView


class Ledger:
    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, run_id: str) -> list[Event]:
        """Everything that a run has spent, whether or not a version came of it."""
        query = select(privacy_event.c.event).where(privacy_event.c.run == run_id)
        with self._db.read() as c:
            return [Event.from_json(row) for row in c.scalars(query.order_by(privacy_event.c.at))]

    def rounds(self) -> dict[str, dict[str, int]]:
        """In how many training rounds of each run an update of each client was accepted."""
        of_round = and_(round_.c.run == assignment.c.run, round_.c.n == assignment.c.round, round_.c.kind == "train")
        query = select(assignment.c.run, assignment.c.client, func.count(distinct(assignment.c.round)))
        query = query.join(update, update.c.assignment == assignment.c.id).join(round_, of_round)
        found: dict[str, dict[str, int]] = {}
        with self._db.read() as c:
            for run_id, name, count in c.execute(query.group_by(assignment.c.run, assignment.c.client)):
                found.setdefault(run_id, {})[name] = count
        return found

    def unreported(self) -> list[str]:
        """Runs that have ended, whose epsilon is still the one that was shown on the way."""
        query = select(run.c.id, run.c.epsilon).where(run.c.state != "running", run.c.epsilon.is_not(None))
        with self._db.read() as c:
            return [name for name, shown in c.execute(query) if shown["accountant"] != "pld"]

    def report(self, run_id: str, total: PrivacyView) -> None:
        """Note what a run's ledger comes to."""
        with self._db.write() as t:
            _show(t, run_id, total)


def spend(t: Transaction, key: Key, spent: Spent) -> None:
    t.execute(insert(privacy_event).values(**key._asdict(), event=spent.event.to_json(), at=t.now))
    _show(t, key.run, spent.total, round=key.round, attempt=key.attempt)


def _show(t: Transaction, run_id: str, total: PrivacyView, **where: int) -> None:
    t.execute(change(run).where(run.c.id == run_id).values(epsilon=total.model_dump(mode="json")))
    told = total.model_dump(mode="json", include={"value", "delta", "unit", "accountant"})
    t.append("privacy", run_id, **told, **where)
