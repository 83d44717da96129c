"""Where the files of a simulation lie that no store keeps."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from .history import History


def in_folder(folder: Path | str | None, run: Callable[[Path], History]) -> History:
    """What `run` gives, its files in the folder or, for as long as it lives, in one of its own."""
    place = Path(folder) if folder is not None else Path(mkdtemp(prefix="murmur-", dir=memory_disk()))
    place.mkdir(parents=True, exist_ok=True)
    try:
        history = run(place)
    except BaseException:
        if folder is None:
            shutil.rmtree(place)
        raise
    if folder is None:
        weakref.finalize(history, shutil.rmtree, place, ignore_errors=True)  # at exit, too
    return history


def memory_disk() -> str | None:
    """A folder in memory where there is one with room: models and updates are written and read once each."""
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2 << 30:
        return str(shm)
    return None
