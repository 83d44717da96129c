"""What the coordinator relies on, wherever its blobs lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...protocol.encoding import DIGEST
from ...protocol.errors import BadUpdate, InternalError, NotFound

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,219}")
READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What a sweep deleted: how many blobs, their bytes, and how many uploads that nobody went on with."""

    blobs: int = 0
    bytes: int = 0
    parts: int = 0


class Blobs(Protocol):
    """Blobs that never change, and uploads that become blobs. Several processes may use one location at a time.

    Every method may raise Unavailable when the storage does not answer, and those that write StorageFull when it is
    full. `failpoint` is called with a name at each step that a crash could fall between; tests end the process there.
    An object of this kind that is passed to another process opens the same location there.
    """

    failpoint: Callable[[str], None]

    @property
    def location(self) -> str:
        """What `open_blobs` takes to open the same blobs again, in this process or in another one."""
        ...

    def has(self, sha256: str) -> bool: ...

    def path(self, sha256: str) -> Path:
        """A local file with the blob's bytes, to be read within minutes; raises NotFound when there is no such blob."""
        ...

    def keep(self, sha256: str) -> Path:
        """Like `path`, and no sweep deletes the blob within its grace from now: call it before a row names the blob."""
        ...

    def part_size(self, part: str) -> int:
        """How far an upload has come; 0 for one that has not begun."""
        ...

    def append(self, part: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        """Add bytes to an upload at `offset` and return its new size.

        Of several calls with one offset, in any processes, one succeeds. Raises WrongOffset, with the offset to go on
        from, unless `offset` is the size so far; TooLarge, with nothing written, where the upload would pass
        `limit_bytes`; StorageFull, with the upload as it was.
        """
        ...

    def finish(self, part: str, sha256: str) -> Path:
        """Make an upload a blob: checked against its hash, durable, then named. Repeating it is harmless.

        Raises BadUpdate when the bytes have another hash; the upload is deleted then, since no byte can be trusted.
        """
        ...

    def discard(self, part: str) -> None: ...

    def new(self) -> AbstractContextManager[Path]:
        """A path to write a file to; `adopt` makes it a blob, otherwise it is deleted.

        An OSError about a full disk inside the block leaves it as StorageFull.
        """
        ...

    def adopt(self, path: Path) -> str:
        """Make a file that was written to a path of `new` a blob and return its SHA-256."""
        ...

    def delete(self, sha256: str) -> None: ...

    def held(self) -> set[str]:
        """The SHA-256 of every blob."""
        ...

    def room(self) -> float:
        """Free bytes; infinite where nobody can say."""
        ...

    def require(self, size: int) -> None:
        """Raise StorageFull unless there is room for `size` more bytes and for the database to go on beside them."""
        ...

    def sweep(
        self, named: Callable[[], set[str]] | set[str], live_parts: set[str], *, grace_s: float, now: float
    ) -> Swept:
        """Delete blobs that nothing names and uploads that are not live, when they are older than `grace_s`.

        named: SHA-256 of every blob that a row needs. A function is asked after the blobs have been listed, and so
        sees every row that was committed before.
        live_parts: names of the uploads that may still go on.
        now: seconds since the epoch. A blob's age counts from when it was made, or last found by `finish`, `adopt` or
        `keep`.

        No row that is committed within `grace_s` after the `finish`, `adopt` or `keep` it rests on loses its blob:
        either it was committed before `named` was asked, and then the blob is named; or that call was less than
        `grace_s` ago, and then the blob is young. What makes a blob young and what deletes it exclude each other, and
        the age is read again in between.
        """
        ...


def checked_digest(sha256: str) -> str:
    if not DIGEST.fullmatch(sha256):
        raise NotFound("a blob is named by 64 hex digits")
    return sha256


def checked_part(part: str) -> str:
    if not _PART.fullmatch(part):
        raise InternalError(f"not a name for an upload: {part!r}")
    return part


def other_bytes(got: str, announced: str) -> BadUpdate:
    return BadUpdate(f"the uploaded bytes hash to {got[:12]}…, {announced[:12]}… was announced; send them again")


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
