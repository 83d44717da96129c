"""What was read a moment ago: every request asks who its caller is, and the answer hardly ever changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

FRESH_S = 5.0  # a revocation by another process on the same database takes effect so much later at most
KEPT = 50_000

T = TypeVar("T")


class Fresh(Generic[T]):
    """Answers by key, read again when they are older than `FRESH_S` or this process has changed something."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[float, T]] = {}

    def peek(self, key: str) -> T | None:
        """What is known without reading."""
        found = self._kept.get(key)
        return found[1] if found is not None and 0 <= self._clock() - found[0] < FRESH_S else None

    def get(self, key: str, read: Callable[[], T]) -> T:
        if (known := self.peek(key)) is not None:
            return known
        now, kept = self._clock(), self._kept
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
