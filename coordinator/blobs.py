"""Models and updates as files named by their SHA-256: what has its name is whole and on disk.

sha256/ab/<hash>      a blob; never changed, only deleted
parts/<upload>        an upload under way; its size is how far it has come
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from ..protocol.encoding import DIGEST
from ..protocol.errors import BadUpdate, InternalError, NotFound, TooLarge, WrongOffset

_PART = re.compile(r"[A-Za-z0-9_.:-]{1,220}")
_READ_BYTES = 1 << 20


class Blobs:
    """A folder of blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parts = root / "parts"
        self.failpoint: Callable[[str], None] = lambda name: None  # where the crash tests end the process
        (root / "sha256").mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob lies; raises NotFound when it does not."""
        path = self._path(sha256)
        if not path.is_file():
            raise NotFound(f"no blob {sha256[:12]}…")
        return path

    def _path(self, sha256: str) -> Path:
        if not DIGEST.fullmatch(sha256):
            raise NotFound("a blob is named by 64 hex digits")
        return self.root / "sha256" / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self._path(sha256).is_file()

    def part_size(self, part: str) -> int:
        path = self._part(part)
        return path.stat().st_size if path.exists() else 0

    def append(self, part: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        """Add bytes to an upload at `offset` and return its new size.

        Raises WrongOffset, with the offset to go on from, unless `offset` is the size so far; TooLarge, with nothing
        written, where the upload would pass `limit_bytes`.
        """
        with self._part(part).open("ab") as file:
            size = file.tell()
            if offset != size:
                raise WrongOffset(f"the upload goes on at byte {size}, not {offset}", offset=size)
            if size + len(data) > limit_bytes:
                raise TooLarge(f"the upload is said to have {limit_bytes} bytes, more were sent")
            file.write(data)
            file.flush()
            self.failpoint("after append")
            return size + len(data)

    def finish(self, part: str, sha256: str) -> Path:
        """Make an upload a blob: checked against its hash, synced, renamed. Repeating it is harmless.

        Raises BadUpdate when the bytes have another hash; the upload is deleted then, since no byte can be trusted.
        """
        if self.has(sha256):
            self._part(part).unlink(missing_ok=True)
            return self.path(sha256)
        source = self._part(part)
        if not source.exists():
            raise BadUpdate("nothing has been uploaded")
        got = hash_file(source)
        if got != sha256:
            source.unlink()
            raise BadUpdate(f"the uploaded bytes hash to {got[:12]}…, {sha256[:12]}… was announced; send them again")
        return self._adopt(source, sha256)

    def discard(self, part: str) -> None:
        self._part(part).unlink(missing_ok=True)

    @contextmanager
    def new(self) -> Generator[Path]:
        """A path to write a file to, on the same file system; `adopt` makes it a blob, otherwise it is deleted."""
        path = self._parts / f"new-{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def adopt(self, path: Path) -> str:
        """Make a file that was written to a path of `new` a blob and return its SHA-256."""
        sha256 = hash_file(path)
        self._adopt(path, sha256)
        return sha256

    def _adopt(self, source: Path, sha256: str) -> Path:
        target = self._path(sha256)
        target.parent.mkdir(exist_ok=True)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        self.failpoint("before rename")
        source.replace(target)
        self.failpoint("after rename")
        for folder in (target.parent, target.parent.parent):
            _sync_folder(folder)
        return target

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)

    def require(self, size: int) -> None:
        pass

    def sweep(self, named, live, *, grace_s, now):
        from types import SimpleNamespace

        return SimpleNamespace(blobs=0, parts=0, bytes=0)

    def _part(self, part: str) -> Path:
        if not _PART.fullmatch(part):
            raise InternalError(f"not a name for an upload: {part!r}")
        return self._parts / part


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_blobs(location, cache):
    return Blobs(Path(location))
