"""The site's own ledger: what each of its data sets has spent on local differential privacy, over all runs.

    reserved ── leaves ──> left        the update may have left: it counts for ever
        └────── release ─> void        nothing of it left: it counts no more

A charge is reserved before training begins and is on disk before a byte of the update leaves. An agent that is killed
in between finds it reserved; the same assignment, handed out again, takes its place. No coordinator is asked or told.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ..privacy.dp.accounting import Epsilon, Event, epsilon
from ..protocol.errors import OperatorError, PrivacyRefusal
from ..protocol.messages import Assignment
from ..protocol.sections import Dp, Train
from .settings import Policy

FILE = "ledger.sqlite"
State = Literal["reserved", "left", "void"]
ASSUMPTIONS = (
    "an example is one row of the task's training data: of a person with several rows, each is covered by itself",
    "the number of examples, error texts, and metrics where [policy] share_metrics allows them, are not covered",
    "noise is AES-256-CTR through Box and Muller in float64, added once a step; no defence against attacks on its "
    "rounding",
)
_TABLE = """
CREATE TABLE IF NOT EXISTS charge (
    id INTEGER PRIMARY KEY,
    dataset TEXT NOT NULL,     -- as client.toml calls it
    assignment TEXT NOT NULL,
    run TEXT NOT NULL,
    event TEXT NOT NULL,       -- privacy.dp.accounting's event, as JSON
    state TEXT NOT NULL CHECK (state IN ('reserved', 'left', 'void')),
    at TEXT NOT NULL           -- UTC
) STRICT
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """One training's part of the ledger."""

    dataset: str
    assignment: str
    run: str
    event: Event
    state: State
    at: str


def training_event(train: Train, dp: Dp, examples: int) -> Event:
    """What training on so many examples spends; `engine.batches.PoissonSchedule` takes these steps."""
    return Event(
        noise_multiplier=dp.noise_multiplier,
        sampling="poisson",
        rate=min(1.0, train.batch_size / examples),
        count=train.steps_over(examples),
    )


class Ledger:
    """A file of charges, safe for several threads of the one agent that writes it."""

    def __init__(self, path: Path) -> None:
        """The file is made with the first charge; raises OperatorError when there is one that cannot be read."""
        self._path = path
        self._lock = threading.Lock()
        if path.exists():
            self.charges()

    def reserve(self, assignment: Assignment, dataset: str, event: Event, policy: Policy) -> int:
        """Charge a training before it begins; gives the charge's number. It takes seconds: the epsilon is computed.

        What an earlier hold of the same assignment has reserved, and did not send, is void from then on. Raises
        PrivacyRefusal, and charges nothing, when the data set's epsilon would exceed the policy's.
        """
        with self._lock:
            if policy.epsilon:
                other = [
                    c.event
                    for c in self.charges(dataset)
                    if c.state == "left" or (c.state == "reserved" and c.assignment != assignment.id)
                ]
                _check([*other, event], policy)
            with self._transaction() as sql:
                sql.execute(
                    "UPDATE charge SET state = 'void' WHERE assignment = ? AND state = 'reserved'", (assignment.id,)
                )
                added = sql.execute(
                    "INSERT INTO charge (dataset, assignment, run, event, state, at) VALUES (?, ?, ?, ?, ?, ?)",
                    (dataset, assignment.id, assignment.run, json.dumps(event.to_json()), "reserved", _now()),
                )
                assert added.lastrowid is not None, "an insert has a row"
                return added.lastrowid

    def charged(self, assignment: Assignment) -> int | None:
        """The newest charge of an assignment that is not void: that of an update which was kept."""
        with self._transaction() as sql:
            found = sql.execute(
                "SELECT max(id) FROM charge WHERE assignment = ? AND state != 'void'", (assignment.id,)
            ).fetchone()
        return found[0]

    def leaves(self, charge: int, steps: int) -> None:
        """Settle a charge for the steps that were taken, before anything leaves; on disk when this returns.

        Raises PrivacyRefusal when it was released, or another training took its place: the update must not leave.
        """
        with self._transaction() as sql:
            text, state = sql.execute("SELECT event, state FROM charge WHERE id = ?", (charge,)).fetchone()
            if state == "void":
                raise PrivacyRefusal("policy_epsilon", "this update's place in the site's ledger was given up")
            if state == "reserved":
                event = replace(Event.from_json(json.loads(text)), count=max(1, steps))
                sql.execute(
                    "UPDATE charge SET state = 'left', event = ? WHERE id = ?", (json.dumps(event.to_json()), charge)
                )

    def release(self, charge: int) -> None:
        """Give back what was reserved for a training of which nothing left, and nothing will."""
        with self._transaction() as sql:
            sql.execute("UPDATE charge SET state = 'void' WHERE id = ? AND state = 'reserved'", (charge,))

    def charges(self, dataset: str | None = None) -> list[Charge]:
        """All charges in their order, of one data set or of all."""
        if not self._path.exists():
            return []
        with self._transaction() as sql:
            rows = sql.execute("SELECT dataset, assignment, run, event, state, at FROM charge ORDER BY id").fetchall()
        try:
            found = [
                Charge(dataset=d, assignment=a, run=r, event=Event.from_json(json.loads(e)), state=s, at=at)
                for d, a, r, e, s, at in rows
            ]
        except (ValueError, TypeError) as error:
            raise OperatorError(f"{self._path} is of a newer release, or damaged: {error}") from None
        return [c for c in found if dataset in {None, c.dataset}]

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as sql:
                sql.execute("PRAGMA journal_mode = WAL")
                sql.execute("PRAGMA synchronous = FULL")
                sql.execute("BEGIN IMMEDIATE")
                with sql:
                    sql.execute(_TABLE)
                    yield sql
        except sqlite3.Error as error:
            raise OperatorError(
                f"{self._path}, this site's ledger of differential privacy, cannot be used: {error}. Restore it: "
                "nothing else knows what was spent"
            ) from None


def spent(charges: list[Charge], delta: float) -> Epsilon:
    """The epsilon of a data set: what has left and what is reserved."""
    return best([c.event for c in charges if c.state != "void"], delta)


def best(events: list[Event], delta: float) -> Epsilon:
    """The PLD epsilon, which is the tighter; it takes seconds."""
    return epsilon(events, delta, "pld", unit="example", assumptions=ASSUMPTIONS)


def _check(events: list[Event], policy: Policy) -> None:
    # Both accountants give upper bounds, so one that stays below the budget is enough; RDP answers in milliseconds.
    value = epsilon(events, policy.delta, "rdp", unit="example").value
    if value > policy.epsilon:
        value = min(value, best(events, policy.delta).value)
    if value > policy.epsilon:
        raise PrivacyRefusal(
            "policy_epsilon",
            f"with this training the data would have spent an epsilon of {value:.3f} at delta {policy.delta:g}, and "
            f"this site allows {policy.epsilon:g}",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
