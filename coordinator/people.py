"""Logins of people: passwords, sessions, one-time links, API tokens. SQL sees hashes only."""

from __future__ import annotations

import hashlib
import secrets
import threading
from typing import Literal

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ..protocol.errors import OperatorError
from .store import Store
from .store.accounts import Kind, Person

LINK_S = 15 * 60
MEMORY_KIB, PASSES = 19_456, 2  # OWASP's first choice for Argon2id: 19 MiB, two passes, one lane
_slots = threading.Semaphore(2)  # each check takes 19 MiB and tens of milliseconds of a core


class People:
    def __init__(self, store: Store, *, session_s: float) -> None:
        self._accounts, self._session_s = store.accounts, session_s
        self._nobody = _hash_password(secrets.token_urlsafe())

    def add(self, name: str, role: Literal["admin", "viewer"], password: str | None) -> None:
        """Add an account or change it; without a password it is entered by one-time links and API tokens only."""
        if password is not None and len(password) < 12:
            raise OperatorError("a password has 12 characters or more")
        self._accounts.put(name, role, None if password is None else _hash_password(password))

    def login(self, name: str, password: str) -> str | None:
        """A session token, or None; an unknown name costs the same time as a wrong password."""
        known = self._accounts.password(name)
        with _slots:
            try:
                Argon2id.verify_phc_encoded(password.encode(), known or self._nobody)
            except InvalidKey:
                return None
        return self._grant(name, "session", self._session_s) if known else None

    def link(self, name: str) -> str:
        """A token that logs in once, within a quarter of an hour."""
        return self._grant(name, "link", LINK_S)

    def redeem(self, link: str) -> str | None:
        session = new_token()
        fits = self._accounts.redeem(hash_token(link), hash_token(session), lifetime_s=self._session_s)
        return session if fits else None

    def api_token(self, name: str, *, lifetime_s: float) -> str:
        return self._grant(name, "api", lifetime_s)

    def holder(self, kind: Kind, token: str) -> Person | None:
        return self._accounts.holder(kind, hash_token(token))

    def end(self, token: str) -> None:
        self._accounts.end(hash_token(token))

    def _grant(self, name: str, kind: Kind, lifetime_s: float) -> str:
        token = new_token()
        self._accounts.grant(name, kind, hash_token(token), lifetime_s=lifetime_s)
        return token


def new_token() -> str:
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Tokens are 256 random bits, so a plain hash is enough to keep them from a reader of the database."""
    return hashlib.sha256(token.encode()).hexdigest()


def _hash_password(password: str) -> str:
    kdf = Argon2id(salt=secrets.token_bytes(16), length=32, iterations=PASSES, lanes=1, memory_cost=MEMORY_KIB)
    return kdf.derive_phc_encoded(password.encode())
