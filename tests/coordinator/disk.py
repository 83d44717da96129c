"""A disk that forgets: what was not synced when the power fails may be gone, each part of it on its own."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

Inode = int


class Disk:
    """Watches `os.fsync` below a folder; `lose_power` brings the folder to a state that a crash could leave.

    As POSIX has it: syncing a file makes its bytes last, not its name; syncing a folder makes its names last, not the
    bytes behind them. What was never synced is there or not, by the throw of a coin for each file and folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bytes: dict[Inode, bytes] = {}
        self._names: dict[Path, dict[str, Inode]] = {}
        self.lost = 0
        for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            self._sync_folder(folder)
        for file in (p for p in root.rglob("*") if p.is_file()):
            self._bytes[file.stat().st_ino] = file.read_bytes()

    def __enter__(self) -> Disk:
        self._fsync = os.fsync
        self._patch: Any = mock.patch("os.fsync", self.fsync)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            if path.is_dir():
                self._sync_folder(path)
            else:
                self._bytes[path.stat().st_ino] = path.read_bytes()
        self._fsync(descriptor)

    def _sync_folder(self, folder: Path) -> None:
        self._names[folder] = {entry.name: entry.inode() for entry in os.scandir(folder)}

    def lose_power(self, draw: random.Random) -> None:
        """Throw the coins; what the disk then holds is what lasts from now on."""
        now = {p.stat().st_ino: p for p in self.root.rglob("*")}
        files = {inode: path.read_bytes() for inode, path in now.items() if path.is_file()}
        folders = {inode: path for inode, path in now.items() if path.is_dir()}
        folders[self.root.stat().st_ino] = self.root
        seen = {path: {entry.name: entry.inode() for entry in os.scandir(path)} for path in folders.values()}
        kept = {path: self._either(draw, self._names.get(path, {}), names) for path, names in sorted(seen.items())}
        held = dict(self._bytes)  # a deleted file may be back with what it held
        held |= {i: self._either(draw, self._bytes.get(i, b""), data) for i, data in sorted(files.items())}
        for path in sorted(folders.values(), reverse=True):
            for entry in list(os.scandir(path)):
                if entry.is_file():
                    os.unlink(entry.path)
        self._bytes.clear()
        for path, names in kept.items():
            if not self._reached(path, kept):
                continue
            for name, inode in names.items():
                if inode not in folders:
                    (path / name).write_bytes(held.get(inode, b""))
        for path in sorted(folders.values(), reverse=True):
            if path != self.root and not self._reached(path, kept):
                path.rmdir()
        self.__init__(self.root)

    def _either(self, draw: random.Random, synced: Any, newest: Any) -> Any:
        if synced == newest or draw.random() < 0.5:
            return newest
        self.lost += 1
        return synced

    def _reached(self, path: Path, kept: dict[Path, dict[str, Inode]]) -> bool:
        """Whether every folder on the way to this one still names the next."""
        while path != self.root:
            if path.name not in kept.get(path.parent, {}):
                return False
            path = path.parent
        return True
