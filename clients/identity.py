"""The client's identity: an Ed25519 key that is made at the site and never leaves it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..protocol.encoding import b64, fingerprint
from ..protocol.errors import OperatorError


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key, and what others may know of it."""

    key: Ed25519PrivateKey = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """The 32 bytes of the public key."""
        return self.key.public_key().public_bytes_raw()

    @property
    def public_b64(self) -> str:
        return b64(self.public_key)

    @property
    def fingerprint(self) -> str:
        """What an admin compares before approving this client."""
        return fingerprint(self.public_key)


def create_identity(path: Path) -> Identity:
    """Make a key and write it to a new file that only its owner can read; an existing file raises OperatorError."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OperatorError(f"{path} exists already: a client's key is made once and never overwritten") from None
    except OSError as error:
        raise OperatorError(f"cannot write the key {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return Identity(key)


def load_identity(path: Path) -> Identity:
    """Read the client's key; raises OperatorError with what to do when others could have read it too."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read(65_536)
    except FileNotFoundError:
        raise OperatorError(f"there is no key at {path}: enrol this client first") from None
    except OSError as error:
        raise OperatorError(f"cannot read the key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise OperatorError(
            f"others can read or change the key {path} (mode {mode:04o}): run `chmod 600 {path}`; if that may have "
            "happened, delete it, have an admin revoke this client, and enrol again"
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise OperatorError(f"{path} is not a private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise OperatorError(f"{path} holds a {type(key).__name__}, an Ed25519 key is needed")
    return Identity(key)
