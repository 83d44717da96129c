"""Keys of a masked round: what each is derived from, and the sealing of shares between two clients.

Every key is HKDF-SHA256 of a secret with a digest as salt and a label that names its use and its parties, so that no
key serves two purposes, two rounds or two directions. Sources: RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (AEAD).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..protocol.encoding import canonical_json
from .context import refusal
from .shamir import PRIME, SHARE_BYTES

KEY_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16  # two shares and the tag
_ONCE = bytes(12)  # the nonce: a sealing key is made for one ordered pair and one message
_PROBE = X25519PrivateKey.from_private_bytes(hashlib.sha256(b"any key shows a point of low order").digest())


class MaskKeys(NamedTuple):
    """The AES-256 keys of one mask: for the 32-bit ring vector and for the 64-bit auxiliary block."""

    ring: bytes
    aux: bytes


def hkdf(secret: bytes, *, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret)


def _label(use: str, *parts: str) -> bytes:
    return canonical_json(["murmur secure aggregation 1", use, *parts])


def mask_private(seed: bytes, *, context: bytes, client: str) -> X25519PrivateKey:
    """The private mask key that grows from a seed; the seed is what is shared among the clients."""
    return X25519PrivateKey.from_private_bytes(hkdf(seed, salt=context, info=_label("mask private key", client)))


def public_bytes(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def check_spelling(key: bytes, whose: str) -> None:
    """Raise PrivacyRefusal for a public key that has a second spelling."""
    if int.from_bytes(key, "little") >= PRIME:
        raise refusal("bad_key", f"{whose} sent a key that is no usable public key", clients=[whose])


def check_public(key: bytes, whose: str) -> None:
    """Raise PrivacyRefusal for a public key under which an exchange would not be secret; `exchange` itself does too."""
    exchange(_PROBE, key, whose)


def exchange(mine: X25519PrivateKey, theirs: bytes, whose: str) -> bytes:
    """The X25519 secret of two keys; raises PrivacyRefusal for a point of low order."""
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise refusal("bad_key", f"{whose} sent a key that is no usable public key", clients=[whose]) from None


def pair_mask(secret: bytes, *, session: bytes, shared: bytes, first: str, second: str) -> MaskKeys:
    """The mask that two clients have in common; the one that sorts first adds it, the other subtracts it."""
    low, high = sorted((first, second))
    return _mask(secret, session, _label("pair mask", low, high, shared.hex()))


def self_mask(secret: bytes, *, session: bytes, shared: bytes, client: str) -> MaskKeys:
    """A client's own mask, which it adds."""
    return _mask(secret, session, _label("self mask", client, shared.hex()))


def _mask(secret: bytes, session: bytes, info: bytes) -> MaskKeys:
    both = hkdf(secret, salt=session, info=info, length=2 * KEY_BYTES)
    return MaskKeys(both[:KEY_BYTES], both[KEY_BYTES:])


def seal(secret: bytes, plain: bytes, session: bytes, sender: str, receiver: str, deal: bytes) -> bytes:
    """Encrypt two shares for one receiver; `deal` (all of the sender's commitments) is authenticated with them."""
    key = hkdf(secret, salt=session, info=_label("shares", sender, receiver))
    return ChaCha20Poly1305(key).encrypt(_ONCE, plain, _label("shares", session.hex(), sender, receiver, deal.hex()))


def unseal(secret: bytes, sealed: bytes, session: bytes, sender: str, receiver: str, deal: bytes) -> bytes:
    """What `seal` encrypted; raises PrivacyRefusal when anything of it differs."""
    key = hkdf(secret, salt=session, info=_label("shares", sender, receiver))
    try:
        return ChaCha20Poly1305(key).decrypt(
            _ONCE, sealed, _label("shares", session.hex(), sender, receiver, deal.hex())
        )
    except InvalidTag:
        raise refusal("not_sealed", f"the shares from {sender} to {receiver} do not open", clients=[sender]) from None


def commit_secret(session: bytes, client: str, secret: bytes) -> bytes:
    """Commitment to a self-mask secret; it hides, since the secret is 31 random bytes."""
    return _hash(_label("commit secret", session.hex(), client), secret)


def commit_share(session: bytes, dealer: str, holder: str, which: str, share: bytes) -> bytes:
    """Commitment to one share, so that whoever shows a wrong one can be named; `which` is "self" or "mask"."""
    return _hash(_label("commit share", session.hex(), dealer, holder, which), share)


def _hash(label: bytes, data: bytes) -> bytes:
    return hashlib.sha256(len(label).to_bytes(8, "big") + label + data).digest()
