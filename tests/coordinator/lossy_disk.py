"""Disks that fail: one loses at a power cut what was not synced, one is full at a chosen call."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Any

from murmur.coordinator.blobs.disk import Disk

CALLS = ("open", "write", "truncate", "sync", "sync_folder", "mkdir", "rename", "unlink", "touch")


class PowerCut(BaseException):
    """The process ends here; it is no Exception, since no code of ours may go on after it."""


class Survives(Enum):
    SYNCED = auto()  # names of synced folders, bytes of synced files
    NAMES = auto()  # every name, but bytes of synced files only: the others hold zeros
    ALL = auto()  # the process died alone, the machine went on


class WatchedDisk(Disk):
    """A disk that calls `before` with the name of each call, and whether the call changes anything."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.before = before
        self.calls = 0

    def sync(self, file: int) -> None:
        pass  # no test cuts the power of this machine

    def sync_folder(self, folder: Path) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CALLS:
            return found

        def call(*args: Any) -> Any:
            self.calls += 1
            self.before(name)
            return found(*args)

        return call


class LossyDisk(WatchedDisk):
    """Remembers which bytes and which names are durable; `cut` makes the folder that a restarted machine would find.

    An inode number is not used twice while a test runs, because a descriptor keeps each file alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}
        self._alive: dict[int, int] = {}

    def open(self, path: Path, flags: int) -> int:
        file = super().open(path, flags)
        if (inode := os.fstat(file).st_ino) not in self._alive:
            self._alive[inode] = os.open(path, os.O_RDONLY)
        return file

    def sync(self, file: int) -> None:
        super().sync(file)
        self._bytes[os.fstat(file).st_ino] = os.pread(file, os.fstat(file).st_size, 0)

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self._names[folder] = _listing(folder)

    def cut(self, root: Path, to: Path, survives: Survives) -> Path:
        """Write what is left of a folder to another one, and return it."""
        to.mkdir()
        names = self._names.get(root, {}) if survives is Survives.SYNCED else _listing(root)
        for name, inode in names.items():
            if (root / name).is_dir():
                self.cut(root / name, to / name, survives)
            elif survives is Survives.ALL:
                (to / name).write_bytes((root / name).read_bytes())
            elif inode in self._bytes:
                (to / name).write_bytes(self._bytes[inode])
            else:
                size = os.fstat(self._alive[inode]).st_size if inode in self._alive else 0
                (to / name).write_bytes(b"\0" * size)
        return to

    def close(self) -> None:
        for file in self._alive.values():
            os.close(file)


class FullDisk(WatchedDisk):
    """Its call number `at` fails for want of space; of a write, half is done before."""

    def __init__(self, code: int = errno.ENOSPC) -> None:
        super().__init__(self._count)
        self.at, self.code, self.hit = 0, code, ""

    def _count(self, name: str) -> None:
        if self.calls == self.at and name not in ("unlink", "truncate", "open", "write"):  # the first two free space
            self._fail(name)

    def _fail(self, name: str) -> None:
        self.hit = name
        raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path, flags: int) -> int:
        if self.calls == self.at and flags & os.O_CREAT and not path.exists():
            self._fail("open")
        return super().open(path, flags)

    def write(self, file: int, data: bytes) -> None:
        if self.calls == self.at:
            super().write(file, data[: len(data) // 2])
            self._fail("write")
        super().write(file, data)


def _listing(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}
