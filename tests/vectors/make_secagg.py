"""Writes secagg.json: a whole masked round with counted randomness, step by step, and messages that must be refused;
and secagg_regular.json: a round of eight clients of which each masks with four.

    python tests/vectors/make_secagg.py

Whoever writes another client or coordinator can check every byte against it. Run it only when the protocol is meant to
change: two releases with different vectors cannot take part in the same round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.privacy import bodies, shamir
from murmur.privacy.auxiliary import Block
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.context import Context
from murmur.privacy.fixed_point import quantize, value_bits
from murmur.privacy.server import ServerSession
from murmur.protocol.encoding import b64
from murmur.protocol.errors import MurmurError, PrivacyRefusal

FILE = Path(__file__).with_name("secagg.json")
REGULAR = Path(__file__).with_name("secagg_regular.json")
COHORT = ("amber", "birch", "cedar", "dune", "elm")
EIGHT = (*COHORT, "fir", "gorse", "hazel")


def counted(seed: str) -> Callable[[int], bytes]:
    """Randomness for vectors: the SHA-256 digests of "seed/0", "seed/1", ...; a draw takes as many as it needs."""
    count = 0

    def draw(size: int) -> bytes:
        nonlocal count
        found = b""
        while len(found) < size:
            found += hashlib.sha256(f"{seed}/{count}".encode()).digest()
            count += 1
        return found[:size]

    return draw


def identity(client: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(counted(f"identity {client}")(32))


def public(client: str) -> bytes:
    return identity(client).public_key().public_bytes_raw()


def update(i: int) -> list[float]:
    return [((7 * i + 3 * j) % 11 - 5) / 4 for j in range(6)]  # some lie beyond the clip value of 1


def round_vector(cohort: tuple[str, ...] = COHORT, **changes: Any) -> dict[str, Any]:
    """Threshold four; the last client drops out after it has dealt its shares."""
    packed = Block(metrics=("loss",), integers=1, clients=len(cohort))
    context = Context(
        run="vector",
        round=1,
        attempt=1,
        kind="train",
        model_sha256=hashlib.sha256(b"model").hexdigest(),
        layout_sha256=hashlib.sha256(b"layout").hexdigest(),
        settings_sha256=hashlib.sha256(b"settings").hexdigest(),
        dim=6,
        aux=packed.size,
        cohort=cohort,
        threshold=4,
        min_clients=3,
        clip_value=1.0,
        max_weight=10,
        **changes,
    )
    server = ServerSession(context, {u: public(u) for u in cohort})
    clients = {
        u: ClientSession(context, u, identity(u), policy=Policy(), known={}, random=counted(f"session {u}"))
        for u in cohort
    }
    adverts = {u: clients[u].advertise() for u in cohort}
    roster = server.roster(adverts)
    shares = {u: clients[u].share(roster) for u in cohort}
    inboxes = {u: server.inbox(u, adverts, shares) for u in cohort}
    updates, uploads = {}, {}
    staying = cohort[:-1]
    ring, aux = np.zeros(context.dim, np.uint32), np.zeros(context.aux, np.uint64)
    for i, u in enumerate(staying):
        clients[u].open(inboxes[u])
        weight, values = i + 1, np.array(update(i))
        metrics = {"loss": (0.25 * i, float(weight))}
        block = packed.encode(weight=weight, clipped=i, metrics=metrics, integers=np.array([-i], np.int64))
        updates[u] = {"weight": weight, "values": values.tolist(), "aux": [int(x) for x in block]}
        body = b"".join(clients[u].mask([values], weight=weight, aux=block))
        uploads[u] = body.hex()
        aux += np.frombuffer(body[: aux.nbytes], np.uint64)
        ring += unpacked(body[aux.nbytes :], context.ring_bits)
    survivors = server.survivors(adverts, shares, staying)
    agrees = {u: clients[u].agree(survivors) for u in staying}
    signatures = {u: server.signatures(u, adverts, agrees) for u in staying}
    reveals = {u: clients[u].reveal(signatures[u]) for u in staying}
    top = np.uint32((1 << context.ring_bits) - 1)
    masked = {"ring": [int(x) for x in ring & top], "aux": [int(x) for x in aux]}
    server.unmask(adverts=adverts, shares=shares, survivors=survivors, reveals=reveals, ring_sum=ring, aux_sum=aux)
    ring &= top
    return {
        "context": context.terms() | {"cohort": list(cohort)},
        "context_sha256": context.digest().hex(),
        "identities": {u: public(u).hex() for u in cohort},
        "adverts": adverts,
        "roster": roster,
        "shares": shares,
        "inboxes": inboxes,
        "updates": updates,
        "uploads": uploads,
        "survivors": survivors,
        "agrees": agrees,
        "signatures": signatures if context.degree else signatures[staying[0]],  # of a complete graph, the same for all
        "reveals": reveals,
        "masked_sum": masked,
        "sum": {"ring": [int(x) for x in ring], "aux": [int(x) for x in aux]},
    }


def unpacked(data: bytes, ring_bits: int) -> np.ndarray[Any, Any]:
    """The words of an upload, (D,) uint32, byte by byte."""
    width = ring_bits // 8
    words = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    return np.array(words, np.uint32)


def ring_vector(**changes: Any) -> dict[str, Any]:
    """What differs from the round above in another ring: its terms, and everything that depends on their digest."""
    found = round_vector(**changes)
    kept = ("context", "context_sha256", "uploads", "masked_sum", "sum")
    return changes | {name: found[name] for name in kept}


def bad_vectors(vector: dict[str, Any]) -> list[dict[str, str]]:
    """Messages of the round, each with one thing wrong; what the coordinator must answer."""
    cohort = vector["context"]["cohort"]
    context = Context(**vector["context"])
    server = ServerSession(context, {u: public(u) for u in cohort})
    adverts, shares, told = vector["adverts"], vector["shares"], vector["survivors"]
    advert, deal, reveal = (
        json.loads(adverts["birch"]),
        json.loads(shares["birch"]),
        json.loads(vector["reveals"]["birch"]),
    )

    def signed(fields: dict[str, Any], **changes: Any) -> str:
        kept = {k: v for k, v in (fields | changes).items() if k not in ("kind", "signature")}
        return bodies.dump_signed(fields["kind"], kept, identity("birch"))

    wrong_self = reveal["self"] | {"amber": b64(bytes(31) + b"\x01")}
    cases = [
        ("check_advert", "a space after a comma", adverts["birch"].replace(",", ", ", 1)),
        ("check_advert", "a key of low order", signed(advert, mask=b64(bytes(32)))),
        ("check_advert", "a key in a second spelling", signed(advert, mask=b64((2**255 - 10).to_bytes(32, "little")))),
        ("check_advert", "one key for two purposes", signed(advert, mask=advert["channel"])),
        ("check_advert", "other terms", signed(advert, context="0" * 64)),
        ("check_advert", "another signature", json_text(advert | {"signature": deal["signature"]})),
        ("check_shares", "another session", signed(deal, session="0" * 64)),
        (
            "check_shares",
            "no share for amber",
            signed(deal, sealed={k: v for k, v in deal["sealed"].items() if k != "amber"}),
        ),
        ("check_agree", "another list", signed(json.loads(vector["agrees"]["birch"]), survivors="0" * 64)),
        ("check_reveal", "a wrong share", signed(reveal, self=wrong_self)),
        (
            "check_reveal",
            "no share beyond the prime",
            signed(reveal, self=reveal["self"] | {"amber": b64(b"\xff" * 32)}),
        ),
    ]
    rest = {
        "check_advert": (),
        "check_shares": (adverts,),
        "check_agree": (told,),
        "check_reveal": (adverts, shares, told),
    }
    found: list[dict[str, str]] = []
    for door, what, body in cases:
        try:
            getattr(server, door)("birch", body, *rest[door])
        except MurmurError as error:
            answer = error.reason if isinstance(error, PrivacyRefusal) else error.code
        else:
            raise AssertionError(f"{door} accepted {what}")
        found.append({"door": door, "client": "birch", "what": what, "body": body, "answer": answer})
    return found


def json_text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def build() -> dict[str, Any]:
    secret = bytes(range(31))
    shares = shamir.split(secret, range(1, 6), 3, counted("shamir"))
    values = [0.0, 1.0, -1.0, 0.5, 1e-9, -3.0]
    words = quantize(np.array(values), weight=3, clip_value=2.0, max_weight=8, n=5)
    vector = round_vector()
    return {
        "shamir": {"secret": secret.hex(), "threshold": 3, "shares": {str(x): s.hex() for x, s in shares.items()}},
        "fixed_point": {
            "clients": 5,
            "bits": value_bits(5),
            "clip_value": 2.0,
            "max_weight": 8,
            "weight": 3,
            "values": values,
            "words": [int(w) for w in words],
        },
        "round": vector,
        "rings": [ring_vector(ring_bits=16), ring_vector(ring_bits=24), ring_vector(total_weight=16)],
        "bad": bad_vectors(vector),
    }


if __name__ == "__main__":
    for file, vectors in ((FILE, build()), (REGULAR, round_vector(EIGHT, degree=4))):
        file.write_text(json.dumps(vectors, indent=1, sort_keys=True) + "\n")
