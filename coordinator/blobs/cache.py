"""Local copies of blobs that lie elsewhere: the least recently used go first when there are too many."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .disk import Disk

LIMIT_BYTES = 32 << 30
IN_USE_S = 900.0  # a path that was handed out may be opened for so long: by a response that waits, by a long sum
NEW = "new-"


class Cache:
    """A folder of files named by their SHA-256; several processes may use it, since a file's time says when it was
    last handed out. It may pass its limit while more than that is in use."""

    def __init__(self, folder: Path, *, limit_bytes: int, disk: Disk) -> None:
        self._folder, self._limit_bytes, self._disk = folder, limit_bytes, disk
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str) -> Path | None:
        path = self._folder / sha256
        try:
            with self._disk.room_for(0, self._folder):
                self._disk.touch(path)
        except FileNotFoundError:
            return None
        return path

    @contextmanager
    def new(self, size: int = 0) -> Generator[Path]:
        """A path for a file of so many bytes to be written to, which is deleted unless `put` takes it."""
        self._make_room(size)
        path = self._folder / f"{NEW}{uuid.uuid4().hex}"
        try:
            with self._disk.room_for(0, self._folder):
                yield path
        finally:
            self._disk.unlink(path)

    def put(self, path: Path, sha256: str) -> Path:
        """Take a file whose hash was checked. It is synced: a name must not outlive its bytes in a power loss."""
        file = self._disk.open(path, os.O_RDWR)
        try:
            self._disk.sync(file)
        finally:
            os.close(file)
        target = self._folder / sha256
        self._disk.touch(path)
        self._disk.rename(path, target)
        self._make_room(0)
        return target

    def drop(self, sha256: str) -> None:
        self._disk.unlink(self._folder / sha256)

    def sweep(self, held: set[str], *, grace_s: float) -> None:
        """Delete copies of blobs that are gone, and what a dead process had begun to write."""
        now = time.time()
        for used, _, path in self._files():
            gone = path.name not in held and not path.name.startswith(NEW)
            if used < now - (IN_USE_S if gone else grace_s) and (gone or path.name.startswith(NEW)):
                self._disk.unlink(path)

    def _make_room(self, size: int) -> None:
        """Delete what was not used for longest while the limit, or the disk, has no room for `size` bytes more."""
        files = sorted(self._files())
        too_many = sum(held for _, held, _ in files) + size - self._limit_bytes
        missing = size + self._disk.reserve(self._folder) - self._disk.space(self._folder)[0]
        for used, held, path in files:
            if max(too_many, missing) <= 0 or used > time.time() - IN_USE_S:
                break
            if not path.name.startswith(NEW):
                self._disk.unlink(path)
                too_many, missing = too_many - held, missing - held

    def _files(self) -> Generator[tuple[float, int, Path]]:
        for path in self._folder.iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            yield found.st_mtime, found.st_size, path
