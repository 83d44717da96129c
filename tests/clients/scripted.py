"""A link whose coordinator answers from a list, for tests of what happens to single requests."""

from __future__ import annotations

import json

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.protocol.messages import AgentInfo, Assignment, Kind, Poll
from murmur.protocol.sections import Train

from .coordinator_double import Wire

KEY = Ed25519PrivateKey.generate()
POLL = Poll(info=AgentInfo(version="1"))
A = Assignment(
    id="r.1.1.alpha", fence=3, run="r", round=1, attempt=1, kind=Kind.TRAIN, task="t", model="0" * 64, model_bytes=1,
    train=Train(), mu=0, weighting="examples", max_weight=10, metrics=(), seed=0, patience_s=60, secure=None,
)  # fmt: skip
V1 = {"Murmur-Protocol": "1"}


def ok(value=None, status=200, **headers):
    content = b"" if value is None else json.dumps(value).encode()
    return httpx.Response(status, content=content, headers={**V1, **headers})


def problem(code, status, **facts):
    return ok({"code": code, "status": status, "detail": f"it is {code}", **facts}, status)


class Script:
    """Answers requests from a list, one after the other; exceptions in it are raised. Tokens are given freely."""

    def __init__(self, *answers, **options):
        self.answers, self.requests, self.slept = list(answers), [], []
        self.tokens = 0
        settings = {"sleep": self.slept.append, "draw": lambda: 0.5, "transport": Wire(self.handle)} | options
        self.link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), **settings)

    def handle(self, request):
        request.read()
        if request.url.path == "/v1/token":
            self.tokens += 1
            return ok({"token": f"token{self.tokens}", "expires_s": 600})
        self.requests.append(request)
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def said(self):
        return [f"{r.method} {r.url.raw_path.decode()}" for r in self.requests]
