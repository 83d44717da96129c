"""A coordinator in memory for one attempt at a round: it checks what a real one checks, and can be made to fail.

The conversation, the signatures and the privacy server are real; rows, files and time are not.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.privacy.fixed_point import decode
from murmur.privacy.server import ServerSession
from murmur.privacy.terms import block_of, context_of
from murmur.protocol.errors import (
    Conflict,
    MurmurError,
    NotAllowed,
    NotApproved,
    NotAuthenticated,
    NotFound,
    Replayed,
    TooLate,
    Unavailable,
    WrongOffset,
)
from murmur.protocol.messages import (
    AnswerKind,
    Assignment,
    Complete,
    Failure,
    Kind,
    Poll,
    Progress,
    SecureTerms,
    Step,
    StepKind,
    UploadOffer,
    UploadState,
    Work,
)
from murmur.protocol.sections import Train
from murmur.protocol.signatures import verify
from murmur.protocol.tensors import DTYPES, Layout, TensorSpec, check_file, map_file, masked_layout, write_file

MODEL = Layout(
    (
        TensorSpec("conv.weight", "F16", (4, 3)),
        TensorSpec("body.weight", "F32", (50, 40)),
        TensorSpec("body.bias", "F32", (40,)),
        TensorSpec("exact", "F64", (7,)),
        TensorSpec("norm.batches", "I64", ()),
        TensorSpec("norm.kept", "BOOL", (2,)),
    ),
    frozenset({"norm.batches", "norm.kept"}),
)
PARK_S = 0.05  # a real one parks for 20 s


class Wire(httpx.BaseTransport):
    """httpx's MockTransport, with answers that are still to be read, as from a network."""

    def __init__(self, handle: Callable[[httpx.Request], httpx.Response]) -> None:
        self._handle = handle

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        found = self._handle(request)
        if not found.is_stream_consumed:
            return found
        return httpx.Response(found.status_code, headers=found.headers, stream=_Stream(found.content))


class _Stream(httpx.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content


@dataclass
class Part:
    """One client's row."""

    fence: int = 1
    answers: dict[str, str] = field(default_factory=dict)
    offer: UploadOffer | None = None
    received: bytes = b""
    complete: Complete | None = None
    failure: Failure | None = None
    progress: list[tuple[float, Progress]] = field(default_factory=list)
    left: bool = False
    gone: str = ""


class CoordinatorDouble:
    def __init__(
        self,
        folder: Path,
        identities: dict[str, Identity],
        *,
        kind: Kind = Kind.TRAIN,
        masked: bool = True,
        threshold: int = 3,
        attempt: int = 1,
        **changes: object,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.model_file = folder / "model"
        write_file(self.model_file, {t.name: np.zeros(t.shape, DTYPES[t.dtype]) for t in MODEL.tensors}, MODEL)
        self.model = self.model_file.read_bytes()
        self.identities = identities
        self._cohort_keys = {name: i.public_key for name, i in identities.items()}  # of the round, whoever leaves later
        cohort = tuple(sorted(identities))
        terms = SecureTerms(cohort=cohort, threshold=threshold, min_clients=3, clip_value=8.0) if masked else None
        self.parts = {name: Part() for name in cohort}
        self.assignments = {
            name: Assignment(
                id=f"run1.1.{attempt}.{name}",
                fence=1,
                run="run1",
                round=1,
                attempt=attempt,
                kind=kind,
                task="digits",
                model=hashlib.sha256(self.model).hexdigest(),
                model_bytes=len(self.model),
                train=Train(),
                mu=0.0,
                weighting="examples",
                max_weight=1000,
                metrics=("loss", "accuracy"),
                seed=7,
                patience_s=60.0,
                secure=terms,
            ).model_copy(update=changes)
            for name in cohort
        }
        self.lock = threading.Condition()
        self.nonces: set[tuple[str, str]] = set()
        self.tokens: dict[str, str] = {}
        self.requests: list[str] = []
        self.bytes_sent = 0
        self.handed: set[str] = set()
        self.approved = True
        self.faults = 0.0
        self.random = random.Random(1)

    # For tests

    def link(self, name: str, **options: object) -> Link:
        settings = {"sleep": lambda s: time.sleep(min(s, 0.002)), "transport": Wire(self.handle)}
        return Link("http://127.0.0.1:1", name=name, identity=self.identities[name], **(settings | options))  # type: ignore[arg-type]

    def leave(self, name: str) -> None:
        """The round goes on without this client."""
        with self.lock:
            self.parts[name].left = True
            self.lock.notify_all()

    def end(self, name: str, why: str) -> None:
        with self.lock:
            self.parts[name].gone = why
            self.lock.notify_all()

    def counted(self) -> list[str]:
        return sorted(name for name, part in self.parts.items() if part.complete is not None)

    def totals(self):
        """The mean update by tensor, and the block's totals, unmasked as the real one does it."""
        a = next(iter(self.assignments.values()))
        context, block = self.context(), block_of(a, MODEL, a.secure)
        layout, names = masked_layout(context.dim, context.aux), self.counted()
        ring, aux = np.zeros(context.dim, np.uint32), np.zeros(context.aux, np.uint64)
        for name in names:
            path = self.model_file.with_name(f"{name}.upload")
            path.write_bytes(self.parts[name].received)
            check_file(path, layout)
            arrays = map_file(path, layout)
            ring += arrays["ring"]
            aux += arrays["aux"]
        adverts, shares, reveals = (self.said(k) for k in (AnswerKind.ADVERT, AnswerKind.SHARES, AnswerKind.REVEAL))
        session = self.session()
        survivors = session.survivors(adverts, shares, names)
        faults = session.unmask(
            adverts=adverts, shares=shares, survivors=survivors, reveals=reveals, ring_sum=ring, aux_sum=aux
        )
        assert faults == ()
        floats = decode(ring, clip_value=context.clip_value, max_weight=context.max_weight, n=len(context.cohort))
        return floats, block.decode(aux)

    # The privacy server

    def context(self):
        a = next(iter(self.assignments.values()))
        return context_of(a, MODEL, a.secure)

    def session(self) -> ServerSession:
        return ServerSession(self.context(), self._cohort_keys)

    def said(self, kind: AnswerKind) -> dict[str, str]:
        return {name: part.answers[kind] for name, part in self.parts.items() if kind in part.answers}

    def step(self, name: str, after: str) -> Step | None:
        part = self.parts[name]
        if part.gone:
            return Step(kind=StepKind.GONE, reason=part.gone)
        if self.assignments[name].secure is None:
            return Step(kind=StepKind.DONE) if part.complete else None
        session, adverts, shares = self.session(), self.said(AnswerKind.ADVERT), self.said(AnswerKind.SHARES)
        counted, agrees, reveals = self.counted(), self.said(AnswerKind.AGREE), self.said(AnswerKind.REVEAL)
        here = {n for n, p in self.parts.items() if not p.left}
        if after == "" and here <= adverts.keys():
            return Step(kind=StepKind.ROSTER, body=session.roster(adverts))
        if after == "roster" and name in shares and here <= shares.keys():
            return Step(kind=StepKind.INBOX, body=session.inbox(name, adverts, shares))
        if after == "inbox" and part.complete and here <= set(counted):
            return Step(kind=StepKind.SURVIVORS, body=session.survivors(adverts, shares, counted))
        if after == "survivors" and name in agrees and here & set(counted) <= agrees.keys():
            return Step(kind=StepKind.REVEAL, body=session.signatures(name, adverts, agrees))
        if after == "reveal" and here & set(counted) <= reveals.keys():
            return Step(kind=StepKind.DONE)
        return None

    # HTTP

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Answer a request; with `faults`, the share of them that is lost, before or after it took effect."""
        kind = self.random.random() / self.faults if self.faults else 1.0
        self.requests.append(f"{request.method} {request.url.path}")
        if kind < 0.3:
            raise httpx.ConnectError("connection refused", request=request)
        if kind < 0.5:
            return self.answer_with(Unavailable("restarting"))
        response = self._safely(request)
        if kind < 1.0:
            raise httpx.ReadError("connection reset", request=request)
        return response

    def answer_with(self, error: MurmurError) -> httpx.Response:
        headers = {"Murmur-Protocol": "1", "Content-Type": "application/problem+json"}
        return httpx.Response(error.status, json=error.problem(), headers=headers)

    def _safely(self, request: httpx.Request) -> httpx.Response:
        try:
            found = self._route(request)
        except MurmurError as error:
            return self.answer_with(error)
        headers = {"Murmur-Protocol": "1"}
        if found is None:
            return httpx.Response(204, headers=headers)
        if isinstance(found, httpx.Response):
            found.headers.update(headers)
            return found
        return httpx.Response(200, content=found.model_dump_json(), headers=headers)

    def _route(self, request: httpx.Request):
        body, (_, _, what, *rest) = request.read(), request.url.path.split("/")
        if what == "token":
            name = self._signer(request, body)
            if not self.approved:
                raise NotApproved
            token = f"token-{name}-{len(self.tokens)}"
            self.tokens[token] = name
            return _Raw({"token": token, "expires_s": 600})
        if what == "poll":
            return self._poll(self._bearer(request), Poll.model_validate_json(body))
        if what == "blobs":
            return self._blob(self._bearer(request), rest[0], request.headers.get("Range"))
        assignment, verb = rest[0], rest[1]
        caller = self._signer if request.method == "POST" and verb != "progress" else self._bearer
        name = caller(request) if caller == self._bearer else caller(request, body)
        if self.assignments[name].id != assignment:
            raise NotFound
        fence = int(request.url.params.get("fence") or json.loads(body)["fence"])
        with self.lock:
            if fence != self.parts[name].fence:
                raise TooLate("handed out again")
            if self.parts[name].gone and verb != "step":
                raise TooLate(self.parts[name].gone)
            found = self._act(name, request.method, verb, rest[2:], request, body)
            self.lock.notify_all()
        return found

    def _act(self, name: str, method: str, verb: str, rest: list[str], request: httpx.Request, body: bytes):
        part = self.parts[name]
        match method, verb:
            case "GET", "step":
                after = request.url.params["after"]
                found = self.step(name, after)
                if found is None:
                    self.lock.wait(PARK_S)
                return found or self.step(name, after)
            case "POST", "answers":
                self._take_answer(name, AnswerKind(rest[0]), body.decode())
            case "POST", "upload":
                part.offer = UploadOffer.model_validate_json(body)
                return UploadState(offset=len(part.received), size=part.offer.size)
            case "GET", "upload":
                return UploadState(offset=len(part.received), size=part.offer.size)
            case "PATCH", "upload":
                if int(request.headers["Upload-Offset"]) != len(part.received):
                    raise WrongOffset(offset=len(part.received))
                assert int(request.headers["Content-Length"]) == len(body)
                part.received += body
                self.bytes_sent += len(body)
                return UploadState(offset=len(part.received), size=part.offer.size)
            case "POST", "complete":
                message = Complete.model_validate_json(body)
                assert hashlib.sha256(part.received).hexdigest() == message.sha256 == part.offer.sha256
                assert part.complete in (None, message)
                part.complete = message
            case "POST", "failure":
                part.failure = Failure.model_validate_json(body)
                part.left, part.gone = True, "it failed"
            case "POST", "progress":
                part.progress.append((time.monotonic(), Progress.model_validate_json(body)))
            case _:
                raise NotFound
        return _Raw({"accepted": True})

    def _take_answer(self, name: str, kind: AnswerKind, text: str) -> None:
        if kind in self.parts[name].answers:
            if self.parts[name].answers[kind] != text:
                raise Conflict(f"{name} has already sent other {kind}")
            return
        session, adverts, shares = self.session(), self.said(AnswerKind.ADVERT), self.said(AnswerKind.SHARES)
        if kind is AnswerKind.ADVERT:
            session.check_advert(name, text)
        elif kind is AnswerKind.SHARES:
            session.check_shares(name, text, adverts)
        elif kind is AnswerKind.AGREE:
            session.check_agree(name, text, session.survivors(adverts, shares, self.counted()))
        else:
            survivors = session.survivors(adverts, shares, self.counted())
            session.check_reveal(name, text, adverts, shares, survivors)
        self.parts[name].answers[kind] = text

    def _poll(self, name: str, poll: Poll) -> Work:
        with self.lock:
            if name not in self.assignments:
                return Work()
            void = tuple(key for key in poll.busy if self.parts[name].gone)
            part, mine = self.parts[name], self.assignments[name]
            untouched = mine.id not in poll.busy and not (part.answers or part.complete or part.failure or void)
            if name not in self.handed or untouched:
                if name in self.handed:  # the answer that carried it was lost
                    part.fence += 1
                    mine = self.assignments[name] = mine.model_copy(update={"fence": part.fence})
                self.handed.add(name)
                return Work(assignment=mine)
            if not void:
                self.lock.wait(PARK_S)
            return Work(void=void)

    def _blob(self, name: str, sha256: str, wanted: str | None) -> httpx.Response:
        if sha256 != self.assignments[name].model:
            raise NotAllowed
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        headers = {"Content-Range": f"bytes {first}-{len(self.model) - 1}/{len(self.model)}"} if wanted else {}
        return httpx.Response(206 if wanted else 200, content=self.model[first:], headers=headers)

    def _signer(self, request: httpx.Request, body: bytes) -> str:
        keys = {name: identity.public_key for name, identity in self.identities.items()}
        target = request.url.raw_path.decode()
        found = verify(request.method, target, request.headers, body, public_key_of=keys.get, now=time.time())
        if (found.keyid, found.nonce) in self.nonces:
            raise Replayed
        self.nonces.add((found.keyid, found.nonce))
        return found.keyid

    def _bearer(self, request: httpx.Request) -> str:
        name = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if name is None:
            raise NotAuthenticated
        return name


class _Raw:
    def __init__(self, value: object) -> None:
        self._value = value

    def model_dump_json(self) -> str:
        return json.dumps(self._value)
