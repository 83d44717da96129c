"""A receipt of what left a site: its record of a month or of all, as one JSON document signed with the client's key.

Whoever has the client's public key (the coordinator does, and its fingerprint is what admins compare) can check that
this client said so, and that nobody has changed it since. It says what the agent noted; it cannot say that a changed
agent noted all.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ..protocol.encoding import b64, canonical_json, fingerprint, parse_json, unb64
from ..protocol.errors import BadRequest, OperatorError
from .identity import Identity
from .ledger import Ledger
from .outgoing import KINDS
from .record import Record
from .settings import Settings

FORMAT = "murmur-receipt-1"
LIMIT_BYTES = 1 << 30


def make_receipt(settings: Settings, identity: Identity, record: Record, ledger: Ledger, month: str = "") -> bytes:
    """The receipt of a month (UTC, as in 2026-11), or of all; raises OperatorError for what is no month."""
    since, until = _bounds(month)
    body: dict[str, Any] = {
        "format": FORMAT,
        "client": settings.name,
        "coordinator": settings.coordinator,
        "public_key": identity.public_b64,
        "month": month or None,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kinds": {kind: words for kind, (_, words) in KINDS.items()},
        "asked": [
            {**asdict(a), "about": a.about.model_dump(mode="json")}
            for a in record.assignments(since=since, until=until)
        ],
        "consents": [asdict(c) for c in record.consents() if since <= c.asked_at < until],
        "sent": [asdict(message) for message in reversed(record.sent(since=since, until=until))],
        "counted": [asdict(c) for c in record.counted(since=since, until=until)],
        "spent": [
            {**asdict(c), "event": c.event.to_json()}
            for c in ledger.charges()
            if c.state != "void" and since <= c.at < until
        ],
    }
    return canonical_json({**body, "signature": b64(identity.key.sign(_signed(body)))}) + b"\n"


def verify_receipt(data: bytes) -> dict[str, Any]:
    """The receipt, with the `fingerprint` of the key that has signed it; raises OperatorError when that is not so.

    Whose key it is, the caller has to compare.
    """
    try:
        found = parse_json(data, limit_bytes=LIMIT_BYTES)
        body = {name: value for name, value in found.items() if name != "signature"}
        public_key, signature = unb64(found["public_key"]), unb64(found["signature"])
        known = found["format"] == FORMAT
    except (BadRequest, KeyError, TypeError, AttributeError):
        raise OperatorError("this is no receipt of a Murmur client") from None
    if not known:
        raise OperatorError(f"this receipt has the format {str(found['format'])[:40]!r}, and {FORMAT} is known here")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed(body))
    except (InvalidSignature, ValueError):
        raise OperatorError("the signature is wrong: this receipt was changed, or cut short") from None
    return body | {"fingerprint": fingerprint(public_key)}


def _signed(body: dict[str, Any]) -> bytes:
    return FORMAT.encode() + b"\n" + canonical_json(body)


def _bounds(month: str) -> tuple[str, str]:
    """The first and the last instant of a month, as the record's times compare with them."""
    if not month:
        return "", "9"
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", month):
        raise OperatorError(f"{month[:20]!r} is no month: write it as 2026-11")
    year, number = int(month[:4]), int(month[5:])
    return month, f"{year + number // 12}-{number % 12 + 1:02}"
