"""Time that goes at one second per second: deadlines and leases must outlive somebody setting the clock."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady(since: float) -> Callable[[], float]:
    """A clock that shows `since` (seconds since 1970) now, and never jumps."""
    offset = since - time.monotonic()
    return lambda: time.monotonic() + offset
