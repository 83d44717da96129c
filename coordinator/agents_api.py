"""The addresses that agents call: thin shells over `Conversation`. Agents call, the coordinator never does.

Who waits, waits without a thread: a poll or a step that has nothing to say parks on the hub until a commit concerns it.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..protocol.encoding import fingerprint, unb64
from ..protocol.errors import BadRequest, NotAllowed, NotApproved, NotAuthenticated, NotFound, TooLarge
from ..protocol.messages import (
    INLINE_BYTES,
    INLINE_HEADER,
    KNOWS_HEADER,
    POLL_HEADER,
    Accepted,
    AnswerKind,
    Complete,
    Enrol,
    Enrolled,
    Failure,
    Poll,
    Progress,
    Step,
    StepKind,
    Token,
    UploadOffer,
    UploadState,
    Work,
)
from ..protocol.signatures import MAX_AGE_S, verify
from .conversation import signs_of
from .http import (
    BlobResponse,
    Handler,
    Parts,
    Signed,
    WithParts,
    active,
    answer,
    bearer,
    body_of,
    chunks_of,
    read,
    signed,
    target,
    verify_active,
)
from .people import hash_token, new_token
from .store.signs import Seen, Sign

PARK_S = 20.0  # below the 25 s that the usual proxies wait for a first byte; longer where the agent says it may be
POLLS_PER_S = 30.0  # of all idle agents together
SMALL_BYTES = 64 << 10  # a model up to this goes out in one piece
APPEND_BYTES = 4 << 20  # of an upload held in memory before it is written
MEASURED_BYTES = 8 << 20  # most of a transfer that only measures the way

router = APIRouter(prefix="/v1")
Active = Annotated[Signed, Depends(active)]
Fence = Annotated[int, Query(ge=1, lt=1 << 63)]  # what a database holds in an integer
Round = Annotated[int, Query(ge=0, lt=1 << 63)]
Bearer = Annotated[str, Depends(bearer)]
T = TypeVar("T")


@router.get("/ca")
def ca(p: WithParts) -> PlainTextResponse:
    """The CA that signed this coordinator's certificate; agents compare it with their invitation's fingerprint."""
    if p.ca_pem is None:
        raise NotFound("this coordinator has no CA of its own")
    return PlainTextResponse(p.ca_pem, media_type="application/x-pem-file")


@router.post("/enrol")
async def enrol(request: Request, p: WithParts) -> JSONResponse:
    body = await body_of(request)
    message = read(Enrol, body)
    key = unb64(message.public_key)
    if len(key) != 32:
        raise BadRequest("an Ed25519 public key has 32 bytes")

    def work() -> JSONResponse:
        found = verify(
            request.method,
            target(request),
            request.headers,
            body,
            public_key_of=lambda name: key if name == message.name else None,
            now=p.wall_clock(),
        )
        p.store.clients.use_nonce(found.keyid, found.nonce, lifetime_s=2 * MAX_AGE_S)
        info = message.info.model_dump(mode="json")
        p.store.clients.enrol(message.name, hash_token(message.token), key, info)
        state = "active" if p.store.clients.state(message.name) == "active" else "pending"
        return answer(Enrolled(client=message.name, state=state, fingerprint=fingerprint(key)))

    return await run_in_threadpool(work)


@router.post("/token")
def token(who: Annotated[Signed, Depends(signed)], p: WithParts) -> JSONResponse:
    state = p.store.clients.state(who.client)
    if state == "pending":
        raise NotApproved("an admin has to approve this client's key first")
    if state != "active":
        raise NotAuthenticated()
    made = new_token()
    p.store.clients.issue_token(who.client, hash_token(made), lifetime_s=p.settings.token_s)
    return answer(Token(token=made, expires_s=p.settings.token_s))


async def poll(request: Request, p: Parts) -> Response:
    """POST /v1/poll, which idle clients wait in: `http.Front` calls it without the machinery of an endpoint."""
    client = await bearer(request, p)
    wait_s = _park_s(p, request.headers.get("prefer", ""))
    message = read(Poll, await body_of(request))
    knows = tuple(sorted(set(_KNOWN.findall(request.headers.get(KNOWS_HEADER, "")[:200]))))
    seen, signs = signs_of(client, message, expected_s=wait_s, knows=knows)
    newest = p.hub.polls[client] = p.hub.polls.get(client, 0) + 1
    if signs:
        await p.heartbeats.note([seen], signs)
    else:
        p.heartbeats.tell(seen)
    busy, number = frozenset(message.busy), _POLL.fullmatch(request.headers.get(POLL_HEADER, ""))
    which = (number[1], int(number[2])) if number else None
    del message, number, seen, signs  # it waits for minutes: nothing of this should

    async def ask() -> Work | None:
        if p.hub.polls[client] != newest:
            return None
        if not busy and p.conversation.idle(client):
            return Work()
        return await run_in_threadpool(p.conversation.work, client, busy, which)

    work = await _parked(request, p, client, ask, lambda w: w is None or w.assignment or w.void, wait_s)
    response = answer(work or Work())
    response.headers[INLINE_HEADER] = str(INLINE_BYTES)
    return response


@router.get("/assignments/{assignment}/step")
async def step(
    assignment: str, fence: Fence, request: Request, client: Bearer, p: WithParts, after: str = ""
) -> Response:
    if after and after not in set(StepKind):
        raise BadRequest(f"after is one of {', '.join(StepKind)}")

    async def ask() -> Step | None:
        return await run_in_threadpool(p.conversation.step, client, assignment, fence, after)

    found = await _parked(request, p, client, ask, lambda step: step is not None, PARK_S)
    return Response(status_code=204) if found is None else answer(found)


_KNOWN = re.compile(r"[a-z_]{1,40}")
_POLL = re.compile(r"([0-9a-f]{8,32})\.([0-9]{1,15})")


def _park_s(p: Parts, prefer: str) -> float:
    """How long a poll is held open: the more wait, the longer, as far as each is willing to (RFC 7240).

    Ten thousand that came back every 20 s would keep half a core busy with nothing.
    """
    stated = re.search(r"\bwait=(\d{1,4})\b", prefer)
    willing_s = float(stated[1]) if stated else PARK_S
    return max(PARK_S, min(willing_s, p.hub.waiting / POLLS_PER_S)) * random.uniform(0.9, 1.0)


async def _parked(
    request: Request,
    p: Parts,
    client: str,
    ask: Callable[[], Awaitable[T]],
    enough: Callable[[T], object],
    wait_s: float,
) -> T | None:
    """Ask until there is something to say, or for `wait_s`; a stopping coordinator answers at once.

    Who hangs up meanwhile is not held to be there for all of `wait_s`. Nobody is asked for after that: it would be
    handed work which, to the coordinator, it then lost by a restart.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + wait_s
    with p.hub.parked(client) as woken:
        found = await ask()
        gone = asyncio.ensure_future(request.receive())  # the body was read: what comes now is that the caller left
        gone.add_done_callback(lambda _: woken.set())
        try:
            while not (enough(found) or p.hub.stopping or clock() >= until):
                is_woken = await woken.wait(until - clock())
                if gone.done():
                    p.heartbeats.tell(Seen(client, {}))
                    return None
                if is_woken:
                    found = await ask()
            return found
        finally:
            gone.cancel()


async def blob(request: Request, p: Parts, sha256: str) -> Response:
    """GET /v1/blobs/{sha256}: a model of a round that the client takes part in."""
    client = await bearer(request, p)
    return await run_in_threadpool(_blob, p, client, sha256, "range" in request.headers)


def _blob(p: Parts, client: str, sha256: str, part: bool) -> Response:
    path = p.conversation.readable(client, sha256)
    headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, immutable, max-age=31536000"}
    if part or path.stat().st_size > SMALL_BYTES:
        return BlobResponse(path, media_type="application/octet-stream", headers=headers)
    return Response(path.read_bytes(), media_type="application/octet-stream", headers=headers)


@router.get("/transfer")
def give(client: Bearer, size: Annotated[int, Query(alias="bytes", ge=0, le=MEASURED_BYTES)] = 0) -> StreamingResponse:
    """So many random bytes, for a site that measures its way here before its first round."""

    async def pieces() -> AsyncGenerator[bytes]:
        block = os.urandom(min(size, 1 << 20))
        for at in range(0, size, len(block) or 1):
            yield block[: size - at]

    headers = {"Content-Length": str(size), "Cache-Control": "no-store"}
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)


@router.post("/transfer")
async def take(client: Bearer, request: Request) -> JSONResponse:
    """The same the other way; what comes is counted and forgotten."""
    got = 0
    async for chunk in chunks_of(request):
        got += len(chunk)
        if got > MEASURED_BYTES:
            raise TooLarge(f"a transfer that measures has at most {MEASURED_BYTES} bytes")
    return answer(Accepted())


@router.get("/runs/{run}/manifests")
def manifests(run: str, client: Bearer, p: WithParts, after: Round = 0) -> StreamingResponse:
    """The manifests of a run that the client was asked to take part in, one a line, of the rounds after `after`."""
    if not p.store.manifests.may_read(client, run):
        raise NotAllowed("this is no run that you were asked to take part in")
    lines = (text + "\n" for text in p.store.manifests.texts(run, after))
    return StreamingResponse(lines, media_type="application/x-ndjson")


@router.post("/assignments/{assignment}/answers/{kind}")
def say(assignment: str, kind: AnswerKind, fence: Fence, who: Active, p: WithParts) -> JSONResponse:
    try:
        body = who.body.decode()
    except UnicodeDecodeError:
        raise BadRequest("not UTF-8") from None
    p.conversation.answer(who.client, assignment, fence, kind, body)
    return answer(Accepted())


@router.post("/assignments/{assignment}/upload")
def offer(assignment: str, who: Active, p: WithParts) -> JSONResponse:
    return answer(p.conversation.offer_upload(who.client, assignment, read(UploadOffer, who.body)))


@router.get("/assignments/{assignment}/upload")
def upload_state(assignment: str, fence: Fence, client: Bearer, p: WithParts) -> JSONResponse:
    return answer(p.conversation.upload_state(client, assignment, fence))


@router.patch("/assignments/{assignment}/upload")
async def append(
    assignment: str,
    fence: Fence,
    request: Request,
    client: Bearer,
    p: WithParts,
    upload_offset: Annotated[int, Header(ge=0)],
) -> JSONResponse:
    """Take bytes as they come, a few MiB in memory at a time; what has arrived before a broken link is kept."""
    state = await run_in_threadpool(p.conversation.upload_state, client, assignment, fence)
    size, offset, held = state.size, upload_offset, bytearray()
    writes: list[asyncio.Task[UploadState]] = []  # one piece is written while the next one comes in

    async def flush() -> None:
        nonlocal offset, held
        if writes:
            await writes.pop()
        piece = bytes(held)
        write = run_in_threadpool(p.conversation.append, client, assignment, fence, offset, piece)
        writes.append(asyncio.create_task(write))
        offset, held = offset + len(piece), bytearray()

    try:
        async for chunk in chunks_of(request):
            held += chunk
            if offset + len(held) > size:
                raise TooLarge(f"the upload has {size} bytes, more were sent")
            if len(held) >= APPEND_BYTES:
                await flush()
    finally:
        if not writes or held:
            await flush()
        state = await writes.pop()
    return answer(state)


async def complete(request: Request, p: Parts, assignment: str) -> Response:
    """POST /v1/assignments/{assignment}/complete, signed: the update is here, or comes with this very message."""
    body = await body_of(request)

    def work() -> None:
        who = verify_active(request, p, body)
        p.conversation.complete(who.client, assignment, read(Complete, who.body))

    await run_in_threadpool(work)
    return answer(Accepted())


@router.post("/assignments/{assignment}/failure")
def failure(assignment: str, who: Active, p: WithParts) -> JSONResponse:
    p.conversation.fail(who.client, assignment, read(Failure, who.body))
    return answer(Accepted())


async def progress(request: Request, p: Parts, assignment: str) -> Response:
    """POST /v1/assignments/{assignment}/progress?fence=…, which all working clients send all the time."""
    client = await bearer(request, p)
    fence = request.query_params.get("fence", "")
    if not (fence.isascii() and fence.isdigit() and len(fence) < 19):
        raise BadRequest("fence: a whole number is needed")
    message = read(Progress, await body_of(request))
    (refusal,) = await p.heartbeats.note([], [Sign(client, assignment, int(fence), message)])
    if refusal is not None:
        raise refusal
    return answer(Accepted())


def often(method: str, path: str) -> Handler | None:
    """The handler of a request that comes by the thousand; None for the others, which the router finds."""
    for known, pattern, handler in OFTEN:
        if known == method and (found := pattern.fullmatch(path)):
            return partial(handler, **found.groupdict())
    return None


OFTEN: tuple[tuple[str, re.Pattern[str], Callable[..., Awaitable[Response]]], ...] = (
    ("POST", re.compile(r"/v1/poll"), poll),
    ("POST", re.compile(r"/v1/assignments/(?P<assignment>[A-Za-z0-9_.:-]{1,200})/progress"), progress),
    ("POST", re.compile(r"/v1/assignments/(?P<assignment>[A-Za-z0-9_.:-]{1,200})/complete"), complete),
    ("GET", re.compile(r"/v1/blobs/(?P<sha256>[^/]{1,200})"), blob),
)
