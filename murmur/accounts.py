"""Accounts of a coordinator on this machine, changed in its database; for the operator, before anybody can log in."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from murmur.coordinator.people import People
from murmur.coordinator.settings import Settings
from murmur.coordinator.store import Store
from murmur.coordinator.store.database import Database
from murmur.coordinator.store.migrate import current, migrate
from murmur.protocol.errors import OperatorError


@contextmanager
def people_of(data: Path | None) -> Generator[People]:
    """The accounts in a data folder; raises OperatorError where there is no coordinator's database."""
    settings = _there(data)
    store = Store(settings.database_url, clock=time.time)
    try:
        yield People(store, session_s=settings.session_s)
    finally:
        store.close()


def migrated(data: Path | None) -> tuple[str, str]:
    """Upgrade the database of a coordinator; its schema before and after."""
    settings = _there(data)
    database = Database(settings.database_url, clock=time.time)
    try:
        before = current(database.engine)
        migrate(database.engine)
        return before, current(database.engine)
    finally:
        database.close()


def _there(data: Path | None) -> Settings:
    settings = Settings.read(data=data)
    if not settings.database and not (settings.data / "murmur.db").exists():
        raise OperatorError(f"no coordinator's data in {settings.data}: `murmur coordinator serve` makes it")
    return settings
