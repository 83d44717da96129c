"""Bytes that mean the same everywhere: canonical JSON, digests, fingerprints, base64."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from typing import Any

from .errors import BadRequest

DIGEST = re.compile(r"[0-9a-f]{64}")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """The one encoding of a value that is signed or hashed: sorted keys, no spaces, ASCII, no NaN."""
    return _CANONICAL.encode(value).encode()


def parse_json(data: bytes, *, limit_bytes: int = 1 << 20) -> Any:
    """Parse untrusted JSON; NaN and Infinity, repeated keys and more than `limit_bytes` raise BadRequest."""
    if len(data) > limit_bytes:
        raise BadRequest(f"{len(data)} bytes of JSON, at most {limit_bytes} are taken")
    try:
        text = data.decode()  # json.loads itself would guess UTF-16 and UTF-32 too
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def sha256_hex(*parts: bytes) -> str:
    """SHA-256 over parts with their lengths in front, so that no two lists of parts hash alike."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def fingerprint(public_key: bytes) -> str:
    """What two people read to each other to compare a key: 32 hex digits of its SHA-256 in groups of four."""
    digits = hashlib.sha256(public_key).hexdigest()[:32]
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    """Strict base64; anything else raises BadRequest."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise BadRequest("not base64") from None
