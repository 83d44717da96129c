"""What every endpoint shares: who is calling, problem documents, bodies of a bounded size, the protocol's header."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol import PROTOCOL_VERSION
from ..protocol.encoding import parse_json
from ..protocol.errors import (
    BadRequest,
    MurmurError,
    NotAllowed,
    NotAuthenticated,
    ProtocolMismatch,
    TooLarge,
    Unavailable,
)
from ..protocol.messages import Message as WireMessage
from ..protocol.mistakes import in_one_line
from ..protocol.roles import Right
from ..protocol.signatures import MAX_AGE_S, verify
from ..web.rights import authorize
from .blobs import Blobs
from .conductor import Conductor
from .conversation import Conversation
from .heartbeats import Heartbeats
from .hub import Hub
from .people import People, hash_token
from .service import Service
from .settings import Settings
from .store import Store
from .store.accounts import Person

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

HEADER = "murmur-protocol"
FAULT = "an internal error; the coordinator's log has it"
MAX_BODY_BYTES = 1 << 20  # of a message; uploads have a limit of their own
FLOOR_S, FLOOR_BYTES = 30.0, 32 << 10  # a body brings at least so much in so long, about 1 kB/s


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The coordinator's parts, as endpoints find them on the app's state."""

    settings: Settings
    store: Store
    blobs: Blobs
    hub: Hub
    people: People
    conversation: Conversation
    service: Service
    conductor: Conductor
    heartbeats: Heartbeats
    ca_pem: str | None
    wall_clock: Callable[[], float]  # what signatures are dated by; durations go by the store's, which never jumps


def parts(request: Request) -> Parts:
    return request.app.state.parts


WithParts = Annotated[Parts, Depends(parts)]


async def chunks_of(request: Request) -> AsyncGenerator[bytes]:
    """The body as it comes; raises Unavailable when it stops, or is so slow that it only holds the connection."""
    stream, loop = request.stream(), asyncio.get_running_loop()
    since, got = loop.time(), 0
    while True:
        try:
            async with asyncio.timeout_at(since + FLOOR_S):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Unavailable(f"only {got} bytes came in {FLOOR_S:.0f} s: send the rest later") from None
        except ClientDisconnect:
            raise Unavailable(f"the connection broke after {got} bytes") from None  # nobody hears it
        if chunk is None:
            return
        got += len(chunk)
        if got >= FLOOR_BYTES:
            since, got = loop.time(), 0
        if chunk:
            yield chunk


async def body_of(request: Request) -> bytes:
    """The request's body; raises TooLarge before more than the limit is held."""
    data = bytearray()
    async for chunk in chunks_of(request):
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise TooLarge(f"a message has at most {MAX_BODY_BYTES} bytes")
    return bytes(data)


def read(kind: type[M], body: bytes) -> M:
    """The body as the message it should be; raises BadRequest that names what is wrong with it."""
    try:
        return kind.model_validate(parse_json(body))
    except ValidationError as error:
        raise BadRequest(in_one_line(error.errors())) from None


@dataclass(frozen=True, slots=True)
class Signed:
    """A request whose signature holds: by whom, and its body."""

    client: str
    body: bytes


async def signed(request: Request, p: WithParts) -> Signed:
    """A request signed by an enrolled client, seen for the first time. The client may still be pending."""
    body = await body_of(request)
    return await run_in_threadpool(_verify, request, p, body)


def _verify(request: Request, p: Parts, body: bytes) -> Signed:
    found = verify(
        request.method,
        target(request),
        request.headers,
        body,
        public_key_of=p.store.clients.public_key,
        now=p.wall_clock(),
    )
    p.store.clients.use_nonce(found.keyid, found.nonce, lifetime_s=2 * MAX_AGE_S)
    return Signed(found.keyid, body)


def target(request: Request) -> str:
    path = request.scope.get("raw_path", request.url.path.encode()).decode("ascii", "replace")
    query = request.scope["query_string"].decode("ascii", "replace")
    return f"{path}?{query}" if query else path


async def active(request: Request, p: WithParts) -> Signed:
    """A signed request of a client that an admin has approved."""
    body = await body_of(request)
    return await run_in_threadpool(verify_active, request, p, body)


def verify_active(request: Request, p: Parts, body: bytes) -> Signed:
    """As `active`, for a body that was read already."""
    found = _verify(request, p, body)
    if p.store.clients.state(found.client) != "active":
        raise NotAllowed("this client is not active")
    return found


async def bearer(request: Request, p: WithParts) -> str:
    """The active client whose short-lived token this request carries."""
    hashed = hash_token(_token(request))
    client = p.store.clients.remembered(hashed) or await run_in_threadpool(p.store.clients.of_token, hashed)
    if client is None:
        raise NotAuthenticated()
    return client


def person(request: Request, p: WithParts) -> Person:
    """The account whose API token this request carries."""
    found = p.people.holder("api", _token(request))
    if found is None:
        raise NotAuthenticated()
    return found


def needs(right: Right) -> Callable[..., Person]:
    """The dependency of a route: the account whose token the request carries, if it may do what the route does."""

    def check(request: Request, found: Annotated[Person, Depends(person)], p: WithParts) -> Person:
        authorize(p.service, found.name, found.role, right, request.path_params)
        return found

    check.right = right  # pyright: ignore[reportFunctionMemberAccess]
    return check


Admin = Annotated[Person, Depends(needs(Right.ADMINISTER))]
Starter = Annotated[Person, Depends(needs(Right.START))]
Steerer = Annotated[Person, Depends(needs(Right.STEER))]
Holder = Annotated[Person, Depends(needs(Right.CREDENTIAL))]


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise NotAuthenticated()
    return token


class BlobResponse(FileResponse):
    """A file in pieces of 1 MiB: Starlette's 64 KiB cost four times the CPU per byte."""

    chunk_size = 1 << 20


def answer(message: WireMessage) -> JSONResponse:
    return JSONResponse(message.model_dump(mode="json"))


def install_errors(app: FastAPI) -> None:
    """Answer every error as a problem document; only our own faults are 500 and logged with a traceback."""

    async def any_error(_: Request, error: Exception) -> JSONResponse:
        return problem_of(error)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": detail,
            "status": error.status_code,
            "detail": detail,
        }
        return JSONResponse(document, error.status_code, headers=error.headers, media_type="application/problem+json")

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem(BadRequest(in_one_line(error.errors())))

    app.add_exception_handler(MurmurError, any_error)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, any_error)


def problem_of(error: Exception) -> JSONResponse:
    """The answer to what went wrong; only our own faults are 500, and logged."""
    if isinstance(error, Unavailable) or (isinstance(error, MurmurError) and error.status < 500):
        return problem(error)
    log.error("request failed", exc_info=error)
    return problem(error if isinstance(error, MurmurError) else MurmurError(FAULT))


def problem(error: MurmurError) -> JSONResponse:
    headers = {"Retry-After": "2"} if isinstance(error, Unavailable) else {}
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.problem(), error.status, headers=headers, media_type="application/problem+json")


Handler = Callable[[Request, Parts], Awaitable[Response]]


class Front:
    """ASGI middleware before everything else: both sides state their version of the protocol on agents' addresses.

    Another version is refused. `find` gives the handlers of the few requests that come by the thousand: what stands
    around an endpoint would take 10 kB for each poll that waits, and more time than the work of a sign of life.
    """

    def __init__(self, app: ASGIApp, find: Callable[[str, str], Handler | None], parts: Parts) -> None:
        self.app, self._find, self._parts = app, find, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        stated = next((value for name, value in scope["headers"] if name == HEADER.encode()), b"")
        sending = partial(_stating, send)
        if stated != STATED and scope["path"] != "/v1/ca" and not scope["path"].startswith("/v1/admin/"):
            error = ProtocolMismatch(
                f"this coordinator speaks version {PROTOCOL_VERSION} of the protocol, the request states "
                f"{stated.decode('ascii', 'replace') or 'none'}: install a matching release of murmur",
                speaks=[PROTOCOL_VERSION],
            )
            return await problem(error)(scope, receive, sending)
        handler = self._find(scope["method"], scope["path"])
        if handler is None:
            return await self.app(scope, receive, sending)
        try:
            response = await handler(Request(scope, receive), self._parts)
        except Exception as error:
            response = problem_of(error)
        await response(scope, receive, sending)


STATED = str(PROTOCOL_VERSION).encode()


async def _stating(send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], (HEADER.encode(), STATED)]
    await send(message)
