"""One request to the coordinator, and the rule for those that do not arrive.

Every request may be sent twice: the coordinator answers the second like the first. So whatever could not be delivered
is tried again, with full jitter, and nobody above this file sees a lost connection. A signed request is signed anew
each time, for a nonce is good once.
"""

from __future__ import annotations

import email.utils
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from ..protocol import PROTOCOL_VERSION
from ..protocol.encoding import parse_json
from ..protocol.errors import (
    BadRequest,
    InternalError,
    MurmurError,
    NotAuthenticated,
    PeerError,
    ProtocolMismatch,
    Unavailable,
    from_problem,
)
from ..protocol.messages import Message, Token
from ..protocol.signatures import MAX_AGE_S, NONCE_BYTES, sign
from .identity import Identity
from .transport import Connections, make_transport

log = logging.getLogger(__name__)

HEADER = "Murmur-Protocol"
jitter = random.Random()  # our own: a training in this process must not find the global generator moved
BACKOFF_S = 0.5  # the first pause is drawn from 0 to this, each further one from twice as much
BACKOFF_MAX_S = 30.0
FAULTS = 5  # answers 500 in a row after which a request is given up: its coordinator is broken, not busy
ANSWER_BYTES = 16 << 20  # a roster of 10,000 clients is 4 MB
TRY_LATER = frozenset({429, 502, 503, 504, 507})  # 507: its disk is full, until a person makes room
READ_S = 60.0  # a long poll is answered within 25 s unless it allows more; who says nothing for a minute is gone

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Body = bytes | Callable[[], Iterator[bytes]]


def _timeout(read_s: float) -> httpx.Timeout:
    return httpx.Timeout(connect=10, read=read_s, write=60, pool=None)


def backoff_s(attempt: int, draw: float) -> float:
    """Full jitter (AWS Architecture Blog, 2015): the pause after try `attempt`, from 0; `draw` is uniform in [0, 1)."""
    return draw * min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** min(attempt, 16))


class Channel:
    """Requests to one coordinator as one client; may be used by many threads at once."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        identity: Identity,
        ca: Path | None = None,
        proxy: str = "",
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] | None = None,
        draw: Callable[[], float] = jitter.random,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """ca: the only CA that is believed; None leaves it to the machine's. From transport on: for tests."""
        self._name = name
        self._identity = identity
        self.before_sending: Callable[[httpx.Request], None] = lambda request: None  # what it raises keeps it here
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._draw, self._clock, self._monotonic = draw, clock, monotonic
        self._instance = secrets.token_hex(8)  # tells this process of the client from another one
        self._token = ""
        self._token_lock = threading.Lock()
        self._down = False
        self._connections = Connections()
        self._http = httpx.Client(
            base_url=url,
            transport=transport or make_transport(ca, proxy=proxy),
            timeout=_timeout(READ_S),
            headers={HEADER: str(PROTOCOL_VERSION), "Accept-Encoding": "identity", "User-Agent": "murmur-agent"},
        )

    def signed(self, path: str, body: bytes, kind: type[M], *, tries: int | None = None) -> M:
        """Post a body that carries this client's signature. tries: None goes on until it is answered."""
        return self.persist(lambda: self._post_signed(path, body, kind), tries=tries)

    def bearer(
        self,
        method: str,
        path: str,
        kind: type[M],
        *,
        body: Body = b"",
        headers: Mapping[str, str] | None = None,
        tries: int | None = None,
    ) -> M:
        """Send a request under the short-lived token, which is renewed as needed; answered with one message."""

        def once() -> M:
            with self.open(method, path, body=body, headers=headers) as response:
                return parse_answer(response, kind)

        return self.persist(once, tries=tries)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        body: Body = b"",
        headers: Mapping[str, str] | None = None,
        read_s: float = READ_S,
    ) -> Generator[httpx.Response]:
        """One try of a request under the token, its answer still to be read; errors of the coordinator are raised.

        read_s: how long the coordinator may say nothing, where that is not as for all others.
        """
        token = self._token or self._renewed("")
        with ExitStack() as stack:
            try:
                response = stack.enter_context(self._send(self._with_token(token, method, path, body, headers, read_s)))
            except NotAuthenticated:
                token = self._renewed(token)
                response = stack.enter_context(self._send(self._with_token(token, method, path, body, headers, read_s)))
            yield response

    def persist(self, call: Callable[[], T], *, tries: int | None = None, mark: Callable[[], int] | None = None) -> T:
        """Call until the coordinator has answered; raises its error, or Unavailable after `tries` or an abort.

        mark: what counts as progress; when it moved during a failed try, the pauses start over.
        """
        attempt = faults = total = 0
        while True:
            before = mark() if mark is not None else 0
            try:
                result = call()
            except (Unavailable, InternalError) as error:
                faults = faults + 1 if isinstance(error, InternalError) else 0
                total += 1
                if self._stopped.is_set() or faults >= FAULTS or (tries is not None and total >= tries):
                    raise
                if mark is not None and mark() != before:
                    attempt = 0
                self.pause(attempt, error)
                attempt += 1
            else:
                if self._down:
                    self._down = False
                    log.info("coordinator reachable again", extra={"url": str(self._http.base_url)})
                return result

    def pause(self, attempt: int, error: MurmurError) -> None:
        """Wait before the next try; raises Unavailable when the channel is aborted meanwhile."""
        delay = backoff_s(attempt, self._draw()) + float(error.facts.get("retry_after_s", 0.0))
        fields = {"url": str(self._http.base_url), "why": error.detail, "again_in_s": round(delay, 1)}
        log.log(logging.DEBUG if self._down else logging.WARNING, "coordinator not available", extra=fields)
        self._down = True
        self._sleep(delay)
        if self._stopped.is_set():
            raise Unavailable("this agent is stopping")

    def abort(self) -> None:
        """End all that is under way, in any thread, at once: it raises Unavailable, as all later calls do."""
        self._stopped.set()
        self._connections.shut()

    def close(self) -> None:
        self.abort()
        self._http.close()

    def _post_signed(self, path: str, body: bytes, kind: type[M]) -> M:
        request = self._http.build_request("POST", path, content=body, headers={"Content-Type": "application/json"})
        signature = sign(
            "POST",
            request.url.raw_path.decode(),
            body,
            key=self._identity.key,
            keyid=self._name,
            created=int(self._clock()),
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        request.headers.update(signature)
        with self._send(request) as response:
            return parse_answer(response, kind)

    def _renewed(self, old: str) -> str:
        with self._token_lock:
            if self._token == old:  # else another thread has renewed it while we waited
                self._token = self._post_signed("/v1/token", b"{}", Token).token
            return self._token

    def _with_token(
        self,
        token: str,
        method: str,
        path: str,
        body: Body,
        headers: Mapping[str, str] | None,
        read_s: float,
    ) -> httpx.Request:
        content = body if isinstance(body, bytes) else body()
        given = {"Authorization": f"Bearer {token}"}
        if isinstance(body, bytes) and body:
            given["Content-Type"] = "application/json"
        given.update(headers or {})
        return self._http.build_request(method, path, content=content or None, headers=given, timeout=_timeout(read_s))

    @contextmanager
    def _send(self, request: httpx.Request) -> Generator[httpx.Response]:
        if self._stopped.is_set():
            raise Unavailable("this agent is stopping")
        self.before_sending(request)
        request.extensions = {**request.extensions, "trace": self._connections.trace}
        try:
            response = self._http.send(request, stream=True)
            try:
                self._check(response)
                yield response
            finally:
                response.close()
        except httpx.TransportError as error:
            # A connection that could not be made, and one that was lost, say different things about who is there.
            lost = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            raise Unavailable(f"{type(error).__name__}: {error}", lost=lost) from None
        except RuntimeError:
            if self._stopped.is_set():  # httpx says so of a client that was closed meanwhile
                raise Unavailable("this agent is stopping") from None
            raise

    def _check(self, response: httpx.Response) -> None:
        """Raise what the coordinator answered, unless it is a success."""
        version = response.headers.get(HEADER)
        if version is None:
            code = response.status_code
            raise Unavailable(f"an answer {code} that is not a coordinator's: is a proxy in between?", gateway=code)
        if version != str(PROTOCOL_VERSION):
            raise ProtocolMismatch(
                f"the coordinator speaks version {version[:20]} of the protocol, this agent {PROTOCOL_VERSION}: "
                "install the murmur release that the coordinator runs"
            )
        if response.is_success:
            return
        error = _problem(response)
        if isinstance(error, NotAuthenticated) and (hint := self._clock_hint(response)):
            raise NotAuthenticated(hint)
        if isinstance(error, Unavailable):
            error.facts["retry_after_s"] = _retry_after_s(response)
        raise error

    def _clock_hint(self, response: httpx.Response) -> str:
        """A signature is good for five minutes; a wrong clock is the usual reason for a refused one."""
        try:
            theirs = email.utils.parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
        except ValueError:
            return ""
        ahead_s = self._clock() - theirs
        if abs(ahead_s) < MAX_AGE_S / 2:
            return ""
        side = "ahead of" if ahead_s > 0 else "behind"
        return f"not authenticated: this machine's clock is {abs(ahead_s):.0f} s {side} the coordinator's; set it right"


def parse_answer(response: httpx.Response, kind: type[M]) -> M:
    """The message that an answer must be; raises PeerError when it is another, or too long."""
    try:
        return kind.model_validate(parse_json(_read(response), limit_bytes=ANSWER_BYTES))
    except (BadRequest, ValidationError) as error:
        raise PeerError(f"the coordinator's answer is not the {kind.__name__} it should be: {error}") from None


def _problem(response: httpx.Response) -> MurmurError:
    status = response.status_code
    found: Any = None
    with suppress(PeerError, httpx.TransportError):  # no problem document: the status says enough
        found = parse_json(_read(response))
    if isinstance(found, dict) and "code" in found:
        error = from_problem({**found, "status": status})
        # A code that a later coordinator has and we do not: its status says whether to come back.
        return Unavailable(error.detail) if status in TRY_LATER and isinstance(error, InternalError) else error
    if status in TRY_LATER:
        return Unavailable(f"the coordinator answered {status}", gateway=status)
    return from_problem({"status": status, "detail": f"the coordinator answered {status}"})


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "0")
    return min(300.0, float(text)) if text.isascii() and text.isdigit() else 0.0


def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > ANSWER_BYTES:
            raise PeerError(f"an answer of more than {ANSWER_BYTES} bytes to {response.request.url.path}")
    return bytes(data)
