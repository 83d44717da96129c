"""Blobs as files of one folder, on a local disk or on one that several machines share.

sha256/ab/<hash>      a blob; never changed, only deleted
parts/<upload>        an upload under way; its size is how far it has come
lock                  held shared while a blob gets its name or is found again, exclusively while one is swept
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...protocol.encoding import DIGEST
from ...protocol.errors import BadUpdate, NotFound, TooLarge, WrongOffset
from .contract import Swept, checked_digest, checked_part, hash_file, other_bytes
from .digests import Digests
from .disk import Disk

NEW = "new-"


class FolderBlobs:
    """Blobs in a folder, which is made where there is none."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.failpoint: Callable[[str], None] = lambda name: None
        self._disk, self._digests = disk or Disk(), Digests()
        self._blobs, self._parts, self._lock = root / "sha256", root / "parts", root / "lock"
        root.parent.mkdir(parents=True, exist_ok=True)
        with self._disk.room_for(0, root.parent):
            for folder in (root, self._blobs, self._parts):
                self._disk.mkdir(folder)
            os.close(self._disk.open(self._lock, os.O_RDWR | os.O_CREAT))
            for folder in (root.parent, root):
                self._disk.sync_folder(folder)

    @property
    def location(self) -> str:
        return str(self.root.absolute())

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderBlobs, (self.root.absolute(),)

    def has(self, sha256: str) -> bool:
        return self._path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        path = self._path(sha256)
        if not path.is_file():
            raise NotFound(f"no blob {sha256[:12]}…")
        return path

    def keep(self, sha256: str) -> Path:
        path = self._path(sha256)
        try:
            with self._disk.room_for(0, self.root), self._sweeping(shared=True):
                self._disk.touch(path)
                self._sync_name(path)  # whoever gave it its name may have died before this
        except FileNotFoundError:
            raise NotFound(f"no blob {sha256[:12]}…") from None
        return path

    def part_size(self, part: str) -> int:
        try:
            return self._part(part).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, part: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        with self._disk.room_for(len(data), self.root), self._opened(part, create=offset == 0) as file:
            size = 0 if file is None else os.fstat(file).st_size
            if file is None or offset != size:
                raise WrongOffset(f"the upload goes on at byte {size}, not {offset}", offset=size)
            if size + len(data) > limit_bytes:
                raise TooLarge(f"the upload is said to have {limit_bytes} bytes, more were sent")
            self.require(len(data))
            self.failpoint("before append")
            self._write(part, file, size, data)
            self.failpoint("after append")
            return size + len(data)

    def _write(self, part: str, file: int, size: int, data: bytes) -> None:
        hasher = self._digests.take(part, file)
        hashing = self._digests.feed(hasher, data) if hasher else None
        try:
            self._disk.write(file, data)
        except OSError:
            self._disk.truncate(file, size)
            raise
        finally:
            if hashing:
                hashing.result()
        self._disk.send_out(file, size, len(data))
        if hasher:
            self._digests.put(part, file, hasher)

    def finish(self, part: str, sha256: str) -> Path:
        if found := self._find_again(sha256):
            self.discard(part)
            return found
        with self._disk.room_for(0, self.root), self._opened(part) as file:
            if file is None:
                if found := self._find_again(sha256):  # another call finished it while this one came here
                    return found
                raise BadUpdate("nothing has been uploaded")
            hasher = self._digests.take(part, file)
            got = hasher.hexdigest() if hasher else hash_file(self._part(part))
            if got != sha256:
                self._disk.unlink(self._part(part))
                raise other_bytes(got, sha256)
            return self._name(self._part(part), file, sha256)

    def discard(self, part: str) -> None:
        with self._opened(part) as file:  # not while another call finishes it
            if file is not None:
                self._disk.unlink(self._part(part))

    @contextmanager
    def new(self) -> Generator[Path]:
        path = self._parts / f"{NEW}{uuid.uuid4().hex}"
        try:
            with self._disk.room_for(0, self.root):
                yield path
        finally:
            self._disk.unlink(path)

    def adopt(self, path: Path) -> str:
        sha256 = hash_file(path)
        if self._find_again(sha256):
            return sha256
        file = self._disk.open(path, os.O_RDWR)
        try:
            self._name(path, file, sha256)
        finally:
            os.close(file)
        return sha256

    def delete(self, sha256: str) -> None:
        self._disk.unlink(self._path(sha256))

    def held(self) -> set[str]:
        return {path.name for path in self._blobs.glob("??/*") if DIGEST.fullmatch(path.name)}

    def room(self) -> float:
        return self._disk.space(self.root)[0]

    def require(self, size: int) -> None:
        self._disk.require(self.root, size)

    def sweep(
        self, named: Callable[[], set[str]] | set[str], live_parts: set[str], *, grace_s: float, now: float
    ) -> Swept:
        old = {path.name for path, _ in _older(map(self._path, self.held()), now - grace_s)}
        needed = named() if callable(named) else named
        blobs = freed = parts = 0
        for sha256 in sorted(old - needed):
            self.failpoint("before sweep")
            with self._sweeping():
                for path, size in _older([self._path(sha256)], now - grace_s):  # it may have become young since
                    self._disk.unlink(path)
                    blobs, freed = blobs + 1, freed + size
        for path, _ in _older(self._parts.iterdir(), now - grace_s):
            if path.name not in live_parts:
                self.discard(path.name)
                parts += 1
        return Swept(blobs=blobs, bytes=freed, parts=parts)

    def _find_again(self, sha256: str) -> Path | None:
        try:
            return self.keep(sha256)
        except NotFound:
            return None

    def _name(self, source: Path, file: int, sha256: str) -> Path:
        """Give whole and checked bytes their name, once they are durable."""
        target = self._path(sha256)
        self._disk.mkdir(target.parent)
        self.failpoint("before sync")
        try:
            self._disk.sync(file)
        except OSError:
            self._disk.unlink(source)  # after a failed sync nobody knows what is on the disk: it has to come again
            raise
        self.failpoint("before rename")
        with self._sweeping(shared=True):
            self._disk.touch(source)
            self._disk.rename(source, target)
        self.failpoint("after rename")
        self._sync_name(target)
        self.failpoint("after sync")
        return target

    def _sync_name(self, path: Path) -> None:
        for folder in (path.parent, path.parent.parent):
            self._disk.sync_folder(folder)

    @contextmanager
    def _sweeping(self, *, shared: bool = False) -> Generator[None]:
        file = self._disk.open(self._lock, os.O_RDWR)
        try:
            self._disk.lock(file, shared=shared)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _opened(self, part: str, *, create: bool = False) -> Generator[int | None]:
        """The file of an upload, locked; None where there is none."""
        path = self._part(part)
        file = self._lock_file(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0))
        try:
            yield file
        finally:
            if file is not None:
                os.close(file)

    def _lock_file(self, path: Path, flags: int) -> int | None:
        while True:
            try:
                file = self._disk.open(path, flags)
            except FileNotFoundError:
                return None
            self._disk.lock(file)
            try:
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
            except FileNotFoundError:
                pass
            os.close(file)  # the upload was finished or discarded while this call waited: look again

    def _path(self, sha256: str) -> Path:
        return self._blobs / checked_digest(sha256)[:2] / sha256

    def _part(self, part: str) -> Path:
        return self._parts / checked_part(part)


def _older(paths: Iterable[Path], than: float) -> Generator[tuple[Path, int]]:
    """Those of the paths, with their sizes, that were last touched before a time; one that vanishes is left out."""
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mtime < than:
            yield path, found.st_size
