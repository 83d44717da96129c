"""A whole masked round in one process, with the hooks that the tests turn: who drops out, what a liar sends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.privacy import bodies
from murmur.privacy.auxiliary import Block
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.context import Context
from murmur.privacy.server import ServerSession
from murmur.protocol.thresholds import default_threshold


def counter_random(seed: str) -> Callable[[int], bytes]:
    """Deterministic bytes: SHA-256 of the seed and a counter. For tests and vectors only."""
    count = 0

    def draw(size: int) -> bytes:
        nonlocal count
        found = b""
        while len(found) < size:
            found += hashlib.sha256(f"{seed}/{count}".encode()).digest()
            count += 1
        return found[:size]

    return draw


def identity_of(client: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"identity {client}".encode()).digest())


BLOCK = Block(metrics=("loss", "accuracy"), integers=2, clients=50)


def make_context(n: int = 4, dim: int = 100, **changes: Any) -> Context:
    values: dict[str, Any] = {
        "run": "r1",
        "round": 1,
        "attempt": 1,
        "kind": "train",
        "model_sha256": "a" * 64,
        "layout_sha256": "b" * 64,
        "settings_sha256": "c" * 64,
        "dim": dim,
        "aux": BLOCK.size,
        "cohort": tuple(f"c{i:02}" for i in range(n)),
        "threshold": default_threshold(n),
        "min_clients": 2,
        "clip_value": 1.0,
        "max_weight": 1000,
    }
    return Context(**values | changes)


class Fleet:
    """A coordinator and its clients; each phase stores its messages as the coordinator's rows would."""

    def __init__(self, context: Context, *, seed: str = "fleet", policy: Policy | None = None) -> None:
        self.context = context
        self.seed = seed
        self.server = ServerSession(context, {u: public_of(u) for u in context.cohort})
        policy = policy or Policy(min_clients=2)
        self.clients = {
            u: ClientSession(
                context,
                u,
                identity_of(u),
                policy=policy,
                known={},
                random=counter_random(f"{seed}/{context.attempt}/{u}"),
            )
            for u in context.cohort
        }
        self.adverts: dict[str, str] = {}
        self.shares: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.agrees: dict[str, str] = {}
        self.reveals: dict[str, str] = {}
        self.told = ""

    def without(self, gone: Collection[str]) -> list[str]:
        return [u for u in self.context.cohort if u not in gone]

    def advertise(self, who: Collection[str]) -> None:
        for u in who:
            self.adverts[u] = self.clients[u].advertise()
            self.server.check_advert(u, self.adverts[u])

    def share(self, who: Collection[str]) -> None:
        roster = self.server.roster(self.adverts)
        for u in who:
            self.shares[u] = self.clients[u].share(roster)
            self.server.check_shares(u, self.shares[u], self.adverts)

    def open(self, who: Collection[str]) -> None:
        for u in who:
            self.clients[u].open(self.server.inbox(u, self.adverts, self.shares))

    def upload(self, who: Collection[str], *, weights: Mapping[str, int] | None = None) -> None:
        for u in who:
            weight = (weights or self.weights)[u]
            self.uploads[u] = b"".join(self.clients[u].mask([self.values(u)], weight=weight, aux=self.aux(u, weight)))

    def agree(self, who: Collection[str]) -> None:
        self.told = self.server.survivors(self.adverts, self.shares, self.uploads)
        for u in who:
            self.agrees[u] = self.clients[u].agree(self.told)
            self.server.check_agree(u, self.agrees[u], self.told)

    def reveal(self, who: Collection[str]) -> None:
        for u in who:
            self.reveals[u] = self.clients[u].reveal(self.signatures(u))
            self.server.check_reveal(u, self.reveals[u], self.adverts, self.shares, self.told)

    def signatures(self, client: str) -> str:
        return self.server.signatures(client, self.adverts, self.agrees)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums of the uploads' ring vectors and auxiliary blocks, as they came."""
        ring, aux = np.zeros(self.context.dim, np.uint32), np.zeros(self.context.aux, np.uint64)
        for body in self.uploads.values():
            aux += np.frombuffer(body[: aux.nbytes], np.uint64)
            ring += np.frombuffer(body[aux.nbytes :], np.uint32)
        return ring, aux

    def unmask(self) -> tuple[np.ndarray, np.ndarray]:
        ring, aux = self.sums()
        self.faults = self.server.unmask(
            adverts=self.adverts,
            shares=self.shares,
            survivors=self.told,
            reveals=self.reveals,
            ring_sum=ring,
            aux_sum=aux,
        )
        return ring, aux

    def until_upload(self) -> Fleet:
        for phase in (self.advertise, self.share, self.open, self.upload):
            phase(self.context.cohort)
        return self

    def until_agree(self) -> Fleet:
        self.until_upload().agree(self.context.cohort)
        return self

    def until_reveal(self) -> Fleet:
        self.until_agree().reveal(self.context.cohort)
        return self

    # What the clients bring

    @property
    def weights(self) -> dict[str, int]:
        return {u: 1 + 37 * i for i, u in enumerate(self.context.cohort)}

    def values(self, client: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {client}".encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(0, 0.3, self.context.dim).astype(np.float32)

    def aux(self, client: str, weight: int) -> np.ndarray:
        i = self.context.cohort.index(client)
        integers = np.array([i - 2, 10**12 * i], np.int64)
        metrics = {"loss": (0.5 * i, float(weight)), "accuracy": (float(i), float(weight))}
        return BLOCK.encode(weight=weight, clipped=i, metrics=metrics, integers=integers)


def public_of(client: str) -> bytes:
    return identity_of(client).public_key().public_bytes_raw()


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    return make_context


@pytest.fixture(scope="session")
def fleet() -> Callable[..., Fleet]:
    """fleet(n=..., dim=..., seed=...): a round that nobody has started yet; other names change the context."""

    def build(
        n: int = 4, dim: int = 100, *, seed: str = "fleet", policy: Policy | None = None, **changes: Any
    ) -> Fleet:
        return Fleet(make_context(n, dim, **changes), seed=seed, policy=policy)

    return build


@pytest.fixture(scope="session")
def join(context: Callable[..., Context]) -> Callable[..., ClientSession]:
    """join(context, client, ...): one client's session, with deterministic randomness."""

    def build(terms: Context, me: str = "c00", **changes: Any) -> ClientSession:
        options: dict[str, Any] = {"policy": Policy(min_clients=2), "known": {}, "random": counter_random(f"join {me}")}
        return ClientSession(terms, me, identity_of(me), **options | changes)

    return build


@pytest.fixture(scope="session")
def identity() -> Callable[[str], Ed25519PrivateKey]:
    return identity_of


@pytest.fixture(scope="session")
def randomness() -> Callable[[str], Callable[[int], bytes]]:
    return counter_random


@pytest.fixture(scope="session")
def forge() -> Callable[..., str]:
    """forge(body, {key: value}, by=client): a body with other fields, signed by that client if one is named."""

    def build(body: str, changes: Mapping[str, Any], *, by: str = "") -> str:
        fields = json.loads(body) | changes
        kind = fields.pop("kind")
        if not by:
            return bodies.dump(kind, fields)
        fields.pop("signature")
        return bodies.dump_signed(kind, fields, identity_of(by))

    return build


@pytest.fixture(scope="session")
def block() -> Block:
    return BLOCK
