"""What was read a moment ago: every request asks who its caller is, and the answer hardly ever changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .database import Database

FRESH_S = 300.0
SHARED_S = 5.0  # where others write too: a revocation by another process takes effect so much later at most
KEPT = 50_000

T = TypeVar("T")


class Fresh(Generic[T]):
    """Answers by key, read again after a while, and when this process has changed something."""

    def __init__(self, db: Database) -> None:
        self._db, self._lifetime_s = db, SHARED_S if db.shared else FRESH_S
        self._kept: dict[str, tuple[float, T]] = {}

    def peek(self, key: str) -> T | None:
        """What is known without reading."""
        found = self._kept.get(key)
        return found[1] if found is not None and 0 <= self._db.clock() - found[0] < self._lifetime_s else None

    def get(self, key: str, read: Callable[[], T]) -> T:
        if (known := self.peek(key)) is not None:
            return known
        now, kept = self._db.clock(), self._kept
        if len(kept) >= KEPT:
            kept.clear()
        value = read()
        if value is None:
            return value  # who is unknown may enrol any moment
        kept[key] = (now, value)  # into what `clear` has not replaced meanwhile
        return value

    def clear(self) -> None:
        """Forget all. A read that is under way writes into the old dictionary, which nobody reads any more."""
        self._kept = {}
