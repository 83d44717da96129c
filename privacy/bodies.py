"""The bodies of the conversation: canonical JSON, checked field by field where text becomes an object, and signed.

Everything here comes from the other side and may be hostile: anything that is not exactly the one spelling of the
message that it should be raises BadRequest, and a signature that does not fit raises PrivacyRefusal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..protocol.encoding import DIGEST, b64, canonical_json, parse_json, unb64
from ..protocol.errors import BadRequest
from .context import Context, refusal
from .keys import KEY_BYTES, SEALED_BYTES, check_spelling
from .shamir import SHARE_BYTES, parse_share

SIGNATURE_BYTES = 64
_DOMAIN = b"murmur secure aggregation 1\n"  # no signature made for anything else can be shown here
_MEMBER_BYTES = 1024  # of any body, for each client of the cohort


def dump(kind: str, fields: Mapping[str, Any]) -> str:
    return canonical_json({**fields, "kind": kind}).decode()


def dump_signed(kind: str, fields: Mapping[str, Any], identity: Ed25519PrivateKey) -> str:
    """The body with its Ed25519 signature (RFC 8032) over the canonical JSON of all the rest."""
    signature = identity.sign(_DOMAIN + canonical_json({**fields, "kind": kind}))
    return dump(kind, {**fields, "signature": b64(signature)})


def load(body: Any, kind: str, keys: frozenset[str], *, members: int) -> dict[str, Any]:
    """The fields of a body of this kind; raises BadRequest unless it has these keys in their one spelling."""
    if not isinstance(body, str) or not body.isascii():
        raise BadRequest(f"{kind}: the body must be ASCII text")
    value = parse_json(body.encode(), limit_bytes=_MEMBER_BYTES * (members + 4))
    if not isinstance(value, dict) or value.get("kind") != kind or value.keys() != keys | {"kind"}:
        raise BadRequest(f"{kind}: the body must be an object with the keys {', '.join(sorted(keys | {'kind'}))}")
    if _canonical(value) != body:
        raise BadRequest(f"{kind}: the body is not canonical JSON")
    return value


def _canonical(value: Any) -> str:
    try:
        return canonical_json(value).decode()
    except RecursionError:  # what the reader could just nest, the writer may not
        raise BadRequest("the body is not canonical JSON") from None


def check_signature(fields: Mapping[str, Any], key: bytes, signer: str) -> None:
    """Raise PrivacyRefusal unless `fields` (with kind and signature) were signed by this key."""
    signature = raw(fields["signature"], SIGNATURE_BYTES, "signature")
    check_statement({k: v for k, v in fields.items() if k != "signature"}, signature, key, signer)


def check_statement(statement: Mapping[str, Any], signature: bytes, key: bytes, signer: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _DOMAIN + canonical_json(statement))
    except (InvalidSignature, ValueError):
        what = statement["kind"]
        raise refusal("bad_signature", f"{signer} did not sign this {what}", clients=[signer]) from None


def text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{what} must be text")
    return value


def raw(value: Any, size: int, what: str) -> bytes:
    data = unb64(text(value, what))
    if len(data) != size or b64(data) != value:  # base64 has several spellings of the same bytes
        raise BadRequest(f"{what} must be the base64 of {size} bytes")
    return data


def digest(value: Any, what: str) -> bytes:
    if not DIGEST.fullmatch(text(value, what)):
        raise BadRequest(f"{what} must be 64 hex digits")
    return bytes.fromhex(value)


def mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} must be an object")
    return value


def names(value: Any, what: str) -> tuple[str, ...]:
    """A sorted list of different ids."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadRequest(f"{what} must be a list of ids")
    if sorted(set(value)) != value:
        raise BadRequest(f"{what} must be sorted, each id once")
    return tuple(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advert:
    """A client's keys for one attempt: its identity, for sealing shares, for masks."""

    client: str
    identity: bytes
    channel: bytes
    mask: bytes
    fields: dict[str, Any]

    KEYS = frozenset({"client", "context", "identity", "channel", "mask", "signature"})

    @staticmethod
    def of(fields: Any, context: Context, context_digest: bytes) -> Advert:
        """Check an advert's fields, terms, keys and signature; whose identity key it is, the caller knows."""
        fields = mapping(fields, "an advert")
        if fields.keys() != Advert.KEYS | {"kind"} or fields["kind"] != "advert":
            raise BadRequest("an advert has other keys")
        client = text(fields["client"], "client")
        keys = {name: raw(fields[name], KEY_BYTES, name) for name in ("identity", "channel", "mask")}
        if client not in context.cohort:
            raise refusal("not_in_cohort", f"{client[:80]!r} is not in the cohort")
        if digest(fields["context"], "context") != context_digest:
            raise refusal("wrong_context", f"{client} made its keys for other terms or another round", clients=[client])
        check_spelling(keys["channel"], client)
        check_spelling(keys["mask"], client)
        if len(set(keys.values())) != len(keys):
            raise refusal("duplicate_key", f"{client} uses one key for two purposes", clients=[client])
        check_signature(fields, keys["identity"], client)
        return Advert(client=client, fields=fields, **keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """A client's deal: sealed shares for each other client, commitments to all of them and to its self-mask secret."""

    client: str
    sealed: Mapping[str, bytes]
    commitments: Mapping[str, tuple[bytes, bytes]]
    secret: bytes
    deal: bytes
    fields: dict[str, Any]

    KEYS = frozenset({"client", "session", "sealed", "commitments", "secret", "signature"})


def load_shares(body: Any, members: int) -> Shares:
    """A deal's fields; session, holders and signature are for the caller to check."""
    if not isinstance(body, str):
        raise BadRequest("shares: the body must be ASCII text")
    return _load_shares(body, members)


@lru_cache(maxsize=1024)  # a coordinator reads the same text at the door, for the inboxes and for each reveal
def _load_shares(body: str, members: int) -> Shares:
    fields = load(body, "shares", Shares.KEYS, members=members)
    commitments: dict[str, tuple[bytes, bytes]] = {}
    for holder, pair in mapping(fields["commitments"], "commitments").items():
        commitments[holder] = commitment_pair(pair)
    sealed = {u: raw(v, SEALED_BYTES, "sealed") for u, v in mapping(fields["sealed"], "sealed").items()}
    return Shares(
        client=text(fields["client"], "client"),
        sealed=sealed,
        commitments=commitments,
        secret=raw(fields["secret"], KEY_BYTES, "secret"),
        deal=deal_digest(fields["commitments"], fields["secret"]),
        fields=fields,
    )


def commitment_pair(value: Any) -> tuple[bytes, bytes]:
    """Commitments to the shares of one holder: of the self-mask secret and of the mask key's seed."""
    if not isinstance(value, list) or len(value) != 2:
        raise BadRequest("commitments come in pairs")
    return raw(value[0], KEY_BYTES, "commitment"), raw(value[1], KEY_BYTES, "commitment")


def deal_digest(commitments: Mapping[str, Any], secret: str) -> bytes:
    """32 bytes that stand for everything a dealer committed to."""
    return hashlib.sha256(
        _DOMAIN + canonical_json({"kind": "deal", "commitments": commitments, "secret": secret})
    ).digest()


def session_digest(context_digest: bytes, adverts: Mapping[str, Advert]) -> bytes:
    """The session: 32 bytes that stand for the terms and for every key and signature of everyone who takes part."""
    rows = [adverts[u].fields for u in sorted(adverts)]
    return hashlib.sha256(
        _DOMAIN + canonical_json({"kind": "session", "context": context_digest.hex(), "adverts": rows})
    ).digest()


def shared_digest(session: bytes, deals: Mapping[str, bytes]) -> bytes:
    """U2: 32 bytes that stand for who dealt shares, and which; every mask depends on it."""
    rows = [[u, deals[u].hex()] for u in sorted(deals)]
    return hashlib.sha256(
        _DOMAIN + canonical_json({"kind": "shared", "session": session.hex(), "deals": rows})
    ).digest()


def check_distinct(adverts: Mapping[str, Advert]) -> None:
    """Raise PrivacyRefusal when two of all keys in a roster are the same."""
    seen: dict[bytes, str] = {}
    for u in sorted(adverts):
        for key in (adverts[u].identity, adverts[u].channel, adverts[u].mask):
            if key in seen:
                raise refusal("duplicate_key", f"{seen[key]} and {u} use the same key", clients=[seen[key], u])
            seen[key] = u


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivors:
    """Whose updates are summed, in one session and after one sharing."""

    session: bytes
    shared: bytes
    clients: tuple[str, ...]
    digest: bytes

    KEYS = frozenset({"session", "shared", "survivors"})


def load_survivors(body: str, members: int) -> Survivors:
    fields = load(body, "survivors", Survivors.KEYS, members=members)
    return Survivors(
        session=digest(fields["session"], "session"),
        shared=digest(fields["shared"], "shared"),
        clients=names(fields["survivors"], "survivors"),
        digest=hashlib.sha256(_DOMAIN + body.encode()).digest(),
    )


def agreement(client: str, survivors: Survivors) -> dict[str, str]:
    """What a client signs once: that this list, in this session, is the one it was told."""
    return {"client": client, "session": survivors.session.hex(), "survivors": survivors.digest.hex()}


AGREE_KEYS = frozenset({"client", "session", "survivors", "signature"})
REVEAL_KEYS = frozenset({"client", "session", "self", "mask", "signature"})
ROSTER_KEYS = frozenset({"context", "adverts"})
INBOX_KEYS = frozenset({"client", "session", "deals", "sealed", "commitments"})
SIGNATURES_KEYS = frozenset({"session", "survivors", "signatures"})


class Shown(NamedTuple):
    """The shares one client shows, by dealer: of the survivors' secrets, and of the dropped clients' seeds."""

    secrets: dict[str, bytes]
    seeds: dict[str, bytes]


def load_reveal(fields: Mapping[str, Any]) -> Shown:
    """The shares in a reveal; for whom they should be is for the caller to check."""
    found: list[dict[str, bytes]] = []
    for which in ("self", "mask"):
        shares = {u: raw(v, SHARE_BYTES, "share") for u, v in mapping(fields[which], which).items()}
        try:
            for share in shares.values():
                parse_share(share)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        found.append(shares)
    return Shown(found[0], found[1])
