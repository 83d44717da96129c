"""Sign-ins that fail: a name that is tried too often has to wait, and the audit log tells where they came from."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import Unavailable
from .store import Store

log = logging.getLogger(__name__)

TRIES, TRIES_S = 5, 60.0  # wrong passwords of one name before it has to wait
WRITTEN_S = 60.0  # between two entries in the audit log about the same address
ADDRESSES = 64  # told apart in that time; whoever has more of them must not fill the log
OTHERS = "other addresses"


@dataclass(slots=True)
class Tries:
    """What failed from one address since its last entry. accounts: those tried that there are, and no other name:
    people type passwords into the wrong field."""

    n: int = 0
    accounts: set[str] = field(default_factory=set)


class FailedSignIns:
    """Counts in memory: a crash forgets the last minute. clock: seconds that never go back."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock, self._lock = store, clock, threading.Lock()
        self._wrong: dict[str, list[float]] = {}
        self._tries: dict[str, Tries] = {}

    def check(self, name: str, address: str) -> None:
        """Raise Unavailable where a name's password was wrong too often just now."""
        with self._lock:
            since = self._clock() - TRIES_S
            self._wrong = {n: kept for n, at in self._wrong.items() if (kept := [t for t in at if t > since])}
            waits = len(self._wrong.get(name, ())) >= TRIES
        if waits:
            self._count(name, address)
            raise Unavailable(f"too many wrong passwords for this name; try again in {TRIES_S:.0f} s")

    def add(self, address: str, name: str | None = None) -> None:
        """Count one that failed; name: whose password it was to be, None for a one-time link."""
        if name is not None:
            with self._lock:
                self._wrong.setdefault(name, []).append(self._clock())
        self._count(name, address)

    def write(self) -> None:
        """Bring what was counted into the audit log, an entry for each address; kept where the database has no time."""
        with self._lock:
            tries, self._tries = self._tries, {}
        for address, t in tries.items():
            try:
                self._store.audit.failed_sign_ins(address, t.n, sorted(t.accounts))
            except Unavailable:
                with self._lock:
                    self._merge(address, t)

    async def keep_writing(self) -> None:
        """Write every minute, until it is cancelled."""
        while True:
            await asyncio.sleep(WRITTEN_S)
            await asyncio.to_thread(self.write)

    def _count(self, name: str | None, address: str) -> None:
        known = {name} if name is not None and self._store.accounts.role(name) is not None else set[str]()
        log.warning("sign-in failed", extra={"address": address})
        with self._lock:
            self._merge(address, Tries(1, known))

    def _merge(self, address: str, more: Tries) -> None:
        if address not in self._tries and len(self._tries) >= ADDRESSES:
            address = OTHERS
        tries = self._tries.setdefault(address, Tries())
        tries.n += more.n
        tries.accounts |= more.accounts
