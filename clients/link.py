"""What an agent says to its coordinator, and the files that go either way, resumable at the byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from ..protocol.errors import PeerError, Unavailable, WrongOffset
from ..protocol.messages import (
    INLINE_BYTES,
    INLINE_HEADER,
    KNOWS_HEADER,
    POLL_HEADER,
    TOTAL_WEIGHT,
    Accepted,
    AnswerKind,
    Assignment,
    Complete,
    Enrol,
    Enrolled,
    Failure,
    Message,
    Poll,
    Progress,
    Step,
    StepKind,
    UploadOffer,
    UploadState,
    Work,
)
from .channel import Channel, parse_answer

LONGEST_WAIT_S = 240  # of a poll: fewer questions of agents that have nothing to do
SHORTEST_WAIT_S = 20
GRACE_S = 40.0  # that an answer may come after the wait that we asked for
CUT_S = 15.0  # a connection that is lost later than this was waited on for too long, or so we take it
GATEWAY = frozenset({502, 503, 504})  # a proxy's own words, when no problem document comes with them
STUCK = 20  # pieces in a row that moved an upload nowhere
PIECE_BYTES = 8 << 20  # one PATCH: at 200 ms round trip the wait for its answer costs 2 % of a link of 1 MB/s
CHUNK_BYTES = 256 << 10

OnBytes = Callable[[int], None]


class Link(Channel):
    """A client's side of the protocol. Calls return when the coordinator has answered, however long it is away.

    They raise what it answered: TooLate when the assignment is void, NotApproved, Conflict, ...; and Unavailable once
    the link was aborted, or after as many tries as the call allows itself.
    """

    _polls = 0
    inline_bytes = 0  # updates up to so many may go inside `Complete`, as the coordinator said last
    _wait_s = LONGEST_WAIT_S  # that a poll asks for; a proxy that cuts it halves it for the life of this process

    def manifests(self, run: str, after: int = 0) -> list[str]:
        """The manifests of a run that this client was asked to take part in, of the rounds after `after`."""

        def once() -> list[str]:
            with self.open("GET", f"/v1/runs/{quote(run, safe='')}/manifests?after={after}") as response:
                return list(response.iter_lines())

        return self.persist(once, tries=5)

    def enrol(self, enrol: Enrol) -> Enrolled:
        """Hand in the invitation, signed by the new key; given up after 5 tries, for a person is waiting."""
        return self.signed("/v1/enrol", _json(enrol), Enrolled, tries=5)

    def poll(self, poll: Poll) -> Work:
        """Ask for work: a long poll, of as long as this agent has found the way to its coordinator to bear."""

        def once() -> Work:
            wait_s, began = self._wait_s, self._monotonic()
            self._polls += 1
            headers = {"Prefer": f"wait={wait_s}"}  # RFC 7240; who does not know it answers in its own time
            headers |= {POLL_HEADER: f"{self._instance}.{self._polls}", KNOWS_HEADER: TOTAL_WEIGHT}
            try:
                with self.open(
                    "POST", "/v1/poll", body=_json(poll), headers=headers, read_s=wait_s + GRACE_S
                ) as response:
                    stated = response.headers.get(INLINE_HEADER, "0")
                    self.inline_bytes = min(int(stated), INLINE_BYTES) if stated.isdigit() else 0
                    return parse_answer(response, Work)
            except Unavailable as error:
                waited_s = self._monotonic() - began
                if error.facts.get("gateway") in GATEWAY or (error.facts.get("lost") and waited_s > CUT_S):
                    self._wait_s = max(SHORTEST_WAIT_S, wait_s // 2)
                raise

        return self.persist(once)

    def step(self, assignment: Assignment, after: StepKind | None) -> Step | None:
        """The coordinator's next word after `after`: a long poll; None when there was none in its time."""
        path = f"{_path(assignment)}/step?fence={assignment.fence}&after={after or ''}"

        def once() -> Step | None:
            with self.open("GET", path) as response:
                return None if response.status_code == 204 else parse_answer(response, Step)

        return self.persist(once)

    def answer(self, assignment: Assignment, kind: AnswerKind, text: str) -> None:
        path = f"{_path(assignment)}/answers/{kind}?fence={assignment.fence}"
        self.signed(path, text.encode(), Accepted)

    def complete(self, assignment: Assignment, complete: Complete) -> None:
        self.signed(f"{_path(assignment)}/complete", _json(complete), Accepted)

    def fail(self, assignment: Assignment, failure: Failure, *, tries: int = 8) -> None:
        self.signed(f"{_path(assignment)}/failure", _json(failure), Accepted, tries=tries)

    def progress(self, assignment: Assignment, progress: Progress) -> None:
        """A sign of life; tried once, for the next one says more."""
        path = f"{_path(assignment)}/progress?fence={assignment.fence}"
        self.bearer("POST", path, Accepted, body=_json(progress), tries=1)

    def download(self, sha256: str, path: Path, *, size: int, on_bytes: OnBytes | None = None) -> None:
        """Bring a blob to `path`, going on where an earlier try stopped; the name appears once its hash was right.

        size: its bytes; one byte more, or another hash, raises PeerError. on_bytes: told how many bytes are here, now
        and then; what it raises ends the download.
        """
        part = path.with_name(path.name + ".part")
        with part.open("a+b") as file:
            resumed = file.tell() > 0
            while True:
                self.persist(lambda: self._fetch_rest(sha256, file, size, on_bytes), mark=file.tell)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found == sha256:
                    break
                file.truncate(0)
                if not resumed:
                    part.unlink()
                    raise PeerError(f"a blob came with the SHA-256 {found}, {sha256} was asked for")
                resumed = False  # what lay here before may have been wrong: once more, from the first byte
        part.replace(path)

    def _fetch_rest(self, sha256: str, file: BinaryIO, size: int, on_bytes: OnBytes | None) -> None:
        have = file.seek(0, os.SEEK_END)
        if have == size:
            return
        if have > size:
            have = file.truncate(0)
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self.open("GET", f"/v1/blobs/{sha256}", headers=headers) as response:
            if response.status_code != 206:
                have = file.truncate(0)
            elif not (said := response.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
                raise PeerError(f"asked for a blob from byte {have} on, got {said!r}")
            for chunk in response.iter_raw():  # with a size, httpx would drop what it held when the connection broke
                have += len(chunk)
                if have > size:
                    raise PeerError(f"a blob goes on after the {size} bytes that it was said to have")
                file.write(chunk)
                if on_bytes is not None:
                    on_bytes(have)
        if have < size:
            raise Unavailable(f"a download ended after {have} of {size} bytes")

    def upload(self, assignment: Assignment, path: Path, *, on_bytes: OnBytes | None = None) -> str:
        """Bring an update to the coordinator, piece by piece from where it stands there; returns its SHA-256.

        on_bytes: told how many bytes are on their way, now and then; what it raises ends the upload. A coordinator
        that is away, or whose disk is full, is waited for; only one that answers and takes nothing is given up.
        """
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            target = f"{_path(assignment)}/upload"
            resume = f"{target}?fence={assignment.fence}"
            offer = UploadOffer(fence=assignment.fence, sha256=sha256, size=size)

            def offered() -> UploadState:
                if on_bytes is not None:
                    on_bytes(0)  # so that an upload that nobody wants any more ends here as well
                return self._post_signed(target, _json(offer), UploadState)

            offset = _offset(self.persist(offered), size)
            stuck = away = 0
            while offset < size:
                waits = False
                try:
                    state = self._send_piece(resume, file, offset, size, on_bytes)
                except WrongOffset:
                    state = self.bearer("GET", resume, UploadState)
                except Unavailable as error:
                    self.pause(away, error)
                    waits = True
                    state = self.bearer("GET", resume, UploadState)
                moved = _offset(state, size)
                away = away + 1 if waits and moved <= offset else 0
                stuck = stuck + 1 if not waits and moved <= offset else 0
                if stuck > STUCK:
                    raise PeerError(f"the upload stays at byte {offset} of {size} after {stuck} pieces")
                offset = moved
        return sha256

    def _send_piece(self, path: str, file: BinaryIO, offset: int, size: int, on_bytes: OnBytes | None) -> UploadState:
        end = min(offset + PIECE_BYTES, size)

        def body() -> Iterator[bytes]:
            file.seek(offset)
            while (at := file.tell()) < end:
                chunk = file.read(min(CHUNK_BYTES, end - at))
                yield chunk
                if on_bytes is not None:
                    on_bytes(at + len(chunk))

        headers = {
            "Upload-Offset": str(offset),
            "Content-Length": str(end - offset),  # without it the body would go out chunked
            "Content-Type": "application/offset+octet-stream",
        }
        return self.bearer("PATCH", path, UploadState, body=body, headers=headers, tries=1)


def _path(assignment: Assignment) -> str:
    return f"/v1/assignments/{assignment.id}"


def _json(message: Message) -> bytes:
    """What is not said is left out: a coordinator of an earlier release refuses a field that it does not know."""
    return message.model_dump_json(exclude_unset=True).encode()


def _offset(state: UploadState, size: int) -> int:
    if state.size != size or state.offset > size:
        raise PeerError(f"the coordinator is at byte {state.offset} of {state.size} of an upload of {size} bytes")
    return state.offset
