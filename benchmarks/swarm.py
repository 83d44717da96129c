"""Many agents in one process: each a socket of its own, HTTP/1.1 kept alive, and as little Python as the words need.

They speak the agents' protocol as `murmur.clients` does, without training, threads or files, so that what is measured
is the coordinator. Requests are signed here by the few lines that RFC 9421 comes to for this protocol's fixed list of
components: the library that the product uses takes 0.2 ms a signature, seconds in a round of 10,000. A test holds that
the coordinator's own check takes them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import insert

from murmur.coordinator.people import hash_token
from murmur.coordinator.store import Store, tables
from murmur.protocol import PROTOCOL_VERSION
from murmur.protocol.messages import INLINE_BYTES, AgentInfo
from murmur.protocol.signatures import TAG

INFO = AgentInfo(version="benchmark", tasks=("bench",), gpus=(), cpus=8).model_dump(mode="json")
WAIT_S = 300  # what agents ask a poll to be held
CONNECTING = 256  # connections that are being opened at a time; the listener's queue holds 2,048
TOKEN_S = 86_400.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_HEAD = f"Host: coordinator\r\nMurmur-Protocol: {PROTOCOL_VERSION}\r\nUser-Agent: murmur-agent\r\n"

T = TypeVar("T")


class Refused(Exception):
    """The coordinator answered something other than a success."""


class Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    __slots__ = ("_answer", "_held", "_need", "_status", "_transport")

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._held = b""
        self._need = -1  # bytes of the body that is being read; -1 while the head is
        self._status = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the coordinator closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._held = self._held + data if self._held else data
        if self._need < 0:
            end = self._held.find(b"\r\n\r\n")
            if end < 0:
                return
            head, self._held = self._held[:end], self._held[end + 4 :]
            length = _LENGTH.search(head)
            self._status, self._need = int(head[9:12]), int(length[1]) if length else 0
        if len(self._held) < self._need or self._answer is None:
            return
        body, self._held, self._need = self._held[: self._need], self._held[self._need :], -1
        answer, self._answer = self._answer, None
        if not answer.done():
            answer.set_result((self._status, body))

    async def ask(self, *parts: bytes) -> tuple[int, bytes]:
        """Send a request and return the status and the body of its answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines(parts)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass(slots=True)
class Agent:
    """One enrolled, approved agent with a token."""

    name: str
    key: Ed25519PrivateKey
    token: str
    connection: Connection | None = None

    async def connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, self.connection = await loop.create_connection(Connection, "127.0.0.1", port)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    async def poll(self, *, wait_s: int = WAIT_S) -> dict[str, Any]:
        """The coordinator's answer to a poll: `Work` as JSON."""
        return await self.bearer("POST", "/v1/poll", _POLL, f"Prefer: wait={wait_s}\r\n")

    async def work(self) -> dict[str, Any]:
        """Poll until there is an assignment."""
        while True:
            found = await self.poll()
            if found["assignment"] is not None:
                return found["assignment"]
            if found["next_poll_s"]:
                await asyncio.sleep(found["next_poll_s"])

    async def bearer(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Any:
        """Send a request under the token; returns the JSON of its answer, None for one without a body."""
        return _json(await self._ask(self.request(method, path, len(body), headers), body))

    async def blob(self, sha256: str) -> bytes:
        return await self._ask(self.request("GET", f"/v1/blobs/{sha256}"))

    async def signed(self, path: str, message: dict[str, Any] | str) -> Any:
        body = (message if isinstance(message, str) else json.dumps(message)).encode()
        head = self.signature("POST", path, body)
        kind = "Content-Type: application/json\r\n"
        return _json(await self._ask(f"POST {path} HTTP/1.1\r\n{_HEAD}{kind}{head}{_size(body)}\r\n".encode(), body))

    async def deliver(self, work: dict[str, Any], update: bytes, sha256: str, metrics: dict[str, Any] | None) -> None:
        """Deliver an update as agents do: a small one inside its message; metrics None is a masked round's."""
        at, fence = f"/v1/assignments/{work['id']}", work["fence"]
        complete: dict[str, Any] = {"fence": fence, "sha256": sha256}
        if metrics is not None:
            complete |= {"weight": 1.0, "metrics": metrics}
        if len(update) <= INLINE_BYTES:
            await self.signed(f"{at}/complete", complete | {"data": _b64(update)})
            return
        offer = {"fence": fence, "sha256": sha256, "size": len(update)}
        state = await self.signed(f"{at}/upload", offer)
        if state["offset"] < len(update):
            headers = f"Upload-Offset: {state['offset']}\r\nContent-Type: application/offset+octet-stream\r\n"
            await self.bearer("PATCH", f"{at}/upload?fence={fence}", update[state["offset"] :], headers)
        await self.signed(f"{at}/complete", complete)

    def request(self, method: str, path: str, size: int = 0, headers: str = "") -> bytes:
        """The head of a request under the token."""
        length = f"Content-Length: {size}\r\n" if size or method != "GET" else ""
        token = f"Authorization: Bearer {self.token}\r\n"
        return f"{method} {path} HTTP/1.1\r\n{_HEAD}{token}{headers}{length}\r\n".encode()

    def signature(self, method: str, url: str, body: bytes) -> str:
        """The three header lines that sign a request: the same that `protocol.signatures.sign` makes."""
        path, _, query = url.partition("?")
        digest = f"sha-256=:{_b64(hashlib.sha256(body).digest())}:"
        nonce = _b64(os.urandom(16))
        params = (
            '("@method" "@path" "@query" "content-digest")'
            f';created={int(time.time())};keyid="{self.name}";nonce="{nonce}";tag="{TAG}"'
        )
        base = (
            f'"@method": {method}\n"@path": {path}\n"@query": ?{query}\n'
            f'"content-digest": {digest}\n"@signature-params": {params}'
        )
        signature = _b64(self.key.sign(base.encode()))
        return f"Content-Digest: {digest}\r\nSignature-Input: murmur={params}\r\nSignature: murmur=:{signature}:\r\n"

    async def _ask(self, *parts: bytes) -> bytes:
        assert self.connection is not None
        status, body = await self.connection.ask(*parts)
        if status >= 300:
            raise Refused(f"{status}: {body[:300].decode(errors='replace')}")
        return body


def enrol(data: Path, count: int) -> list[Agent]:
    """Agents as they are after enrolment and approval, written into the database of a coordinator that is not running.

    Seen an hour ago, so that none is asked before it has polled.
    """
    agents = [Agent(f"agent{i:05}", Ed25519PrivateKey.generate(), f"benchmark-token-{i:05}") for i in range(count)]
    data.mkdir(parents=True, exist_ok=True)
    store = Store(f"sqlite:///{data / 'murmur.db'}", clock=time.time)
    try:
        with store.db.write() as t:
            ago = t.now - 3600
            clients = [_client(agent, ago) for agent in agents]
            bearers = [
                {"token_hash": hash_token(a.token), "client": a.name, "expires_at": t.now + TOKEN_S} for a in agents
            ]
            t.execute(insert(tables.client), clients)
            t.execute(insert(tables.bearer), bearers)
    finally:
        store.close()
    return agents


def _client(agent: Agent, seen_at: float) -> dict[str, Any]:
    key = agent.key.public_key().public_bytes_raw()
    at = {"created_at": seen_at, "seen_at": seen_at}
    return {"id": agent.name, "public_key": key, "state": "active", "info": INFO, "decided_by": "benchmark", **at}


async def each(agents: Iterable[Agent], do: Callable[[Agent], Awaitable[T]], *, at_once: int = CONNECTING) -> list[T]:
    """Do something with every agent, so many at a time."""
    turn = asyncio.Semaphore(at_once)

    async def one(agent: Agent) -> T:
        async with turn:
            return await do(agent)

    return list(await asyncio.gather(*map(one, agents)))


def run(main: Awaitable[T]) -> T:
    """Run on uvloop where it is installed: the swarm shares the machine with what it measures."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)  # type: ignore[arg-type]
    return uvloop.run(main)  # type: ignore[arg-type]


_POLL = json.dumps({"info": INFO, "busy": {}}).encode()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _size(body: bytes) -> str:
    return f"Content-Length: {len(body)}\r\n"


def _json(body: bytes) -> Any:
    return json.loads(body) if body else None
