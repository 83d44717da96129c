"""Keys: the standards' vectors, and that everything a key is bound to changes it."""

import itertools

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from murmur.privacy import bodies, keys
from murmur.protocol.encoding import canonical_json
from murmur.protocol.errors import PrivacyRefusal


def test_hkdf_is_rfc_5869():
    """Appendix A, test cases 1 and 3."""
    found = keys.hkdf(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert found.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    found = keys.hkdf(b"\x0b" * 22, salt=b"", info=b"", length=42)
    assert found.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"


def test_exchange_is_rfc_7748():
    """Sections 5.2 and 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    found = keys.exchange(X25519PrivateKey.from_private_bytes(scalar), point, "a")
    assert found.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    bob = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    assert keys.public_bytes(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert (
        keys.exchange(bob, alice, "alice").hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_signatures_are_rfc_8032():
    """Section 7.1, test 1; a body's signature is the same over its domain and canonical JSON."""
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert key.public_key().public_bytes_raw() == public
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b"
    )
    signature = key.sign(b'murmur secure aggregation 1\n{"a":1,"kind":"k"}')
    bodies.check_statement({"kind": "k", "a": 1}, signature, public, "u")
    with pytest.raises(PrivacyRefusal):
        bodies.check_statement({"kind": "k", "a": 2}, signature, public, "u")
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, canonical_json({"kind": "k", "a": 1}))  # not without the domain


def test_the_cipher_of_shares_is_rfc_8439():
    """Section 2.8.2 for the cipher; a sealed share is that cipher under a derived key, with the way as its data."""
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    text += b"sunscreen would be it."
    aead = ChaCha20Poly1305(bytes(range(0x80, 0xA0)))
    found = aead.encrypt(bytes.fromhex("070000004041424344454647"), text, bytes.fromhex("50515253c0c1c2c3c4c5c6c7"))
    assert found[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert found[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    sealed = keys.seal(b"s" * 32, b"p" * 64, b"session", "a", "b", b"deal")
    head = '["murmur secure aggregation 1","shares",'
    key = keys.hkdf(b"s" * 32, salt=b"session", info=f'{head}"a","b"]'.encode())
    data = f'{head}"{b"session".hex()}","a","b","{b"deal".hex()}"]'.encode()
    assert ChaCha20Poly1305(key).decrypt(bytes(12), sealed, data) == b"p" * 64
    assert len(sealed) == keys.SEALED_BYTES


def test_a_sealed_share_opens_on_its_own_way_only():
    way = {"secret": b"s" * 32, "session": b"session", "sender": "a", "receiver": "b", "deal": b"deal"}
    sealed = keys.seal(plain=b"p" * 64, **way)
    assert keys.unseal(sealed=sealed, **way) == b"p" * 64
    for change in (
        {"secret": b"t" * 32},
        {"session": b"other"},
        {"sender": "c"},
        {"receiver": "c"},
        {"deal": b"other"},
    ):
        with pytest.raises(PrivacyRefusal) as refused:
            keys.unseal(sealed=sealed, **way | change)
        assert refused.value.reason == "not_sealed"
    with pytest.raises(PrivacyRefusal):
        keys.unseal(sealed=sealed, **way | {"sender": "b", "receiver": "a"})


def test_everything_a_mask_depends_on_changes_it():
    bound = {"session": b"session", "shared": b"shared"}
    masks = [
        keys.pair_mask(b"s" * 32, first="a", second="b", **bound),
        keys.pair_mask(b"t" * 32, first="a", second="b", **bound),
        keys.pair_mask(b"s" * 32, first="a", second="c", **bound),
        keys.pair_mask(b"s" * 32, first="a", second="b", **bound | {"session": b"other"}),
        keys.pair_mask(b"s" * 32, first="a", second="b", **bound | {"shared": b"other"}),
        keys.self_mask(b"s" * 32, client="a", **bound),
        keys.self_mask(b"s" * 32, client="b", **bound),
        keys.self_mask(b"s" * 32, client="a", **bound | {"session": b"other"}),
        keys.self_mask(b"s" * 32, client="a", **bound | {"shared": b"other"}),
    ]
    every = list(itertools.chain(*masks))
    assert len(set(every)) == len(every) == 18
    assert masks[0] == keys.pair_mask(b"s" * 32, first="b", second="a", **bound)


def test_commitments_and_private_keys_depend_on_whose_they_are():
    commitments = {
        keys.commit_share(b"s", "a", "b", "self", b"x"),
        keys.commit_share(b"t", "a", "b", "self", b"x"),
        keys.commit_share(b"s", "b", "a", "self", b"x"),
        keys.commit_share(b"s", "a", "b", "mask", b"x"),
        keys.commit_share(b"s", "a", "b", "self", b"y"),
        keys.commit_secret(b"s", "a", b"x"),
        keys.commit_secret(b"s", "b", b"x"),
        keys.commit_secret(b"t", "a", b"x"),
    }
    assert len(commitments) == 8
    privates = {
        keys.mask_private(seed, context=context, client=client).private_bytes_raw()
        for seed, context, client in itertools.product((b"x", b"y"), (b"1", b"2"), ("a", "b"))
    }
    assert len(privates) == 8
