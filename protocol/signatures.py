"""Signed requests: RFC 9421 HTTP message signatures with Ed25519, over the method, path, query and body digest.

The host is left out on purpose: a proxy may change it, and a client's key is enrolled at one coordinator only. What was
signed is bound to its time (`created`) and to a nonce; remembering nonces for the `MAX_AGE_S` in which a request could
be replayed is the coordinator's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures import algorithms
from http_message_signatures.exceptions import InvalidSignature
from http_message_signatures.resolvers import HTTPSignatureKeyResolver
from http_message_signatures.signatures import HTTPMessageSigner, HTTPMessageVerifier

from .encoding import b64, unb64
from .errors import NotAuthenticated, Replayed

LABEL = "murmur"
TAG = "murmur-1"
COVERED = ("@method", "@path", "@query", "content-digest")
MAX_AGE_S = 300.0  # clocks of two organizations are rarely further apart, and nonces must be kept for so long
NONCE_BYTES = 16
# The package's documented name; it re-exports it without an __all__, which the type checker takes for private.
_ED25519 = algorithms.ED25519  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Who signed a request, and the pair that must not be seen twice: (keyid, nonce)."""

    keyid: str
    nonce: str
    created: int


def sign(
    method: str, url: str, body: bytes, *, key: Ed25519PrivateKey, keyid: str, created: int, nonce: bytes
) -> dict[str, str]:
    """The headers that sign a request: Content-Digest, Signature-Input and Signature.

    url: as it is sent, percent-encoded; either absolute or from its path on.
    created: seconds since 1970. nonce: at least 16 random bytes, new for every request, a repeated one included.
    """
    if len(nonce) < NONCE_BYTES:
        raise ValueError(f"a nonce of {len(nonce)} bytes, at least {NONCE_BYTES} are needed")
    request = _Request(method.upper(), _absolute(url), {})
    signer = HTTPMessageSigner(signature_algorithm=_ED25519, key_resolver=_Keys(private=key))
    signer.sign(
        request,
        key_id=keyid,
        created=datetime.fromtimestamp(created, UTC),
        nonce=b64(nonce),
        label=LABEL,
        tag=TAG,
        include_alg=False,
        covered_component_ids=COVERED,
        body=body,
    )
    return request.headers


def verify(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    public_key_of: Callable[[str], bytes | None],
    now: float,
) -> Verified:
    """Who signed this request; the caller then refuses a (keyid, nonce) that it has seen in the last 300 s.

    headers: any mapping whose `items()` gives every field line. public_key_of: the 32 bytes of a client's Ed25519 key,
    or None for one that is not known. now: seconds since 1970.
    Raises Replayed when the signature is right but older than MAX_AGE_S, NotAuthenticated for everything else; neither
    says what was wrong. What `public_key_of` raises is passed on: a store that is down is not a wrong signature.
    """
    request = _Request(method.upper(), _absolute(url), headers)
    keys = _Keys(public_key_of=public_key_of)
    verifier = _Verifier(signature_algorithm=_ED25519, key_resolver=keys)
    try:
        (found,) = verifier.verify(
            request, max_age=None, expect_tag=TAG, expect_label=LABEL, require_components=COVERED, body=body
        )
        created, nonce = int(found.parameters["created"]), str(found.parameters["nonce"])
        keyid = str(found.parameters["keyid"])
        if len(unb64(nonce)) < NONCE_BYTES or len(nonce) > 128:
            raise NotAuthenticated
    except Exception:  # the library raises many kinds; an unknown caller learns none of them
        if keys.failure is not None:
            raise keys.failure from None
        raise NotAuthenticated from None
    if now - created > MAX_AGE_S:
        raise Replayed
    if created - now > MAX_AGE_S:
        raise NotAuthenticated
    return Verified(keyid=keyid, nonce=nonce, created=created)


def _absolute(url: str) -> str:
    # The library parses absolute URLs only; scheme and host are not covered, so any will do.
    return f"http://murmur{url}" if url.startswith("/") else url


@dataclass(slots=True)
class _Request:
    method: str
    url: str
    headers: Any


class _Keys(HTTPSignatureKeyResolver):
    def __init__(
        self,
        *,
        private: Ed25519PrivateKey | None = None,
        public_key_of: Callable[[str], bytes | None] = lambda keyid: None,
    ) -> None:
        self._private = private
        self._public_key_of = public_key_of
        self.failure: Exception | None = None

    def resolve_private_key(self, key_id: str) -> Ed25519PrivateKey:
        assert self._private is not None
        return self._private

    def resolve_public_key(self, key_id: str) -> Ed25519PublicKey | None:
        try:
            raw = self._public_key_of(key_id)
        except Exception as error:  # the library would turn it into an invalid signature
            self.failure = error
            raise
        return None if raw is None else Ed25519PublicKey.from_public_bytes(raw)


class _Verifier(HTTPMessageVerifier):
    """The library reads the wall clock here; `verify` checks `created` against the clock it was given instead."""

    def validate_created_and_expires(self, sig_input: object, max_age: object = None) -> None:
        params: Mapping[str, object] = getattr(sig_input, "params", {})
        if type(params.get("created")) is not int or "expires" in params or "nonce" not in params:
            raise InvalidSignature("created and nonce are needed, expires is not taken")
