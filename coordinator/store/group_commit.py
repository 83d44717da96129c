"""Durable writes to SQLite, many to one sync of the disk.

SQLite has one writer at a time, and with `synchronous=FULL` each commit waits for the disk. So transactions that come
while the disk is busy queue, first come, first served; when it is free they run one after the other on one
connection, each inside a savepoint, and share the next commit. Nobody hears of success before that commit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

from ...protocol.errors import Unavailable

LAZY_S = 0.02  # how long a write that nobody waits for may stay uncommitted


class _Turn:
    """A lock that is handed on in the order in which it was asked for."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._queue.append(gate)
        gate.acquire()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._queue:
                self._queue.popleft().release()  # it stays held, by the next
            else:
                self._held = False


class _Batch:
    """Transactions that one commit makes durable."""

    def __init__(self) -> None:
        self.members = 0
        self.led = False  # somebody is on the way to commit it
        self.done = threading.Event()
        self.error: BaseException | None = None


class GroupCommit:
    """The one connection that writes. `join` from any thread; not from inside another `join` of the same thread."""

    def __init__(self, engine: Engine) -> None:
        """engine: its "begin" opens a transaction that holds the write lock."""
        self._engine = engine
        self._connection: Connection | None = None
        self._turn = _Turn()
        self._batch: _Batch | None = None
        self._refused_at = 0.0  # when the write lock was last not to be had
        self._closed = False
        self._lazy = threading.Event()
        self._committer = threading.Thread(target=self._commit_lazily, name="lazy commits", daemon=True)
        self._committer.start()

    @contextmanager
    def join(self, *, durable: bool) -> Generator[Connection]:
        """Run the body as one transaction; it returns once that is on disk, or at once where it need not be durable.

        What the body raises undoes the body alone, and is raised when what it may have read of others is on disk.
        """
        asked_at = time.monotonic()
        failure: BaseException | None = None
        with self._turn:
            batch, connection = self._open(asked_at)
            connection.exec_driver_sql("SAVEPOINT one")
            try:
                yield connection
            except BaseException as error:
                failure = error
                connection.exec_driver_sql("ROLLBACK TO one")
            connection.exec_driver_sql("RELEASE one")
            batch.members += failure is None
            if failure is not None and not batch.members:
                self._end(batch, commit=False)
                raise failure
            leads = not batch.led and (durable or failure is not None)
            batch.led = batch.led or leads
        if leads:
            with self._turn:  # behind all who asked before, so that they are in it
                self._end(batch, commit=True)
        elif durable or failure is not None:
            batch.done.wait()
        else:
            self._lazy.set()
        if batch.error is not None and (durable or failure is not None):
            raise batch.error
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._closed = True
        self._lazy.set()
        self._committer.join()
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self, asked_at: float) -> tuple[_Batch, Connection]:
        if self._connection is None:
            self._connection = self._engine.connect()
        if self._batch is None:
            if self._refused_at > asked_at:  # who queued behind a refused one would wait as long again, each
                raise Unavailable("the database is locked by another process")
            try:
                self._connection.begin()
            except BaseException:
                self._refused_at = time.monotonic()
                self._connection.rollback()
                raise
            self._batch = _Batch()
        return self._batch, self._connection

    def _end(self, batch: _Batch, *, commit: bool) -> None:
        assert self._connection is not None
        self._batch = None
        try:
            if commit:
                self._connection.commit()
            else:
                self._connection.rollback()
        except BaseException as error:
            batch.error = error
            self._connection.rollback()
        finally:
            batch.done.set()

    def _commit_lazily(self) -> None:
        while not self._closed:
            self._lazy.wait()
            self._lazy.clear()
            if not self._closed:
                time.sleep(LAZY_S)
            with self._turn:
                batch = self._batch
                if batch is not None and not batch.led:
                    self._end(batch, commit=True)
