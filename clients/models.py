"""The models a site has downloaded: named by their hash, the last few kept, for a round's evaluation follows it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from ..protocol.messages import Assignment
from .link import Link, OnBytes

WAIT_S = 0.2  # between two looks at the download that is in front
KEPT = 3  # this round's, the one before, and one more for another run


class Models:
    """A folder of models; one download at a time, safe for several threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._here = 0  # bytes of the model that is under way

    def fetch(
        self, assignment: Assignment, link: Link, on_bytes: OnBytes | None = None, on_wait: OnBytes | None = None
    ) -> Path:
        """The file of the assignment's model, from here or from the coordinator; its hash was checked just now.

        A download that an earlier agent began goes on at its byte. on_wait: told how far the download in front is,
        while there is one; what it raises ends this call.
        """
        path = self._folder / f"{assignment.model}.safetensors"
        while not self._lock.acquire(timeout=WAIT_S):
            if on_wait is not None:
                on_wait(self._here)
        try:
            if not self._is_whole(path, assignment):
                link.download(assignment.model, path, size=assignment.model_bytes, on_bytes=self._told(on_bytes))
            path.touch()
            self._prune()
        finally:
            self._lock.release()
        return path

    def _told(self, on_bytes: OnBytes | None) -> Callable[[int], None]:
        def told(count: int) -> None:
            self._here = count
            if on_bytes is not None:
                on_bytes(count)

        return told

    def _is_whole(self, path: Path, assignment: Assignment) -> bool:
        if not path.is_file() or path.stat().st_size != assignment.model_bytes:
            return False
        with path.open("rb") as file:  # a disk may have changed it since: training on another model breaks the round
            return hashlib.file_digest(file, "sha256").hexdigest() == assignment.model

    def _prune(self) -> None:
        for pattern in ("*.safetensors", "*.part"):  # half a model may be asked for again as well
            newest = sorted(self._folder.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True)
            for path in newest[KEPT:]:
                path.unlink(missing_ok=True)
