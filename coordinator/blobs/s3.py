"""Blobs as objects of a bucket, so that coordinators on several machines share them.

<prefix>/sha256/ab/<hash>           a blob; an object is there whole or not at all
<prefix>/parts/<upload>/<offset>    a piece of an upload under way, at 20 digits of its offset
<prefix>/sweeping/<hash>/<sweep>    a sweep is about to delete the blob

Uploads of several pieces that a crash ends stay hidden in the bucket: give it a lifecycle rule that aborts incomplete
multipart uploads after some days.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from ...protocol.encoding import DIGEST
from ...protocol.errors import BadUpdate, NotFound, OperatorError, TooLarge, Unavailable, WrongOffset
from .cache import LIMIT_BYTES, Cache
from .contract import READ_BYTES, Swept, checked_digest, checked_part, hash_file, other_bytes
from .disk import Disk

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

CHUNK_BYTES, CHUNKS = 8 << 20, 9_000  # S3 takes 10,000 chunks of one object at most
IN_FLIGHT = 4  # chunks in memory at a time
YOUNG_S = 3600.0  # a blob younger than this is not stored again to make it young
SWEEP_S = 900.0  # S3 refuses a request that was signed longer ago: a sweep that began before that deletes nothing more
DELETE_WITHIN_S = 60.0  # a sweep that needed longer than this to look at a blob leaves it to the next one
RETRIES: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}
CLIENT: ClientConfig = {"timeout": "1h", "read_timeout": "30s", "connect_timeout": "5s"}


class S3Blobs:
    """Blobs in `s3://bucket/prefix`; credentials, region and endpoint come from the AWS_… environment variables."""

    def __init__(self, url: str, cache: Path, cache_bytes: int = LIMIT_BYTES, disk: Disk | None = None) -> None:
        self.failpoint: Callable[[str], None] = lambda name: None
        self.wait: Callable[[float], None] = time.sleep
        self._url, self._folder, self._cache_bytes, self._disk = url, cache, cache_bytes, disk or Disk()
        self._cache = Cache(cache, limit_bytes=cache_bytes, disk=self._disk)
        self._fetching = [threading.Lock() for _ in range(16)]  # by first digit: a round's cohort asks for one model
        try:
            plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")  # the library reads the others itself
            self._store = S3Store.from_url(url, retry_config=RETRIES, client_options={**CLIENT, "allow_http": plain})
        except (BaseError, ValueError) as error:
            raise OperatorError(
                f"{url} with the AWS_… environment variables as they are: {_first_line(error)}"
            ) from None

    @property
    def location(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Blobs, (self._url, self._folder.absolute(), self._cache_bytes)

    def has(self, sha256: str) -> bool:
        return self._made_at(sha256) is not None

    def path(self, sha256: str) -> Path:
        if found := self._cache.find(checked_digest(sha256)):
            return found
        with self._fetching[int(sha256[0], 16)]:
            return self._cache.find(sha256) or self._fetch(sha256)

    def keep(self, sha256: str) -> Path:
        made_at = self._made_at(sha256)
        if made_at is None:
            raise NotFound(f"no blob {sha256[:12]}…")
        path = self.path(sha256)
        if made_at < time.time() - YOUNG_S:
            self._store_blob(path, sha256)
        return path

    def part_size(self, part: str) -> int:
        return sum(size for _, size in self._pieces(part))

    def append(self, part: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        size = self.part_size(part)
        if offset != size:
            raise WrongOffset(f"the upload goes on at byte {size}, not {offset}", offset=size)
        if size + len(data) > limit_bytes:
            raise TooLarge(f"the upload is said to have {limit_bytes} bytes, more were sent")
        self.failpoint("before append")
        if data:
            try:
                with _asking():
                    obstore.put(self._store, _piece(part, offset), data, mode="create", use_multipart=False)
            except AlreadyExistsError:  # another process was faster
                size = self.part_size(part)
                raise WrongOffset(f"the upload goes on at byte {size}, not {offset}", offset=size) from None
        self.failpoint("after append")
        return size + len(data)

    def finish(self, part: str, sha256: str) -> Path:
        if self.has(sha256):
            path = self.keep(sha256)
            self.discard(part)
            return path
        pieces = self._pieces(part)
        with self._cache.new(sum(size for _, size in pieces)) as path:
            try:
                got = self._gather(part, pieces, path)
            except FileNotFoundError:
                if self.has(sha256):  # another process finished it and deletes the pieces
                    return self.keep(sha256)
                raise BadUpdate("nothing has been uploaded") from None
            if got != sha256:
                self.discard(part)
                raise other_bytes(got, sha256)
            self._store_blob(path, sha256)
            kept = self._cache.put(path, sha256)
        self.discard(part)
        return kept

    def discard(self, part: str) -> None:
        self._remove([_piece(part, offset) for offset, _ in self._listed(part)])

    def new(self) -> AbstractContextManager[Path]:
        return self._cache.new()

    def adopt(self, path: Path) -> str:
        sha256 = hash_file(path)
        made_at = self._made_at(sha256)
        if made_at is None or made_at < time.time() - YOUNG_S:
            self._store_blob(path, sha256)
        self._cache.put(path, sha256)
        return sha256

    def delete(self, sha256: str) -> None:
        self._remove([_key(sha256)])
        self._cache.drop(sha256)

    def held(self) -> set[str]:
        return {sha256 for sha256, _, _ in self._blobs()}

    def room(self) -> float:
        return math.inf

    def require(self, size: int) -> None:
        """Nobody can say how much a bucket takes; what does not fit it is refused when it comes."""

    def sweep(
        self, named: Callable[[], set[str]] | set[str], live_parts: set[str], *, grace_s: float, now: float
    ) -> Swept:
        """As in `Blobs`; the grace is 2 hours at least, since a blob that is found again is made young by the hour.

        A bucket has no locks. A sweep says first that it will delete a blob, then looks at its age, then deletes it.
        Whoever relies on a blob stores it anew first, then looks for such a word, then whether the blob is there. When
        there is no word, either the sweep said it later, and finds the blob young; or it had ended, and had the blob
        been deleted after it was stored, it would not be there. When there is one, it waits.
        """
        grace_s = max(grace_s, 2 * YOUNG_S)
        listed = list(self._blobs())
        needed = named() if callable(named) else named
        blobs = freed = 0
        for sha256, size, made_at in listed:
            if sha256 not in needed and made_at < now - grace_s and self._sweep(sha256, now - grace_s):
                blobs, freed = blobs + 1, freed + size
        touched: dict[str, float] = {}
        for key, _, made_at in self._list("parts"):
            name = PurePosixPath(key).parts[1]
            touched[name] = max(made_at, touched.get(name, 0.0))
        dead = [name for name, at in touched.items() if name not in live_parts and at < now - grace_s]
        for name in dead:
            self.discard(name)
        self._remove([key for key, _, at in self._list("sweeping") if at < now - grace_s])  # of sweeps that died
        self._cache.sweep(self.held(), grace_s=grace_s)
        return Swept(blobs=blobs, bytes=freed, parts=len(dead))

    def _sweep(self, sha256: str, than: float) -> bool:
        self.failpoint("before sweep")
        word, began = f"sweeping/{sha256}/{uuid.uuid4().hex}", time.monotonic()
        with _asking():
            obstore.put(self._store, word, b"")
        try:
            made_at = self._made_at(sha256)
            self.failpoint("before delete")
            if made_at is None or made_at >= than or time.monotonic() - began > DELETE_WITHIN_S:
                return False
            self.delete(sha256)
            return True
        finally:
            self._remove([word])

    def _store_blob(self, path: Path, sha256: str) -> None:
        """Store a blob, or store it anew; returns when no sweep that began before can take it away."""
        size = path.stat().st_size
        for _ in range(30):
            self.failpoint("before put")
            with _asking():
                chunk = max(CHUNK_BYTES, size // CHUNKS)
                obstore.put(self._store, _key(sha256), path, chunk_size=chunk, max_concurrency=IN_FLIGHT)
            self.failpoint("after put")
            said = [at for _, _, at in self._list(f"sweeping/{sha256}") if at > time.time() - SWEEP_S]
            if not said and self.has(sha256):
                return
            self.wait(1)
        raise Unavailable("this blob is being swept just now; try again in a minute")

    def _fetch(self, sha256: str) -> Path:
        try:
            with _asking():
                size = obstore.head(self._store, _key(sha256))["size"]
            with self._cache.new(size) as path:
                if (got := self._download([_key(sha256)], path)) != sha256:
                    raise Unavailable(f"the object store's bytes for {sha256[:12]}… hash to {got[:12]}…; try again")
                return self._cache.put(path, sha256)
        except FileNotFoundError:
            raise NotFound(f"no blob {sha256[:12]}…") from None

    def _gather(self, part: str, pieces: list[tuple[int, int]], to: Path) -> str:
        """Write an upload's pieces to one file and return its SHA-256; raises FileNotFoundError when one is missing."""
        if not pieces:
            raise FileNotFoundError(part)
        return self._download([_piece(part, offset) for offset, _ in pieces], to)

    def _download(self, keys: list[str], to: Path) -> str:
        digest = hashlib.sha256()
        with to.open("wb") as file:
            for key in keys:
                with _asking():
                    chunks = obstore.get(self._store, key).stream(min_chunk_size=READ_BYTES)
                    for chunk in chunks:
                        digest.update(chunk)
                        file.write(chunk)
        return digest.hexdigest()

    def _pieces(self, part: str) -> list[tuple[int, int]]:
        """(offset, size) of the pieces from the first byte on without a hole, in order."""
        found: list[tuple[int, int]] = []
        end = 0
        for offset, size in self._listed(part):
            if offset == end:
                found.append((offset, size))
                end += size
        return found

    def _listed(self, part: str) -> list[tuple[int, int]]:
        return sorted(
            (int(PurePosixPath(key).name), size) for key, size, _ in self._list(f"parts/{checked_part(part)}")
        )

    def _blobs(self) -> Generator[tuple[str, int, float]]:
        for key, size, made_at in self._list("sha256"):
            if DIGEST.fullmatch(sha256 := PurePosixPath(key).name):
                yield sha256, size, made_at

    def _list(self, folder: str) -> Generator[tuple[str, int, float]]:
        """(key, size, time it was made at) of each object of a folder."""
        with _asking():
            for page in obstore.list(self._store, prefix=folder):
                for found in page:
                    yield found["path"], found["size"], found["last_modified"].timestamp()

    def _made_at(self, sha256: str) -> float | None:
        try:
            with _asking():
                return obstore.head(self._store, _key(sha256))["last_modified"].timestamp()
        except FileNotFoundError:
            return None

    def _remove(self, keys: list[str]) -> None:
        if keys:
            with _asking():
                obstore.delete(self._store, keys)


def _key(sha256: str) -> str:
    return f"sha256/{checked_digest(sha256)[:2]}/{sha256}"


def _piece(part: str, offset: int) -> str:
    return f"parts/{checked_part(part)}/{offset:020d}"


@contextmanager
def _asking() -> Generator[None]:
    """Say in words of ours what the library says when a request fails for good."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise OperatorError(
            f"the object store refuses us; check the AWS_… environment variables: {_first_line(error)}"
        ) from None
    except BaseError as error:
        raise Unavailable(f"the object store does not answer as it should: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
