import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from murmur.clients.identity import create_identity, load_identity
from murmur.protocol.encoding import b64, fingerprint
from murmur.protocol.errors import OperatorError


def test_a_key_comes_back_from_its_file(tmp_path):
    made = create_identity(tmp_path / "key.pem")
    found = load_identity(tmp_path / "key.pem")
    assert found.public_key == made.public_key and len(found.public_key) == 32
    assert found.public_b64 == b64(made.public_key) and found.fingerprint == fingerprint(made.public_key)


def test_only_its_owner_can_read_a_key(tmp_path):
    old = os.umask(0)
    try:
        create_identity(tmp_path / "key.pem")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    before = create_identity(tmp_path / "key.pem").public_key
    with pytest.raises(OperatorError, match="exists already"):
        create_identity(tmp_path / "key.pem")
    assert load_identity(tmp_path / "key.pem").public_key == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644, 0o610])
def test_a_key_that_others_could_reach_is_refused_with_what_to_do(tmp_path, mode):
    create_identity(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(OperatorError, match=f"mode {mode:04o}.*chmod 600"):
        load_identity(tmp_path / "key.pem")


def test_two_keys_are_never_the_same(tmp_path):
    assert create_identity(tmp_path / "a").public_key != create_identity(tmp_path / "b").public_key


def test_what_is_no_key_is_refused(tmp_path):
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content, words in [
        (b"", "not a private key"),
        (b"\xff" * 100, "not a private key"),
        (other, "Ed25519 key is needed"),
    ]:
        path = tmp_path / "key.pem"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(OperatorError, match=words):
            load_identity(path)


def test_a_missing_key_says_what_to_do(tmp_path):
    with pytest.raises(OperatorError, match="enrol this client first"):
        load_identity(tmp_path / "none")
    with pytest.raises(OperatorError, match="cannot write the key"):
        create_identity(tmp_path / "none" / "key.pem")


def test_a_key_does_not_stand_in_its_repr(tmp_path):
    assert "PrivateKey" not in repr(create_identity(tmp_path / "key.pem"))
