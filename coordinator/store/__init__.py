"""All SQL of the coordinator: one method is one transaction, named for what it means."""

from __future__ import annotations

from collections.abc import Callable

from .accounts import Accounts
from .clients import Clients
from .database import Database
from .events import Events
from .migrate import migrate
from .rounds import Rounds
from .runs import Runs


class Store:
    """The tables by subject, over one database whose schema is brought up to date when it is opened."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.db = Database(url, clock=clock)
        migrate(self.db.engine)
        self.accounts = Accounts(self.db)
        self.clients = Clients(self.db)
        self.events = Events(self.db)
        self.rounds = Rounds(self.db)
        self.runs = Runs(self.db)

    def close(self) -> None:
        self.db.close()


__all__ = ["Store"]
