"""The models a site has downloaded: named by their hash, the last few kept, for a round's evaluation follows it."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from ..protocol.messages import Assignment
from .link import Link, OnBytes

KEPT = 3  # this round's, the one before, and one more for another run


class Models:
    """A folder of models; one download at a time, safe for several threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()

    def fetch(self, assignment: Assignment, link: Link, on_bytes: OnBytes | None = None) -> Path:
        """The file of the assignment's model, from here or from the coordinator; its hash was checked just now."""
        path = self._folder / f"{assignment.model}.safetensors"
        with self._lock:
            if not self._is_whole(path, assignment):
                link.download(assignment.model, path, size=assignment.model_bytes, on_bytes=on_bytes)
            path.touch()
            self._prune()
        return path

    def _is_whole(self, path: Path, assignment: Assignment) -> bool:
        if not path.is_file() or path.stat().st_size != assignment.model_bytes:
            return False
        with path.open("rb") as file:  # a disk may have changed it since: training on another model breaks the round
            return hashlib.file_digest(file, "sha256").hexdigest() == assignment.model

    def _prune(self) -> None:
        newest = sorted(self._folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in [*newest[KEPT:], *self._folder.glob("*.part")]:
            path.unlink(missing_ok=True)
