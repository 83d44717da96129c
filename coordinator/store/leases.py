"""Which of several coordinators on one database moves the rounds on.

The holder renews its lease while it lives; when it is killed or stands still, the lease runs out and another takes it,
with a higher fence. The old holder may wake up in the middle of a write: each of its writes checks the fence inside
its own transaction, so it can do nothing any more. (An advisory lock would not do: a process that is stopped holds it
for ever.) Time is the database's, for the clocks of several machines differ.
"""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from ...protocol.errors import Unavailable
from .database import Database, Transaction
from .tables import lease

LEASE_S = 4.0  # another coordinator takes over so long after the last renewal
ROUNDS = "rounds"
_NOW = func.extract("epoch", func.clock_timestamp())  # not now(): that is when the transaction began


class LeaseLost(Unavailable):
    """Another coordinator moves the rounds on; this one has written nothing."""


class Lease:
    """This process's part in the lease. On SQLite there is one process, and it holds it always."""

    def __init__(self, db: Database, holder: str) -> None:
        self._db, self.holder = db, holder
        self._fence = 0

    def take(self) -> bool:
        """Take or renew it; False while another one has it."""
        if not self._db.shared:
            return True
        until = {"until": _NOW + LEASE_S}
        mine = (lease.c.name == ROUNDS, lease.c.holder == self.holder, lease.c.fence == self._fence)
        with self._db.write() as t:
            if t.execute(update(lease).where(*mine).values(**until)).rowcount:
                return True
            row = {"name": ROUNDS, "holder": self.holder, "fence": 1, **until}
            t.execute(insert(lease).values(**row).on_conflict_do_nothing())
            over = (lease.c.name == ROUNDS, lease.c.until < _NOW)
            values = {"holder": self.holder, "fence": lease.c.fence + 1, **until}
            t.execute(update(lease).where(*over).values(**values))
            held = select(lease.c.fence).where(lease.c.name == ROUNDS, lease.c.holder == self.holder)
            self._fence = t.scalar(held) or 0
        return bool(self._fence)

    def check(self, t: Transaction) -> None:
        """Raise LeaseLost unless it is still ours; nobody can take it before this transaction has ended."""
        if not self._db.shared:
            return
        held = select(lease.c.fence).where(lease.c.name == ROUNDS, lease.c.fence == self._fence)
        if not self._fence or t.scalar(held.with_for_update(read=True)) is None:
            self._fence = 0
            raise LeaseLost("another coordinator moves the rounds on now")

    def give_back(self) -> None:
        """Let another one take it at once."""
        if self._db.shared and self._fence:
            with self._db.write() as t:
                mine = (lease.c.name == ROUNDS, lease.c.fence == self._fence)
                t.execute(update(lease).where(*mine).values(until=0.0))
            self._fence = 0
