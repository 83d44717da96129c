"""The addresses that agents call: thin shells over `Conversation`. Agents call, the coordinator never does.

Who waits, waits without a thread: a poll or a step that has nothing to say parks on the hub until a commit concerns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool

from ..protocol.encoding import fingerprint, unb64
from ..protocol.errors import BadRequest, NotApproved, NotAuthenticated, NotFound, TooLarge
from ..protocol.messages import (
    Accepted,
    AnswerKind,
    Complete,
    Enrol,
    Enrolled,
    Failure,
    Poll,
    Progress,
    StepKind,
    Token,
    UploadOffer,
)
from ..protocol.signatures import MAX_AGE_S, verify
from .http import BlobResponse, Parts, Signed, WithParts, active, answer, bearer, body_of, read, signed, target
from .hub import wait_for
from .people import hash_token, new_token

PARK_S = 20.0  # below the 25 s that agents and the usual proxies wait for a first byte
APPEND_BYTES = 4 << 20  # of an upload held in memory before it is written

router = APIRouter(prefix="/v1")
Active = Annotated[Signed, Depends(active)]
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
            now=p.store.db.clock(),
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


@router.post("/poll")
async def poll(request: Request, client: Bearer, p: WithParts) -> JSONResponse:
    message = read(Poll, await body_of(request))
    work = await _parked(p, client, lambda: p.conversation.poll(client, message), lambda w: w.assignment or w.void)
    return answer(work)


@router.get("/assignments/{assignment}/step")
async def step(assignment: str, fence: int, client: Bearer, p: WithParts, after: str = "") -> Response:
    if after and after not in set(StepKind):
        raise BadRequest(f"after is one of {', '.join(StepKind)}")
    found = await _parked(
        p, client, lambda: p.conversation.step(client, assignment, fence, after), lambda step: step is not None
    )
    return Response(status_code=204) if found is None else answer(found)


async def _parked(p: Parts, client: str, ask: Callable[[], T], enough: Callable[[T], object]) -> T:
    """Ask until there is something to say, or for `PARK_S`; a stopping coordinator answers at once."""
    until = asyncio.get_running_loop().time() + PARK_S
    with p.hub.parked(client) as woken:
        while True:
            found = await run_in_threadpool(ask)
            left = until - asyncio.get_running_loop().time()
            if enough(found) or p.hub.stopping or left <= 0:
                return found
            await wait_for(woken, left)


@router.get("/blobs/{sha256}")
def blob(sha256: str, client: Bearer, p: WithParts) -> BlobResponse:
    path = p.conversation.readable(client, sha256)
    headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, immutable, max-age=31536000"}
    return BlobResponse(path, media_type="application/octet-stream", headers=headers)


@router.post("/assignments/{assignment}/answers/{kind}")
def say(assignment: str, kind: AnswerKind, fence: int, who: Active, p: WithParts) -> JSONResponse:
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
def upload_state(assignment: str, fence: int, client: Bearer, p: WithParts) -> JSONResponse:
    return answer(p.conversation.upload_state(client, assignment, fence))


@router.patch("/assignments/{assignment}/upload")
async def append(
    assignment: str,
    fence: int,
    request: Request,
    client: Bearer,
    p: WithParts,
    upload_offset: Annotated[int, Header(ge=0)],
) -> JSONResponse:
    """Take bytes as they come, a few MiB in memory at a time; what has arrived before a broken link is kept."""
    state = await run_in_threadpool(p.conversation.upload_state, client, assignment, fence)
    offset, held = upload_offset, bytearray()

    async def flush() -> None:
        nonlocal offset, state
        state = await run_in_threadpool(p.conversation.append, client, assignment, fence, offset, bytes(held))
        offset = state.offset
        held.clear()

    async for chunk in request.stream():
        held += chunk
        if offset + len(held) > state.size:
            raise TooLarge(f"the upload has {state.size} bytes, more were sent")
        if len(held) >= APPEND_BYTES:
            await flush()
    await flush()
    return answer(state)


@router.post("/assignments/{assignment}/complete")
def complete(assignment: str, who: Active, p: WithParts) -> JSONResponse:
    p.conversation.complete(who.client, assignment, read(Complete, who.body))
    return answer(Accepted())


@router.post("/assignments/{assignment}/failure")
def failure(assignment: str, who: Active, p: WithParts) -> JSONResponse:
    p.conversation.fail(who.client, assignment, read(Failure, who.body))
    return answer(Accepted())


@router.post("/assignments/{assignment}/progress")
async def progress(assignment: str, fence: int, request: Request, client: Bearer, p: WithParts) -> JSONResponse:
    message = read(Progress, await body_of(request))
    await run_in_threadpool(p.conversation.progress, client, assignment, fence, message)
    return answer(Accepted())
