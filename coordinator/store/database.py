"""The database under the store: SQLite in WAL mode, or PostgreSQL by URL, with transactions that lose nothing.

SQLAlchemy's default on SQLite opens a transaction at the first write, so two threads that read, then write, overwrite
each other without an error (313 of 400 updates were lost when it was tried). Here a write transaction holds the write
lock from its first statement.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.engine import make_url

from ...protocol.errors import OperatorError
from . import tables

EVENTS_LOCK = 0x6D75726D7572  # "murmur"; any number that nothing else locks


class Database:
    """Transactions. `on_commit` hears the newest event id after each commit that appended events."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.on_commit: Callable[[int], None] = lambda newest: None
        self.failpoint: Callable[[str], None] = lambda name: None  # where the crash tests end the process
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(murmur_write=True)

    @contextmanager
    def read(self) -> Generator[Connection]:
        """A consistent view; nothing is written."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Generator[Transaction]:
        """One transaction: all of it or nothing. Raising inside rolls it back."""
        with self._writer.begin() as connection:
            transaction = Transaction(connection, self.clock())
            yield transaction
            self.failpoint("before commit")
        self.failpoint("after commit")
        if transaction.newest_event:
            self.on_commit(transaction.newest_event)

    def close(self) -> None:
        self.engine.dispose()


class Transaction:
    """A write transaction, its one time `now`, and the events that become visible with it."""

    def __init__(self, connection: Connection, now: float) -> None:
        self.execute = connection.execute
        self.scalar = connection.scalar
        self.engine = connection.engine
        self.now = now
        self.newest_event = 0

    def append(self, kind: str, run: str | None = None, **data: Any) -> None:
        """Append to the event log; it is there if and only if the transaction commits."""
        if self.engine.dialect.name == "postgresql" and not self.newest_event:
            # Ids come from a sequence before the commit; without this lock, held until the commit, a reader could see
            # an event before an earlier one that commits later, and would never go back for it.
            self.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": EVENTS_LOCK})
        row = {"at": self.now, "run": run, "kind": kind, "data": data}
        self.newest_event = int(self.scalar(insert(tables.event).values(**row).returning(tables.event.c.id)) or 0)


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_size=20, max_overflow=20, pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise OperatorError(f"{parsed.get_backend_name()} is not supported: give a sqlite:/// or postgresql:// URL")
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, pool_size=20, max_overflow=40, connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's "begin" below opens transactions, the driver never does
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("murmur_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    _ = (_settings, _begin)
    return engine
