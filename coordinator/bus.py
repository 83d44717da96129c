"""Several coordinators on one PostgreSQL wake each other: LISTEN and NOTIFY carry what the hub says.

A notice is a hint, as in the hub: one that is lost costs a little time, for whoever waits reads the database again
after a while. When the connection was lost, everybody is woken once it is back.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from .hub import ALL, Hub, Notice
from .store.database import Database

log = logging.getLogger(__name__)

CHANNEL = "murmur"
NAMES = 100  # in one notice, whose payload PostgreSQL limits to 8,000 bytes; more are everybody
AGAIN_S = 1.0


class Bus:
    """Two threads: one that tells, one that listens."""

    def __init__(self, db: Database, hub: Hub, *, me: str) -> None:
        self._db, self._hub, self._me = db, hub, me
        self._queue: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._stopping = False
        self._threads = [
            threading.Thread(target=work, name=f"bus {work.__name__}", daemon=True)
            for work in (self._tell, self._listen)
        ]
        hub.outside = self._queue.put
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopping = True
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _tell(self) -> None:
        while (notice := self._queue.get()) is not None:
            notices = [notice]
            while not self._queue.empty() and (more := self._queue.get()) is not None:
                notices.append(more)
            try:
                with self._db.engine.begin() as connection:
                    values = {"channel": CHANNEL, "payload": self._payload(notices)}
                    connection.execute(text("SELECT pg_notify(:channel, :payload)"), values)
            except DBAPIError as error:
                log.warning("others were not told", extra={"why": str(error.orig)})

    def _payload(self, notices: list[Notice]) -> str:
        names = {name for n in notices for name in n.wake}
        wake = sorted(names) if len(names) <= NAMES else [ALL]
        newest = max(n.newest_event for n in notices)
        return json.dumps({"by": self._me, "wake": wake, "event": newest, "work": any(n.work for n in notices)})

    def _listen(self) -> None:
        while not self._stopping:
            try:
                pooled = self._db.engine.raw_connection()
                try:
                    self._hear(pooled.driver_connection)
                finally:
                    pooled.invalidate()  # it listens: nobody else may have it
            except Exception as error:
                log.warning("cannot hear other coordinators", extra={"why": str(error)})
                time.sleep(AGAIN_S)

    def _hear(self, connection: Any) -> None:
        connection.rollback()
        connection.autocommit = True
        connection.execute(f"LISTEN {CHANNEL}")
        self._hub.hear(Notice(wake=(ALL,), work=True))
        while not self._stopping:
            for notify in connection.notifies(timeout=AGAIN_S):
                said = json.loads(notify.payload)
                if said["by"] != self._me:
                    self._hub.hear(Notice(tuple(said["wake"]), said["event"], said["work"]))
                if self._stopping:
                    return
