"""The site's record: which runs asked for what, who said yes to them, and every message that left, as SQLite.

A message is noted, and on disk, before its first byte leaves; what cannot be noted does not leave. The same bytes sent
again (a lost connection) are the same row with one more try. What is only counted (`outgoing.Outgoing.counted`) is
noted without waiting for the disk. Nothing of a model or of data is in here: hashes, sizes, and words that were sent.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import ValidationError

from ..protocol.encoding import canonical_json, sha256_hex
from ..protocol.errors import NotFound, OperatorError, StorageFull
from ..protocol.messages import Assignment
from .outgoing import PIECE, UPDATE, Outgoing, describe, info_of

FILE = "record.sqlite"
Decision = Literal["waiting", "approved", "denied"]
_TABLES = """
CREATE TABLE IF NOT EXISTS asked (      -- an assignment, as the coordinator has handed it out last
    assignment TEXT PRIMARY KEY,
    run TEXT NOT NULL,
    about TEXT NOT NULL,                -- the assignment, as JSON
    state TEXT NOT NULL,                -- waiting (for consent), working, delivered, late, refused, failed
    why TEXT NOT NULL DEFAULT '',
    at TEXT NOT NULL,                   -- UTC, as all times in here
    ended_at TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS asked_by_run ON asked (run);
CREATE TABLE IF NOT EXISTS consent (    -- of policy.ask: what a run asked for, and what somebody here said
    run TEXT NOT NULL,
    terms TEXT NOT NULL,                -- digest of what was asked for: other terms are asked again
    state TEXT NOT NULL CHECK (state IN ('waiting', 'approved', 'denied')),
    asked_at TEXT NOT NULL,
    decided_at TEXT,
    PRIMARY KEY (run, terms)
) STRICT;
CREATE TABLE IF NOT EXISTS sent (       -- a message
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    assignment TEXT NOT NULL,           -- or empty
    sha256 TEXT NOT NULL,               -- of the update that it brings, else of its bytes
    size INTEGER NOT NULL,
    masked INTEGER,                     -- 1: its numbers are masked, 0: the coordinator reads them, null: it has none
    said TEXT,                          -- JSON of what can be read in it
    at TEXT NOT NULL,                   -- before the first byte
    last_at TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,   -- that have left, all tries together
    UNIQUE (kind, assignment, sha256)
) STRICT;
CREATE TABLE IF NOT EXISTS counted (    -- what says nothing that is new
    hour TEXT NOT NULL,
    kind TEXT NOT NULL,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (hour, kind)
) STRICT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What one assignment asked of this site, and what became of it."""

    about: Assignment
    state: str
    why: str
    at: str
    ended_at: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """What one run has asked of this site: its newest assignment, how many there were, and since when (UTC)."""

    last: Asked
    assignments: int
    since: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Consent:
    run: str
    terms: str
    state: Decision
    asked_at: str
    decided_at: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A message that left; `run` is empty for those that belong to none."""

    id: int
    kind: str
    run: str
    assignment: str
    sha256: str
    size: int
    masked: bool | None
    said: dict[str, Any] | None
    at: str
    last_at: str
    tries: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    hour: str
    kind: str
    messages: int
    bytes: int


def terms_of(assignment: Assignment) -> str:
    """Digest of what somebody agrees to: all of a run's settings, and whether its updates are masked.

    A bound that follows the updates' norms moves from round to round, and is none of them.
    """
    settings = assignment.settings()
    if assignment.dp.adaptive:
        settings["dp"].pop("clip_norm")
    about = {"task": assignment.task, "max_weight": assignment.max_weight, "masked": assignment.secure is not None}
    return sha256_hex(canonical_json({**settings, **about}))


class Record:
    """A file for one agent, its page and its commands; safe for several threads and processes."""

    def __init__(self, path: Path) -> None:
        """The file is made with the first entry."""
        self._path = path
        self._lock = threading.RLock()
        self._sql: sqlite3.Connection | None = None
        self._info = ""

    def close(self) -> None:
        with self._lock:
            if self._sql is not None:
                self._sql.close()
                self._sql = None

    # What was asked

    def asked(self, a: Assignment) -> None:
        """Note what the coordinator asks for; an assignment that is handed out again takes its earlier place."""
        with self._write() as sql:
            sql.execute(
                "INSERT INTO asked (assignment, run, about, state, at) VALUES (?, ?, ?, 'working', ?) ON CONFLICT "
                "(assignment) DO UPDATE SET about = excluded.about, state = 'working', why = '', ended_at = NULL",
                (a.id, a.run, a.model_dump_json(), _now()),
            )

    def waits(self, assignment: str, waiting: bool) -> None:
        with self._write() as sql:
            sql.execute(
                "UPDATE asked SET state = ? WHERE assignment = ?", ("waiting" if waiting else "working", assignment)
            )

    def ended(self, assignment: str, state: str, why: str = "") -> None:
        with self._write() as sql:
            sql.execute(
                "UPDATE asked SET state = ?, why = ?, ended_at = ? WHERE assignment = ?",
                (state, why, _now(), assignment),
            )

    # Consent

    def consent(self, a: Assignment) -> Decision:
        """What was said of this run with these settings; the first question notes that somebody has to answer."""
        terms = terms_of(a)
        with self._write() as sql:
            sql.execute(
                "INSERT OR IGNORE INTO consent (run, terms, state, asked_at) VALUES (?, ?, 'waiting', ?)",
                (a.run, terms, _now()),
            )
            found = sql.execute("SELECT state FROM consent WHERE run = ? AND terms = ?", (a.run, terms)).fetchone()
        return found[0]

    def decide(self, run: str, decision: Literal["approved", "denied"], terms: str = "") -> None:
        """Answer a run, also one that was answered before. terms: those that were shown; else the newest.

        Raises NotFound for a run that never asked, or with other terms.
        """
        with self._write() as sql:
            changed = sql.execute(
                "UPDATE consent SET state = ?, decided_at = ? WHERE run = ? AND terms = coalesce(nullif(?, ''), "
                "(SELECT terms FROM consent WHERE run = ? ORDER BY asked_at DESC, rowid DESC LIMIT 1))",
                (decision, _now(), run, terms, run),
            ).rowcount
        if not changed:
            raise NotFound(f"no run {run!r} has asked for this site's consent")

    # What leaves

    def leaves(self, request: httpx.Request) -> None:
        """Note a request before it is sent. Raises StorageFull or OperatorError, and then it must not be."""
        out = describe(request)
        if (info := info_of(request)) is not None and info.sha256 != self._info:
            self._note(info)
            self._info = info.sha256
        if out.kind == PIECE:
            self._add_piece(out)
        elif out.counted:
            self._count(out)
        else:
            self._note(out)

    def _note(self, out: Outgoing) -> None:
        now = _now()
        by_pieces = out.kind == UPDATE and out.said is None  # which bring the bytes
        with self._write() as sql:
            masked = None
            if out.numbers:
                row = sql.execute("SELECT about FROM asked WHERE assignment = ?", (out.assignment,)).fetchone()
                masked = row is not None and self._assignment(row[0]).secure is not None
            sql.execute(
                "INSERT OR IGNORE INTO sent (kind, assignment, sha256, size, masked, said, at, last_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (out.kind, out.assignment, out.sha256, out.size, masked, _dump(out.said), now, now),
            )
            sql.execute(
                "UPDATE sent SET tries = tries + 1, bytes = bytes + ?, last_at = ? "
                "WHERE kind = ? AND assignment = ? AND sha256 = ?",
                (0 if by_pieces else out.body_bytes, now, out.kind, out.assignment, out.sha256),
            )

    def _add_piece(self, out: Outgoing) -> None:
        with self._write(durable=False) as sql:
            added = sql.execute(
                "UPDATE sent SET bytes = bytes + ?, last_at = ? WHERE id = "
                "(SELECT max(id) FROM sent WHERE kind = ? AND assignment = ?)",
                (out.body_bytes, _now(), UPDATE, out.assignment),
            ).rowcount
        if not added:
            raise OperatorError(
                f"a piece of an update leaves for {out.assignment}, and {self._path} knows of no update"
            )

    def _count(self, out: Outgoing) -> None:
        with self._write(durable=False) as sql:
            sql.execute(
                "INSERT INTO counted (hour, kind, messages, bytes) VALUES (?, ?, 1, ?) ON CONFLICT (hour, kind) DO "
                "UPDATE SET messages = messages + 1, bytes = bytes + excluded.bytes",
                (_now()[:13], out.kind, out.body_bytes),
            )

    # Reading

    def assignments(self, run: str | None = None, *, since: str = "", until: str = "9") -> list[Asked]:
        """What was asked in [since, until), UTC as in 2026-11, the newest last; of one run or of all."""
        return [
            Asked(about=self._assignment(about), state=state, why=why, at=at, ended_at=ended_at)
            for about, state, why, at, ended_at in self._read(
                "SELECT about, state, why, at, ended_at FROM asked WHERE run = coalesce(?, run) AND at >= ? AND at < ? "
                "ORDER BY rowid",
                run, since, until,
            )
        ]  # fmt: skip

    def runs(self, limit: int = 50) -> list[Requests]:
        """The runs that asked something of this site, the one that asked last first."""
        return [
            Requests(
                last=Asked(about=self._assignment(about), state=state, why=why, at=at, ended_at=ended),
                assignments=count,
                since=since,
            )
            for about, state, why, at, ended, count, since, _ in self._read(
                "SELECT about, state, why, at, ended_at, count(*), "
                "(SELECT min(b.at) FROM asked b WHERE b.run = a.run), max(a.rowid) "
                "FROM asked a GROUP BY run ORDER BY max(a.rowid) DESC LIMIT ?",  # the bare columns are max's row
                limit,
            )
        ]  # fmt: skip

    def consents(self) -> list[Consent]:
        """All answers that were given or are waited for, the newest question last."""
        return [
            Consent(run=run, terms=terms, state=state, asked_at=asked_at, decided_at=decided_at)
            for run, terms, state, asked_at, decided_at in self._read(
                "SELECT run, terms, state, asked_at, decided_at FROM consent ORDER BY rowid"
            )
        ]

    def sent(
        self, run: str | None = None, *, since: str = "", until: str = "9", limit: int = -1, skip: int = 0
    ) -> list[Sent]:
        """The messages that left in [since, until), the newest first; of one run or of all."""
        rows = self._read(
            "SELECT id, kind, coalesce(asked.run, ''), sent.assignment, sha256, size, masked, said, sent.at, last_at, "
            "tries, bytes FROM sent LEFT JOIN asked ON asked.assignment = sent.assignment "
            "WHERE (? IS NULL OR asked.run = ?) AND sent.at >= ? AND sent.at < ? ORDER BY id DESC LIMIT ? OFFSET ?",
            run, run, since, until, limit, skip,
        )  # fmt: skip
        return [
            Sent(id=id, kind=kind, run=run, assignment=assignment, sha256=sha256, size=size,
                 masked=None if masked is None else bool(masked), said=json.loads(said) if said else None, at=at,
                 last_at=last_at, tries=tries, bytes=count)
            for id, kind, run, assignment, sha256, size, masked, said, at, last_at, tries, count in rows
        ]  # fmt: skip

    def counted(self, *, since: str = "", until: str = "9") -> list[Counted]:
        rows = self._read(
            "SELECT hour, kind, messages, bytes FROM counted WHERE hour >= ? AND hour < ? ORDER BY hour, kind",
            since[:13], until[:13],
        )  # fmt: skip
        return [Counted(hour=hour, kind=kind, messages=n, bytes=count) for hour, kind, n, count in rows]

    def totals(self, run: str | None = None) -> tuple[int, int]:
        """How many messages have left that have a row, and how many bytes all have brought."""
        ((messages, count),) = self._read(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM sent LEFT JOIN asked ON asked.assignment = sent.assignment "
            "WHERE ? IS NULL OR asked.run = ?",
            run, run,
        ) or [(0, 0)]  # fmt: skip
        return messages, count

    def updates(self) -> tuple[int, int]:
        """How many updates have left, and how many of them were masked."""
        ((updates, masked),) = self._read(
            "SELECT count(*), coalesce(sum(masked), 0) FROM sent WHERE kind = ?", UPDATE
        ) or [(0, 0)]
        return updates, masked

    def version(self) -> tuple[int, ...]:
        """Something that is another after each entry, so that a page knows when to look again."""
        if not self._path.exists():
            return ()
        with self._connection() as sql:
            return sql.execute("PRAGMA data_version").fetchone()[0], sql.total_changes

    # SQL

    def _assignment(self, text: str) -> Assignment:
        try:
            return Assignment.model_validate_json(text)
        except ValidationError as error:
            raise OperatorError(f"{self._path} is of a newer release, or damaged: {error}") from None

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        if not self._path.exists():
            return []
        with self._connection() as sql:
            return sql.execute(query, values).fetchall()

    @contextmanager
    def _write(self, *, durable: bool = True) -> Generator[sqlite3.Connection]:
        with self._connection() as sql:
            sql.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            sql.execute("BEGIN IMMEDIATE")
            with sql:
                yield sql

    @contextmanager
    def _connection(self) -> Generator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._sql is None:
                    self._sql = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
                    self._path.chmod(0o600)
                    self._sql.execute("PRAGMA journal_mode = WAL")
                    self._sql.executescript(_TABLES)
                yield self._sql
            except sqlite3.Error as error:
                if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                    raise StorageFull(f"no room to note in {self._path} what leaves, so nothing does") from None
                raise OperatorError(
                    f"{self._path}, this site's record of what leaves it, cannot be used: {error}. Restore it, or move "
                    "it away to begin another one"
                ) from None


def _dump(said: dict[str, Any] | None) -> str | None:
    return None if said is None else json.dumps(said)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
