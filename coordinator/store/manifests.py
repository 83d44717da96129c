"""The manifests of committed rounds, as they were written in the transactions of their versions."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select

from ...protocol.errors import NotFound
from ...protocol.views import ManifestView
from .database import Database
from .tables import assignment, manifest, run
from .times import utc

PIECE = 16  # manifests read at a time; of 1,000 clients each has half a megabyte


class Manifests:
    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, run_id: str) -> list[ManifestView]:
        """The manifests of a run, oldest round first; raises NotFound for an unknown run."""
        query = select(manifest.c.round, manifest.c.attempt, manifest.c.sha256, manifest.c.at)
        with self._db.read() as c:
            rows = c.execute(query.where(manifest.c.run == run_id).order_by(manifest.c.round)).mappings().all()
            if not rows and c.scalar(select(run.c.id).where(run.c.id == run_id)) is None:
                raise NotFound(f"no run {run_id!r}")
        return [ManifestView.model_validate({**row, "at": utc(row["at"])}) for row in rows]

    def text(self, run_id: str, round_n: int) -> str:
        """One manifest, as it is hashed; raises NotFound."""
        query = select(manifest.c.body).where(manifest.c.run == run_id, manifest.c.round == round_n)
        with self._db.read() as c:
            found = c.scalar(query)
        if found is None:
            raise NotFound(f"no round {round_n} of the run {run_id!r} has a manifest")
        return found

    def texts(self, run_id: str, after: int = 0) -> Iterator[str]:
        """The manifests of the rounds after `after`, oldest first; a few in memory at a time."""
        query = select(manifest.c.round, manifest.c.body).where(manifest.c.run == run_id)
        while True:
            with self._db.read() as c:
                rows = c.execute(query.where(manifest.c.round > after).order_by(manifest.c.round).limit(PIECE)).all()
            yield from (body for _, body in rows)
            if len(rows) < PIECE:
                return
            after = rows[-1][0]

    def may_read(self, client: str, run_id: str) -> bool:
        """Whether the client was asked to take part in any round of the run."""
        query = select(assignment.c.id).where(assignment.c.client == client, assignment.c.run == run_id).limit(1)
        with self._db.read() as c:
            return c.scalar(query) is not None
