"""What a request to the coordinator is, in the words of this site's record: the one place where kinds are told apart.

A message that says something of its own has a row in the record, with what it says where that can be read. Questions,
signs of life and the like are counted by the hour.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

UPDATE, PIECE, RESULT, INFO, OTHER = "update", "piece", "result", "info", "other"

# A kind, what a person reads for it, and what it holds.
KINDS = {
    UPDATE: ("Update", "what training has changed in the model, or an evaluation's measurements"),
    RESULT: ("Result", "names the update by its hash; in a round without masks also its weight and its metrics"),
    "advert": ("Keys", "public keys for one round, made for it and thrown away after it"),
    "shares": ("Key shares", "sealed parts of this round's secrets, one for each neighbour, which only it can open"),
    "agree": ("Who is in the sum", "a signature over the list of those whose updates are summed"),
    "reveal": ("Unmasking", "parts of others' secrets, so that the sum can be read and nothing else"),
    "failure": ("Refusal or error", "that this site does not deliver, and why, as far as share_errors lets it"),
    "enrolment": ("Enrolment", "this client's name and public key"),
    INFO: ("About this agent", "its release, the names of its tasks, its GPUs and processors"),
    OTHER: ("Another message", "one that this release of the record has no word for"),
    "poll": ("Questions for work", "whether there is work, and how far the work under way is"),
    "progress": ("Signs of life", "the phase and the step that a training has reached"),
    "question": ("Other questions", "for the next step of a round, or where an upload goes on"),
    "download": ("Downloads", "that this site fetches a model"),
    "token": ("Tokens", "signed requests for the token that questions carry"),
    "measurement": ("Measurements", "bytes without meaning, by which murmur client check measures the way"),
}
COUNTED = ("poll", "progress", "question", "download", "token", "measurement")  # the others have rows
_ASSIGNMENT = re.compile(r"/v1/assignments/(?P<id>[^/]+)/(?P<what>[a-z]+)(?:/(?P<kind>[a-z]+))?")
_PATHS = {"/v1/poll": "poll", "/v1/token": "token", "/v1/enrol": "enrolment", "/v1/transfer": "measurement"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """One request as it leaves: bytes of its body; of the message it is or brings, the size, the hash and the words.

    said: what the coordinator can read in it, as JSON has it; None where it reads only what nobody can, or nothing.
    """

    kind: str
    assignment: str = ""
    body_bytes: int
    size: int
    sha256: str = ""
    said: dict[str, Any] | None = None
    numbers: bool = field(default=False, kw_only=True)
    """Whether it holds numbers of this site's training, which are masked in a secure round."""

    @property
    def counted(self) -> bool:
        return not self.sha256


def describe(request: httpx.Request) -> Outgoing:
    """What this request is; one that is not known is `other`, with its hash, and never nothing."""
    path, body = request.url.path, _body(request)
    length = len(body) if body is not None else int(request.headers.get("Content-Length", "0"))
    found = _ASSIGNMENT.fullmatch(path)
    assignment = found["id"] if found else ""
    what = f"{request.method} {found['what']}" if found else ""
    said: dict[str, Any] | None = None

    if what == "POST upload" and body is not None:
        offer = _json(body)
        return Outgoing(kind=UPDATE, assignment=assignment, body_bytes=length, size=int(offer["size"]),
                        sha256=str(offer["sha256"]), numbers=True)  # fmt: skip
    if what == "PATCH upload":
        return Outgoing(kind=PIECE, assignment=assignment, body_bytes=length, size=length)
    if what == "POST complete" and body is not None:
        told = _json(body)
        inside = "data" in told
        said = {key: told[key] for key in ("sha256", "weight", "metrics") if key in told}
        sha256 = str(told["sha256"]) if inside else _sha256(body)
        return Outgoing(kind=UPDATE if inside else RESULT, assignment=assignment, body_bytes=length, size=length,
                        sha256=sha256, said=said, numbers=inside or "weight" in told)  # fmt: skip
    if what == "POST answers" and found and body is not None:
        return Outgoing(kind=found["kind"] if found["kind"] in KINDS else OTHER, assignment=assignment,
                        body_bytes=length, size=length, sha256=_sha256(body))  # fmt: skip
    if what == "POST failure" and body is not None:
        told = _json(body)
        said = {key: told[key] for key in ("code", "detail")}
        return Outgoing(kind="failure", assignment=assignment, body_bytes=length, size=length, sha256=_sha256(body),
                        said=said)  # fmt: skip
    if what == "POST progress":
        return Outgoing(kind="progress", assignment=assignment, body_bytes=length, size=length)
    if path == "/v1/enrol" and body is not None:
        told = _json(body)
        said = {key: told[key] for key in ("name", "public_key", "info")}
        return Outgoing(kind="enrolment", body_bytes=length, size=length, sha256=_sha256(body), said=said)
    if path in _PATHS:
        return Outgoing(kind=_PATHS[path], body_bytes=length, size=length)
    if request.method == "GET":
        kind = "download" if path.startswith("/v1/blobs/") else "question"
        return Outgoing(kind=kind, assignment=assignment, body_bytes=length, size=length)
    return Outgoing(kind=OTHER, assignment=assignment, body_bytes=length, size=length, sha256=_sha256(body or b""),
                    said={"request": f"{request.method} {path}"})  # fmt: skip


def info_of(request: httpx.Request) -> Outgoing | None:
    """What a poll says of this agent, which is a message of its own; None for other requests."""
    if request.url.path != "/v1/poll" or (body := _body(request)) is None:
        return None
    info = _json(body)["info"]
    text = json.dumps(info, sort_keys=True).encode()
    return Outgoing(kind=INFO, body_bytes=0, size=len(text), sha256=_sha256(text), said=info)


def _body(request: httpx.Request) -> bytes | None:
    """The body, unless it is a stream of an upload."""
    return request.content if isinstance(request.stream, httpx.ByteStream) else None


def _json(body: bytes) -> dict[str, Any]:
    return json.loads(body)  # our own, written a line above


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
