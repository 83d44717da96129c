"""Reading the event log, which everything live hangs on."""

from __future__ import annotations

from sqlalchemy import func, select

from ...protocol.views import EventView
from .database import Database
from .tables import event
from .times import utc


class Events:
    def __init__(self, db: Database) -> None:
        self._db = db

    def since(self, after: int, run: str | None = None, limit: int = 500) -> list[EventView]:
        """Events with an id above `after`, oldest first."""
        query = select(event).where(event.c.id > after).order_by(event.c.id).limit(limit)
        return self._views(query if run is None else query.where(event.c.run == run))

    def recent(self, run: str | None = None, limit: int = 100) -> list[EventView]:
        """The newest events, newest last."""
        query = select(event).order_by(event.c.id.desc()).limit(limit)
        return self._views(query if run is None else query.where(event.c.run == run))[::-1]

    def newest(self) -> int:
        with self._db.read() as c:
            return c.scalar(select(func.max(event.c.id))) or 0

    def _views(self, query) -> list[EventView]:  # pyright: ignore[reportMissingParameterType]
        with self._db.read() as c:
            rows = c.execute(query).mappings().all()
        return [EventView(id=r["id"], at=utc(r["at"]), run=r["run"], kind=r["kind"], data=r["data"]) for r in rows]
