"""The audit log: a chain of rows that are only ever added, each in the transaction of what it tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, insert, or_, select

from ...protocol.audit import AuditView
from .database import Database, Transaction
from .tables import audit
from .times import utc

BATCH = 500  # entries that are read at a time


def note(t: Transaction, action: str, subject: str, *, by: str, **details: str) -> None:
    """Chain an entry: it is in the log if and only if the transaction commits."""
    t.lock()
    last = t.execute(select(audit.c.n, audit.c.sha256).order_by(audit.c.n.desc()).limit(1)).first()
    n, before = (last.n + 1, last.sha256) if last else (1, "")
    row = {"n": n, "at": t.now, "by": by, "action": action, "subject": subject, "details": details, "before": before}
    t.execute(insert(audit).values(**row, sha256=_view({**row, "sha256": ""}).digest))


class Audit:
    def __init__(self, db: Database) -> None:
        self._db = db

    def failed_sign_ins(self, address: str, tries: int, accounts: Sequence[str]) -> None:
        """Tell that sign-ins failed. accounts: whose name was tried, of those that there are; at most ten are named."""
        with self._db.write() as t:
            note(t, "sign-in failed", address, by="nobody", tries=f"{tries}", accounts=", ".join(accounts[:10]))

    def newest(self, *, by: str = "", what: str = "", skip: int = 0, limit: int = 50) -> tuple[list[AuditView], int]:
        """Entries, the newest first, and how many fit. what: a part of the action or of what it was done to."""
        with self._db.read() as c:
            total = c.scalar(_fitting(select(func.count()).select_from(audit), by, what)) or 0
            query = _fitting(select(audit), by, what).order_by(audit.c.n.desc()).offset(skip).limit(limit)
            return [_view(row) for row in c.execute(query).mappings()], total

    def entries(self, *, by: str = "", what: str = "", after: int = 0) -> Iterator[AuditView]:
        """Entries from the oldest on, read a few hundred at a time."""
        while True:
            query = _fitting(select(audit), by, what).where(audit.c.n > after).order_by(audit.c.n).limit(BATCH)
            with self._db.read() as c:
                rows = c.execute(query).mappings().all()
            yield from map(_view, rows)
            if len(rows) < BATCH:
                return
            after = rows[-1]["n"]


def _fitting(query: Select[Any], by: str, what: str) -> Select[Any]:
    if by:
        query = query.where(audit.c.by == by)
    if what:
        query = query.where(
            or_(audit.c.action.icontains(what, autoescape=True), audit.c.subject.icontains(what, autoescape=True))
        )
    return query


def _view(row: Mapping[Any, Any]) -> AuditView:
    return AuditView.model_validate({**row, "at": utc(row["at"])})
