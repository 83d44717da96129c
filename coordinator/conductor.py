"""Moves rounds on: looks at the rows of each open attempt, finds what has come true, and writes the next state.

`tick` may be called by anybody, at any time, any number of times: each call does what the rows call for and no more.
The only thing kept in memory is which sums are being taken just now; a restart takes them again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ..aggregation.grouping import draw_cohort, place
from ..aggregation.selection import select
from ..privacy.dp.accounting import Event as PrivacyEvent
from ..privacy.dp.plan import event_of, over_budget, view_of
from ..privacy.fixed_point import weight_bound
from ..protocol.errors import MurmurError, OperatorError, PeerError, PrivacyRefusal, StorageFull, Unavailable
from ..protocol.messages import TOTAL_WEIGHT, AnswerKind, Kind
from ..protocol.recipe import Recipe
from ..protocol.sections import CLIPPED, ROUNDING
from ..protocol.thresholds import fewest
from ..protocol.views import PrivacyView
from . import secure
from .blobs import Blobs
from .hub import Hub
from .janitor import Janitor
from .patience import why_lost
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
from .store.leases import LeaseLost
from .store.privacy import Spent

log = logging.getLogger(__name__)

REST = 2.0  # after a tick, times what it took: at most a third of a core, however many wake us
AWAY_S = 5.0  # after so long without a tick, clients' silence may be ours: the process stood still, or the database did
TICK_S = 0.5  # how late a deadline may be noticed; everything else wakes the conductor at once


class Summer(Protocol):
    """What takes the sum, and adds up what an ended run has spent of privacy.

    `worker.Worker` in a coordinator, a plain call in tests.
    """

    def submit(self, attempt: Attempt, identities: Mapping[str, bytes]) -> Future[Outcome]: ...

    def account(self, recipe: Recipe, spent: Sequence[PrivacyEvent]) -> Future[PrivacyView]: ...


class Conductor:
    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        hub: Hub,
        summer: Summer,
        *,
        clock: Callable[[], float],
        simulations: Path | None = None,
    ) -> None:
        self._store, self._blobs, self._hub, self._summer, self._clock = store, blobs, hub, summer, clock
        self._sums: dict[Key, Future[Outcome]] = {}
        self._reports: dict[str, Future[PrivacyView] | None] = {}
        self._janitor = Janitor(store, blobs, simulations)
        self.leads = False  # this process moves the rounds on
        self.ticked_at = time.monotonic()  # for whoever asks whether it still lives
        self._now = clock()  # as of the tick's begin: a process that is stopped within a tick holds it against nobody

    def run(self) -> None:
        """Tick until the hub stops: the body of the conductor's thread. An error in one tick does not end it."""
        took_s = 0.0
        while not self._hub.stopping:
            self._hub.wait_for_work(TICK_S)
            time.sleep(took_s * REST)  # a round of thousands wakes us thousands of times
            began = time.monotonic()
            try:
                self.tick()
            except LeaseLost:
                self._stand_by()
            except Unavailable as error:
                log.warning("the rounds stand still", extra={"why": error.detail})
            except Exception:
                log.exception("a tick failed; the next one tries again")
            took_s = time.monotonic() - began
        with suppress(MurmurError):
            self._store.lease.give_back()

    def tick(self) -> None:
        """Bring every open attempt as far as its rows allow, if this process holds the rounds."""
        began = time.monotonic()
        if not self._store.lease.take():
            return self._stand_by()
        if not self.leads or began - self.ticked_at > AWAY_S:
            self._store.rounds.resume()
        self._now = self._clock()
        if not self.leads:
            self.leads = True
            log.info("this process moves the rounds on")
        self._janitor.tend()
        keys = self._store.rounds.open()
        self._sums = {key: sum_ for key, sum_ in self._sums.items() if key in keys}
        for key in keys:
            if self._idle(key):
                continue
            try:
                while self._step(self._store.rounds.load(key)):
                    pass
            except StorageFull as error:
                self._janitor.pause(key.run, error)
        self._report()
        self.ticked_at = began

    def _stand_by(self) -> None:
        if self.leads:
            log.warning("another process moves the rounds on now")
        self.leads, self._sums = False, {}
        self.ticked_at = time.monotonic()

    def _idle(self, key: Key) -> bool:
        """Whether nothing can have come true, told by a few numbers: an attempt may have thousands of parts."""
        under_way = self._sums.get(key)
        if under_way is not None:
            return not under_way.done()
        head = self._store.rounds.head_of(key)
        if head.state != State.COLLECTING or head.recipe.secure.groups:  # one lost client may be its group's end
            return False
        waiting, goal, since = self._store.rounds.waiting(key), head.recipe.cohort.goal, head.state_at
        if not waiting.missing or (goal and waiting.uploaded >= goal):
            return False
        longest_s = self._now - max(min(waiting.heard_at, waiting.progress_at), since)
        return longest_s <= head.recipe.cohort.patience_s

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
        after, spent = advance(attempt.state, event), None
        if attempt.kind == Kind.TRAIN and attempt.dp.of_clients and _irrevocable(attempt, after):
            ledger = self._store.ledger.of(attempt.key.run)
            if why := over_budget(attempt.recipe, ledger):
                self._fail(attempt, why, final=True)
                return False
            more = event_of(attempt.dp)
            spent = Spent(event=more, total=view_of(attempt.recipe, [*ledger, more]))
        moved = self._store.rounds.move(attempt.key, attempt.state, after, spent)
        self._hub.wake(attempt.cohort)
        return moved

    def _select(self, attempt: Attempt) -> bool:
        recipe, key = attempt.recipe, attempt.key
        there = self._store.clients.eligible()
        needed = recipe.cohort.min
        if len(there) >= needed and recipe.secure.groups:
            return self._select_groups(attempt, there)
        if len(there) >= needed:
            asked = select(there, recipe.asked, seed=recipe.seed, round=key.round, attempt=key.attempt)
        else:
            asked = []
        threshold = 0
        if asked and recipe.secure.on:
            graph = recipe.mask_graph(len(asked))
            threshold, needed = graph.threshold, fewest(len(asked), *graph, needed)
        if len(there) < needed:
            self._store.rounds.explain(key, f"{len(there)} clients are online, {needed} are needed")
            return False
        return self._offer(attempt, dict.fromkeys(asked, 0), threshold)

    def _select_groups(self, attempt: Attempt, there: Sequence[str]) -> bool:
        recipe, key = attempt.recipe, attempt.key
        secure = recipe.secure
        placed = place(there, self._store.rounds.groups_of(key.run), secure.groups, recipe.seed)
        asked = draw_cohort(placed, recipe, round=key.round, attempt=key.attempt)
        sizes = Counter(asked.values())
        if len(sizes) < secure.fewest_groups:
            said = f"{len(sizes)} of {secure.groups} groups have {recipe.fewest} clients online"
            self._store.rounds.explain(key, f"{said}, {secure.fewest_groups} groups are needed")
            return False
        return self._offer(attempt, asked, max(recipe.mask_graph(n).threshold for n in sizes.values()))

    def _offer(self, attempt: Attempt, asked: Mapping[str, int], threshold: int) -> bool:
        """Fix the cohort; asked: each client with its group."""
        key, masked = attempt.key, attempt.recipe.secure.on
        event = SecureCohortChosen() if masked else PlainCohortChosen()
        bound = self._total_weight(attempt, [*asked]) if masked else 0
        if not self._store.rounds.choose(key, asked, advance(attempt.state, event), threshold, bound):
            return False
        self._hub.wake(asked)
        log.info("cohort chosen", extra={"run": key.run, "round": key.round, "clients": len(asked)})
        return True

    def _total_weight(self, attempt: Attempt, asked: Sequence[str]) -> int:
        """What a masked attempt's weights may add up to, known from the round before; 0 where no such bound is used.

        The sum of a first attempt is checked against it; a second one is made without, so it cannot fail for this.
        """
        recipe, key = attempt.recipe, attempt.key
        if attempt.kind != Kind.TRAIN or key.attempt > 1 or not recipe.bounds_total_weight:
            return 0
        total, summed = self._store.rounds.weighed(key)
        bound = weight_bound(total, summed, asked, recipe.strategy.weight_cap)
        return bound if bound and self._store.clients.all_know(asked, TOTAL_WEIGHT) else 0

    def _judge(self, attempt: Attempt) -> Event | None:
        """What has come true about an attempt that waits for its clients; None while there is something to wait for.

        In groups, one that cannot go on is dropped, and the others go on while they are enough.
        """
        if not attempt.recipe.secure.groups:
            return self._judge_sum(attempt)
        going_on: list[Event | None] = []
        for group in attempt.groups():
            event, n = self._judge_sum(group), group.parts[0].group
            if isinstance(event, Abandoned):
                self._store.rounds.drop_group(attempt.key, n, f"its group {n} was dropped: {event.reason}")
                self._hub.wake(group.cohort)
                log.warning("group dropped", extra={"run": attempt.key.run, "group": n, "why": event.reason})
            else:
                going_on.append(event)
        needed = attempt.recipe.secure.fewest_groups
        if len(going_on) < needed:
            return Abandoned(f"{len(going_on)} groups left while {attempt.state}, {needed} needed")
        return None if None in going_on else going_on[0]

    def _judge_sum(self, attempt: Attempt) -> Event | None:
        """The same of what is summed as one: a whole attempt, or a group of it."""
        missing, delivered, event = _expected(attempt)
        goal = attempt.recipe.cohort.goal
        if goal and attempt.state == State.COLLECTING and len(delivered) >= goal and not _lost(attempt, delivered):
            return event
        lost = {
            p.client: reason for p in missing if (reason := why_lost(attempt, p, self._now, self._store.rounds.gaps_s))
        }
        for reason in sorted(set(lost.values())):
            names = [name for name, why in lost.items() if why == reason]
            self._store.rounds.drop(attempt.key, names, reason)
            log.warning("clients dropped", extra={"run": attempt.key.run, "clients": names, "why": reason})
        missing = [p for p in missing if p.client not in lost]
        left, needed = [*delivered, *(p.client for p in missing)], secure.needed(attempt)
        if attempt.state == State.REVEALING:
            needed = attempt.threshold
            if len(delivered) >= needed and not _lost(attempt, delivered):
                return event
        if len(left) < needed:
            return Abandoned(f"{len(left)} clients left while {attempt.state}, {needed} needed")
        if lost := _lost(attempt, left):
            return Abandoned(
                f"while {attempt.state}, fewer than {attempt.threshold} clients are left that hold shares of "
                f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: the sum cannot be unmasked"
            )
        return None if missing else event

    def _aggregate(self, attempt: Attempt) -> bool:
        key = attempt.key
        under_way = self._sums.get(key)
        if under_way is None:
            identities = self._store.clients.identities(attempt.cohort)
            self._sums[key] = self._summer.submit(self._store.rounds.to_sum(attempt), identities)
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
        except StorageFull:
            raise
        except Unavailable as error:
            log.warning("the sum is taken again", extra={"run": key.run, "round": key.round, "why": error.detail})
            return False
        except (PeerError, PrivacyRefusal, OperatorError) as error:
            self._fail(attempt, error.detail)
            return False
        except MurmurError as error:
            log.exception("the sum failed", extra={"run": key.run, "round": key.round})
            self._fail(attempt, f"internal error: {error.detail}")
            return False
        included = [p.client for p in attempt.uploaded if p.group not in outcome.left_out]
        self._store.rounds.publish(key, attempt.base, included, outcome)
        self._forget(key)
        facts = {"run": key.run, "round": key.round, "clients": len(included), "sha256": outcome.sha256}
        log.info("round committed", extra=facts)
        if (clipped := outcome.facts.get("clipped", 0.0)) > CLIPPED:
            log.warning("values were cut: raise secure.clip_value", extra=facts | {"clipped": clipped})
        if (rounding := outcome.facts.get("rounding", 0.0)) > ROUNDING:
            advice = (
                "the fixed point is coarse: lower secure.clip_value or strategy.max_weight, or raise secure.ring_bits"
            )
            log.warning(advice, extra=facts | {"rounding": rounding})
        self._hub.work()  # the next round is open now
        return False

    def _report(self) -> None:
        """Have the ledgers of runs that have ended added up by the tighter accountant, which takes seconds."""
        for run in self._store.ledger.unreported():
            if run not in self._reports:
                ledger = self._store.ledger.of(run)
                self._reports[run] = report = self._summer.account(self._store.runs.recipe(run), ledger)
                report.add_done_callback(lambda _: self._hub.work())
            elif (report := self._reports[run]) is not None and report.done():
                del self._reports[run]
                try:
                    self._store.ledger.report(run, report.result())
                    log.info("privacy of an ended run accounted for", extra={"run": run})
                except BrokenProcessPool:
                    log.error("the summing process died; the ledger is added up again", extra={"run": run})
                except MurmurError:  # what was shown on the way stands: it is an upper bound
                    log.exception("a ledger could not be added up", extra={"run": run})
                    self._reports[run] = None

    def _fail(self, attempt: Attempt, reason: str, *, final: bool = False) -> None:
        key = attempt.key
        retry = not final and key.attempt < attempt.recipe.cohort.attempts
        self._store.rounds.fail(key, attempt.state, reason, retry=retry)
        self._forget(key)
        log.warning("attempt failed", extra={"run": key.run, "round": key.round, "reason": reason, "retry": retry})
        self._hub.wake(attempt.cohort)
        self._hub.work()

    def _forget(self, key: Key) -> None:
        """Delete the updates of a closed attempt: one organization's update is nobody's to keep."""
        for sha256 in self._store.rounds.spent(key):
            self._blobs.delete(sha256)


def _irrevocable(attempt: Attempt, after: State) -> bool:
    """Whether an attempt in this state has been, or will be, read: what its sum spends is spent, whatever follows."""
    return after == (State.REVEALING if attempt.threshold else State.AGGREGATING)


def _lost(attempt: Attempt, left: list[str]) -> list[str]:
    return secure.lost_secrets(attempt, left) if attempt.threshold and len(left) < len(attempt.cohort) else []


def _expected(attempt: Attempt) -> tuple[list[Part], list[str], Event]:
    """(whom the attempt's state still waits for, who has delivered, what is true when all have)."""
    if attempt.state == State.COLLECTING:
        missing = [p for p in attempt.parts if not p.update and not p.lost]
        return missing, [p.client for p in attempt.uploaded], MaskedUpdatesIn() if attempt.threshold else UpdatesIn()
    kind, event = {
        State.KEYS: (AnswerKind.ADVERT, KeysIn()),
        State.SHARES: (AnswerKind.SHARES, SharesIn()),
        State.AGREEING: (AnswerKind.AGREE, SignaturesIn()),
        State.REVEALING: (AnswerKind.REVEAL, SharesRevealed()),
    }[attempt.state]
    asked = attempt.uploaded if attempt.state in (State.AGREEING, State.REVEALING) else attempt.parts
    missing = [p for p in asked if kind not in p.answers and not p.lost]
    delivered = [p.client for p in asked if kind in p.answers and p.state in ("working", "uploaded")]
    return missing, delivered, event


def start(conductor: Conductor) -> threading.Thread:
    thread = threading.Thread(target=conductor.run, name="conductor", daemon=True)
    thread.start()
    return thread
