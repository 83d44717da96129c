"""Waiting for what another process or thread does, on a machine that others use too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def slowness() -> float:
    """How many times longer than on a machine that does nothing else something takes now, as far as its load tells."""
    return max(2.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_until(
    true: Callable[[], T], within_s: float, what: str, *, every_s: float = 0.02, log: Path | None = None
) -> T:
    """What `true` returns, once it is true. log: a file whose end is told where it does not come true.

    within_s: on a machine that does nothing else; a busy one is given more. A bound that is not reached costs nothing,
    and one that is reached by a neighbour's load tells nothing.
    """
    began = time.monotonic()
    while not (found := true()):
        waited = time.monotonic() - began
        said = log.read_text()[-3000:] if log and log.exists() else ""
        assert waited < within_s * slowness(), f"not within {waited:.0f} s: {what}\n{said}"
        time.sleep(every_s)
    return found
