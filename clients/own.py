"""What a client keeps of a run from round to round and shows nobody: heads that stay at the site, control variates.

own/<run>.<round>.safetensors    as it was after that round; the last two of each run

A round that is tried again begins from the same file as its first attempt did.
"""

from __future__ import annotations

import time
from pathlib import Path

from .durable import sync_folder

KEPT = 2  # of each run: after this round, and what this round began with
KEPT_S = 90 * 86_400.0  # of a run that nobody has asked for since


class Own:
    """The files of all runs of one client."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink(missing_ok=True)

    def before(self, run: str, round: int) -> Path | None:
        """What the client's last round before this one left; None where it took part in none, or it left nothing."""
        rounds = [n for n in self._rounds(run) if n < round]
        return self._path(run, max(rounds)) if rounds else None

    def adopt(self, run: str, round: int, path: Path) -> None:
        """Keep a file, which is on disk whole, as what this round left; it is moved."""
        path.replace(self._path(run, round))
        sync_folder(self._folder)
        for old in sorted(self._rounds(run))[:-KEPT]:
            self._path(run, old).unlink(missing_ok=True)

    def _path(self, run: str, round: int) -> Path:
        return self._folder / f"{run}.{round}.safetensors"

    def _rounds(self, run: str) -> list[int]:
        found = (path.stem.rpartition(".") for path in self._folder.glob("*.safetensors"))
        return [int(number) for of, _, number in found if of == run]
