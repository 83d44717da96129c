"""Moves rounds on: looks at the rows of each open attempt, finds what has come true, and writes the next state.

`tick` may be called by anybody, at any time, any number of times: each call does what the rows call for and no more.
The only thing kept in memory is which sums are being taken just now; a restart takes them again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from ..aggregation.selection import select
from ..protocol.errors import MurmurError, OperatorError, PeerError, PrivacyRefusal
from ..protocol.messages import AnswerKind
from . import secure
from .blobs import Blobs
from .hub import Hub
from .rounds import (
    Abandoned,
    Event,
    KeysIn,
    MaskedUpdatesIn,
    PlainCohortChosen,
    SecureCohortChosen,
    SharesIn,
    SharesRevealed,
    SignaturesIn,
    State,
    UpdatesIn,
    advance,
)
from .store import Store
from .store.attempts import Attempt, Key, Outcome, Part

log = logging.getLogger(__name__)

TICK_S = 0.5  # how late a deadline may be noticed; everything else wakes the conductor at once


class Summer(Protocol):
    """What takes the sum; `worker.Worker` in a coordinator, a plain call in tests."""

    def submit(self, attempt: Attempt, identities: Mapping[str, bytes]) -> Future[Outcome]: ...


class Conductor:
    def __init__(self, store: Store, blobs: Blobs, hub: Hub, summer: Summer, *, clock: Callable[[], float]) -> None:
        self._store, self._blobs, self._hub, self._summer, self._clock = store, blobs, hub, summer, clock
        self._sums: dict[Key, Future[Outcome]] = {}

    def run(self) -> None:
        """Tick until the hub stops: the body of the conductor's thread. An error in one tick does not end it."""
        while not self._hub.stopping:
            self._hub.wait_for_work(TICK_S)
            try:
                self.tick()
            except Exception:
                log.exception("a tick failed; the next one tries again")

    def tick(self) -> None:
        """Bring every open attempt as far as its rows allow."""
        keys = self._store.rounds.open()
        self._sums = {key: sum_ for key, sum_ in self._sums.items() if key in keys}
        for key in keys:
            while self._step(self._store.rounds.load(key)):
                pass

    def _step(self, attempt: Attempt) -> bool:
        """Take one step with an attempt; true when there may be another one to take at once."""
        if attempt.state == State.SELECTING:
            return self._select(attempt)
        if attempt.state == State.AGGREGATING:
            return self._aggregate(attempt)
        event = self._judge(attempt)
        if event is None:
            return False
        if isinstance(event, Abandoned):
            self._fail(attempt, event.reason)
            return False
        self._store.rounds.move(attempt.key, attempt.state, advance(attempt.state, event))
        self._hub.wake(attempt.cohort)
        return True

    def _select(self, attempt: Attempt) -> bool:
        recipe, key = attempt.recipe, attempt.key
        there = self._store.clients.eligible()
        if len(there) < recipe.cohort.min:
            return False
        size = recipe.cohort.size
        cohort = select(there, size, seed=recipe.seed, round=key.round, attempt=key.attempt)
        threshold = secure.threshold(recipe, len(cohort)) if recipe.secure.on else 0
        if threshold > len(cohort):
            return False
        event = SecureCohortChosen() if recipe.secure.on else PlainCohortChosen()
        self._store.rounds.choose(key, cohort, advance(attempt.state, event), threshold)
        self._hub.wake(cohort)
        log.info("cohort chosen", extra={"run": key.run, "round": key.round, "clients": len(cohort)})
        return True

    def _judge(self, attempt: Attempt) -> Event | None:
        """What has come true about an attempt that waits for its clients; None while there is something to wait for."""
        missing, delivered, event = _expected(attempt)
        quiet = [p for p in missing if self._quiet_s(attempt, p) > attempt.recipe.cohort.patience_s]
        if quiet:
            names = [p.client for p in quiet]
            reason = f"no sign of progress for {attempt.recipe.cohort.patience_s:g} s while {attempt.state}"
            self._store.rounds.drop(attempt.key, names, reason)
            log.warning("clients dropped", extra={"run": attempt.key.run, "clients": names, "state": attempt.state})
            missing = [p for p in missing if p not in quiet]
        needed = max(attempt.threshold, attempt.recipe.cohort.min)
        if attempt.state == State.REVEALING:
            needed = attempt.threshold
            if delivered >= needed:
                return event
        if delivered + len(missing) < needed:
            return Abandoned(f"{delivered + len(missing)} clients left while {attempt.state}, {needed} needed")
        return None if missing else event

    def _quiet_s(self, attempt: Attempt, part: Part) -> float:
        return self._clock() - max(part.progress_at, attempt.state_at)

    def _aggregate(self, attempt: Attempt) -> bool:
        key = attempt.key
        under_way = self._sums.get(key)
        if under_way is None:
            identities = self._store.clients.identities(attempt.cohort)
            self._sums[key] = self._summer.submit(attempt, identities)
            self._sums[key].add_done_callback(lambda _: self._hub.work())
            self._hub.wake(attempt.cohort)
            return False
        if not under_way.done():
            return False
        del self._sums[key]
        try:
            outcome = under_way.result()
        except BrokenProcessPool:
            log.error("the summing process died; the sum is taken again", extra={"run": key.run, "round": key.round})
            return True
        except (PeerError, PrivacyRefusal, OperatorError) as error:
            self._fail(attempt, error.detail)
            return False
        except MurmurError as error:
            log.exception("the sum failed", extra={"run": key.run, "round": key.round})
            self._fail(attempt, f"internal error: {error.detail}")
            return False
        included = [p.client for p in attempt.uploaded]
        self._store.rounds.publish(key, attempt.base, included, outcome)
        self._forget(key)
        facts = {"run": key.run, "round": key.round, "clients": len(included), "sha256": outcome.sha256}
        log.info("round committed", extra=facts)
        self._hub.work()  # the next round is open now
        return False

    def _fail(self, attempt: Attempt, reason: str) -> None:
        key = attempt.key
        retry = key.attempt < attempt.recipe.cohort.attempts
        self._store.rounds.fail(key, attempt.state, reason, retry=retry)
        self._forget(key)
        log.warning("attempt failed", extra={"run": key.run, "round": key.round, "reason": reason, "retry": retry})
        self._hub.wake(attempt.cohort)
        self._hub.work()

    def _forget(self, key: Key) -> None:
        """Delete the updates of a closed attempt: one organization's update is nobody's to keep."""
        for sha256 in self._store.rounds.spent(key):
            self._blobs.delete(sha256)


def _expected(attempt: Attempt) -> tuple[list[Part], int, Event]:
    """(whom the attempt's state still waits for, how many have delivered, what is true when all have)."""
    if attempt.state == State.COLLECTING:
        missing = [p for p in attempt.parts if not p.update and not p.lost]
        return missing, len(attempt.uploaded), MaskedUpdatesIn() if attempt.threshold else UpdatesIn()
    kind, event = {
        State.KEYS: (AnswerKind.ADVERT, KeysIn()),
        State.SHARES: (AnswerKind.SHARES, SharesIn()),
        State.AGREEING: (AnswerKind.AGREE, SignaturesIn()),
        State.REVEALING: (AnswerKind.REVEAL, SharesRevealed()),
    }[attempt.state]
    asked = attempt.uploaded if attempt.state in (State.AGREEING, State.REVEALING) else attempt.parts
    missing = [p for p in asked if kind not in p.answers and not p.lost]
    delivered = sum(kind in p.answers and (p.state in ("working", "uploaded")) for p in asked)
    return missing, delivered, event


def start(conductor: Conductor) -> threading.Thread:
    thread = threading.Thread(target=conductor.run, name="conductor", daemon=True)
    thread.start()
    return thread
