"""All SQL of the coordinator: one method is one transaction, named for what it means."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from .accounts import Accounts
from .assignments import Assignments
from .audit import Audit
from .clients import Clients
from .database import Database
from .events import Events
from .leases import Lease
from .manifests import Manifests
from .migrate import migrate
from .privacy import Ledger
from .records import Records
from .registry import Registry
from .rounds import Rounds
from .runs import Runs
from .signs import Signs
from .simulations import Simulations


class Store:
    """The tables by subject, over one database whose schema is brought up to date when it is opened."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.db = Database(url, clock=clock)
        migrate(self.db.engine)
        self.accounts = Accounts(self.db)
        self.audit = Audit(self.db)
        self.clients = Clients(self.db)
        self.events = Events(self.db)
        self.lease = Lease(self.db, holder=secrets.token_hex(8))
        self.rounds = Rounds(self.db, self.lease)
        self.assignments = Assignments(self.db, self.rounds)
        self.ledger = Ledger(self.db)
        self.runs = Runs(self.db)
        self.manifests = Manifests(self.db)
        self.registry = Registry(self.db)
        self.records = Records(self.db)
        self.signs = Signs(self.db)
        self.simulations = Simulations(self.db)

    def close(self) -> None:
        self.db.close()


__all__ = ["Store"]
