"""What happened in one committed round, as canonical JSON that anybody can check without asking the coordinator.

A manifest holds what was public in its round already: terms, keys, signatures, digests. It never holds a secret, a
share, a reveal, or what a single client of a masked round sent. Each names the SHA-256 of the manifest before it and of
the model it started from, so that no round of a run can be changed, left out or slipped in once its successor is known.
`verification` reads them.

    D = elements of the ring vector, A = elements of the auxiliary block
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from ..protocol.encoding import canonical_json, parse_json
from ..protocol.errors import BadRequest
from ..protocol.messages import Digest, Kind, Message, Ref, Total
from ..protocol.sections import Name
from . import bodies
from .context import Context
from .masks import Array

FORMAT = "murmur manifest 1"
LIMIT_BYTES = 64 << 20  # of one manifest; a masked sum takes half a kilobyte a client
Round = Annotated[int, Field(ge=1)]
Signature = Annotated[str, Field(max_length=88)]


class MaskedSum(Message):
    """One sum that was taken under masks, with everything its clients signed about it."""

    terms: dict[str, JsonValue] = Field(description="Context.terms(): what every key and every mask is bound to")
    context: Digest = Field(description="SHA-256 of the terms' canonical JSON; every advert is signed over it")
    adverts: tuple[dict[str, str], ...] = Field(description="the roster: each client's keys as it signed them, by id")
    session: Digest = Field(description="of terms and adverts: bodies.session_digest")
    deals: dict[Name, Digest] = Field(description="who dealt shares, with the digest of all that each committed to")
    shared: Digest = Field(description="of session and deals: bodies.shared_digest; every mask depends on it")
    survivors: tuple[Name, ...] = Field(description="whose updates are in the sum, sorted")
    agrees: dict[Name, Signature] = Field(description="Ed25519 signatures on this very list of survivors, by signer")
    sum_sha256: Digest | None = Field(
        description="of the unmasked sum: see `sum_digest`; null under central differential privacy"
    )


class PlainUpdate(Message):
    """One update of a round without masks; the coordinator's word alone stands for it."""

    client: Name
    sha256: Digest | None = Field(description="null under differential privacy: a hash would confirm a guess")
    weight: float = Field(ge=0)


class Server(Message):
    """How the server moved: the recipe's strategy, and the optimizer's state before and after."""

    strategy: dict[str, JsonValue]
    optimizer_before: Digest | None
    optimizer_after: Digest | None


class Manifest(Message):
    """One committed round. `sums` is empty in a plain round, `updates` in a masked one."""

    format: Literal["murmur manifest 1"] = FORMAT
    run: Ref
    round: Round
    attempt: Round
    kind: Kind
    task: Name
    previous: Digest | None = Field(description="SHA-256 of the manifest of the round before; null in the first")
    base: Digest = Field(description="SHA-256 of the version that the round started from")
    version: Digest | None = Field(description="SHA-256 of the version that it made; null after an evaluation")
    settings: dict[str, JsonValue] = Field(description="what was computed: Assignment.settings()")
    server: Server
    cohort: tuple[Name, ...] = Field(description="everyone who was asked, sorted")
    sums: tuple[MaskedSum, ...] = ()
    updates: tuple[PlainUpdate, ...] = ()
    metrics: dict[str, dict[Name, Total]] = Field(description="by number of the version, over all clients together")
    dp: JsonValue = Field(default=None, description="the event that differential privacy accounts for this round")

    @property
    def contributors(self) -> tuple[str, ...]:
        """Whose updates are in it, sorted."""
        names = [name for s in self.sums for name in s.survivors] or [u.client for u in self.updates]
        return tuple(sorted(names))

    def text(self) -> str:
        """The manifest in its one spelling: one line of ASCII, whose SHA-256 the next manifest names."""
        return canonical_json(self.model_dump(mode="json")).decode()


def digest_of(text: str) -> str:
    """The SHA-256 by which a manifest is named."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(text: str) -> Manifest:
    """The manifest that a text is; raises BadRequest unless it is one, in its one spelling.

    What it says is not checked here: see `verification`.
    """
    value = parse_json(text.encode(), limit_bytes=LIMIT_BYTES)
    try:
        found = Manifest.model_validate(value)
        if canonical_json(value).decode() != text:
            raise BadRequest("it is not canonical JSON, which is the one spelling that its hash stands for")
    except RecursionError:
        raise BadRequest("it is nested too deep") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


def masked_sum(
    context: Context,
    *,
    adverts: Mapping[str, str],
    shares: Mapping[str, str],
    survivors: str,
    agrees: Mapping[str, str],
    unmasked: tuple[Array, Array] | None,
) -> MaskedSum:
    """What a manifest says of a sum, out of the messages that were stored of it.

    unmasked: its ring vector and auxiliary block; None where noise was still to be added, for a hash of what the noise
    hides would let anybody confirm a guess.
    """
    members = len(context.cohort)
    told = bodies.load_survivors(survivors, members)
    signed = {u: bodies.load(agrees[u], "agree", bodies.AGREE_KEYS, members=members) for u in sorted(agrees)}
    roster = [bodies.load(adverts[u], "advert", bodies.Advert.KEYS, members=members) for u in sorted(adverts)]
    return MaskedSum(
        terms=json.loads(canonical_json(context.terms())),
        context=context.digest().hex(),
        adverts=tuple(roster),
        session=told.session.hex(),
        deals={u: bodies.load_shares(shares[u], members).deal.hex() for u in sorted(shares)},
        shared=told.shared.hex(),
        survivors=told.clients,
        agrees={u: fields["signature"] for u, fields in signed.items()},
        sum_sha256=sum_digest(*unmasked, context.ring_bits) if unmasked else None,
    )


def sum_digest(ring_sum: Array, aux_sum: Array, ring_bits: int = 32) -> str:
    """SHA-256 of an unmasked sum: the (A,) auxiliary block as uint64, then the (D,) ring vector as uint32.

    Both little-endian, in the order of an upload (`tensors.masked_layout`); a ring of fewer bits fills the low bits of
    its words, and the others are 0.
    """
    digest = hashlib.sha256(aux_sum.astype("<u8", copy=False).data)
    words = ring_sum.astype("<u4", copy=False)
    digest.update((words if ring_bits == 32 else words & np.uint32((1 << ring_bits) - 1)).data)
    return digest.hexdigest()
