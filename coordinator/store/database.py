"""The database under the store: SQLite in WAL mode, or PostgreSQL by URL, with transactions that lose nothing.

SQLAlchemy's default on SQLite opens a transaction at the first write, so two threads that read, then write, overwrite
each other without an error (313 of 400 updates were lost when it was tried). Here a write transaction holds the write
lock from its first statement.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError

from ...protocol.errors import OperatorError, Unavailable
from . import tables
from .group_commit import GroupCommit

BUSY_S = 5  # how long to wait for another process's write lock, a backup's or a command's
PASSING = ("locked", "busy", "full", "disk I/O", "unable to open")  # what may be better when tried again
EVENTS_LOCK = 0x6D75726D7572  # "murmur"; any number that nothing else locks


class Database:
    """Transactions. `on_commit` hears the newest event id after each commit that appended events."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.on_commit: Callable[[int], None] = lambda newest: None
        self.failpoint: Callable[[str], None] = lambda name: None  # where the crash tests end the process
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(murmur_write=True)
        self.shared = self.engine.dialect.name == "postgresql"  # other coordinators may write to it too
        self._group = None if self.shared else GroupCommit(self._writer)

    def now(self) -> float:
        """The database server's time, which its clients on several machines can agree on; SQLite has this machine's."""
        if not self.shared:
            return time.time()
        with self.read() as connection:
            return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())

    @contextmanager
    def read(self) -> Generator[Connection]:
        """A consistent view; nothing is written. Raises Unavailable where the database cannot be reached."""
        with _in_words(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self, *, durable: bool = True) -> Generator[Transaction]:
        """One transaction: all of it or nothing. Raising inside rolls it back; returning means that it is on disk.

        durable: False for what may be lost with the machine's power, such as signs of life; it is not waited for.
        """
        with _in_words(), self._connected(durable) as connection:
            transaction = Transaction(connection, self.clock())
            yield transaction
            self.failpoint("before commit")
        self.failpoint("after commit")
        if transaction.newest_event:
            self.on_commit(transaction.newest_event)

    @contextmanager
    def _connected(self, durable: bool) -> Generator[Connection]:
        if self._group is not None:
            with self._group.join(durable=durable) as connection:
                yield connection
            return
        with self._writer.begin() as connection:
            if not durable:
                connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            yield connection

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self.engine.dispose()


@contextmanager
def _in_words() -> Generator[None]:
    """A database that is away or locked is a reason to try again, not a fault of ours."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        if isinstance(error.orig, sqlite3.Error) and not any(word in str(error.orig) for word in PASSING):
            raise
        raise Unavailable(f"the database cannot be used just now: {error.orig}") from error


class Transaction:
    """A write transaction, its one time `now`, and the events that become visible with it."""

    def __init__(self, connection: Connection, now: float) -> None:
        self.execute = connection.execute
        self.scalar = connection.scalar
        self.shared = connection.dialect.name == "postgresql"
        self.now = now
        self.newest_event = 0
        self._locked = not self.shared  # SQLite has one writer

    def append(self, kind: str, run: str | None = None, **data: Any) -> None:
        """Append to the event log; it is there if and only if the transaction commits."""
        self.lock()
        row = {"at": self.now, "run": run, "kind": kind, "data": data}
        self.newest_event = int(self.scalar(_APPENDED, row) or 0)

    def lock(self) -> None:
        """Add to a log in the order of commits: nobody else adds to one until this transaction has ended.

        Ids come from a sequence before the commit; without this lock a reader could see an event before an earlier one
        that commits later, and would never go back for it.
        """
        if not self._locked:
            self.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": EVENTS_LOCK})
            self._locked = True


_APPENDED = insert(tables.event).returning(tables.event.c.id)


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_size=20, max_overflow=20, pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise OperatorError(f"{parsed.get_backend_name()} is not supported: give a sqlite:/// or postgresql:// URL")
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, pool_size=20, max_overflow=40, connect_args={"timeout": BUSY_S, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's "begin" below opens transactions, the driver never does
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_S * 1000}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("murmur_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    _ = (_settings, _begin)
    return engine
