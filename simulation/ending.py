"""How a simulation ends when its process is told to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ended_by_sigterm() -> Generator[None]:
    """Let SIGTERM leave the block as Ctrl-C does, by an exception: files in memory and workers go with it.

    Only in the main thread, which alone may say so, and where nobody else has.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def ended(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
