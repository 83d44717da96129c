"""The folders of simulated runs, each held by the process that simulates by a lock that ends with it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..protocol.errors import Conflict

FOLDER = "simulations"  # of a data folder
LOCK = "lock"
TRIES, PAUSE_S = 3, 0.05  # a coordinator that looks whether the lock is held holds it for an instant


@contextmanager
def held(place: Path) -> Generator[None]:
    """Hold a run's folder, made where it is not there; raises Conflict where another process does."""
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not any(_taken(lock) for _ in range(TRIES)):
            raise Conflict(f"{place.name} is being simulated by another process")
        yield
    finally:
        os.close(lock)


def left(simulations: Path) -> Iterator[Path]:
    """Folders of runs that a process of this machine simulated and none does any more."""
    for lock in simulations.glob(f"*/{LOCK}"):
        with suppress(OSError):  # it has ended meanwhile, or another account's
            looked = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(looked, fcntl.LOCK_SH | fcntl.LOCK_NB)
            finally:
                os.close(looked)
            yield lock.parent


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        time.sleep(PAUSE_S)
        return False
    return True
