"""Logins of people: passwords, sessions, one-time links, API tokens. SQL sees hashes only."""

from __future__ import annotations

import hashlib
import secrets
import threading

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ..protocol.accounts import CredentialView, UserView
from ..protocol.errors import NotAuthenticated, OperatorError
from ..protocol.roles import Role
from .store import Store
from .store.accounts import ID_DIGITS, Kind, Person

LINK_S = 15 * 60
WELCOME_S = 3 * 86_400  # of the link that a new user is sent
OPERATOR = "operator"  # who acts on this machine, in its database, without an account
MEMORY_KIB, PASSES = 19_456, 2  # OWASP's first choice for Argon2id: 19 MiB, two passes, one lane
_slots = threading.Semaphore(2)  # each check takes 19 MiB and tens of milliseconds of a core


class People:
    def __init__(self, store: Store, *, session_s: float) -> None:
        self._accounts, self._session_s = store.accounts, session_s
        self._nobody = _hash_password(secrets.token_urlsafe())

    def add(self, name: str, role: Role, password: str | None, *, by: str = OPERATOR, new: bool = False) -> None:
        """Add an account or change it; without a password it is entered by one-time links and API tokens only.

        Raises Conflict where it would leave no admin, and with `new` where the name is taken.
        """
        self._accounts.put(name, role, None if password is None else _checked(password), by=by, new=new)

    def all(self) -> list[UserView]:
        return self._accounts.all()

    def remove(self, name: str, *, by: str = OPERATOR) -> None:
        """Remove an account and all that it holds. Raises NotFound, and Conflict for the last admin."""
        self._accounts.remove(name, by=by)

    def credentials(self, name: str | None = None) -> list[CredentialView]:
        return self._accounts.credentials(name)

    def withdraw(self, id: str, *, by: str = OPERATOR) -> None:
        """Take a token back or end a session. Raises NotFound."""
        self._accounts.withdraw(id, by=by)

    def set_password(self, name: str, password: str, *, before: str) -> None:
        """Change one's own password; before: the one until now, where there is one. Raises NotAuthenticated."""
        known = self._accounts.password(name)
        if known is not None and not _fits(before, known):
            raise NotAuthenticated("the password until now is another one")
        self._accounts.set_password(name, _checked(password), by=name)

    def login(self, name: str, password: str) -> str | None:
        """A session token, or None; an unknown name costs the same time as a wrong password."""
        known = self._accounts.password(name)
        fits = _fits(password, known or self._nobody)
        return self._grant(name, "session", self._session_s) if known and fits else None

    def link(self, name: str, *, lifetime_s: float = LINK_S) -> str:
        """A token that logs in once, within a quarter of an hour."""
        return self._grant(name, "link", lifetime_s)

    def redeem(self, link: str) -> str | None:
        session = new_token()
        fits = self._accounts.redeem(hash_token(link), hash_token(session), lifetime_s=self._session_s)
        return session if fits else None

    def api_token(
        self, name: str, *, lifetime_s: float, label: str = "", role: Role | None = None, by: str = OPERATOR
    ) -> CredentialView:
        """A token of an account, with `token` in it; role: what it may, where that is less than the account."""
        token = new_token()
        made = self._accounts.grant(
            name, "api", hash_token(token), lifetime_s=lifetime_s, label=label, role=role, by=by
        )
        return made.model_copy(update={"token": token})

    def holder(self, kind: Kind, token: str) -> Person | None:
        return self._accounts.holder(kind, hash_token(token))

    def end(self, token: str) -> None:
        self._accounts.end(hash_token(token))

    def _grant(self, name: str, kind: Kind, lifetime_s: float) -> str:
        token = new_token()
        self._accounts.grant(name, kind, hash_token(token), lifetime_s=lifetime_s)
        return token


def credential_id(token: str) -> str:
    """What names a session or token in lists."""
    return hash_token(token)[:ID_DIGITS]


def new_token() -> str:
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Tokens are 256 random bits, so a plain hash is enough to keep them from a reader of the database."""
    return hashlib.sha256(token.encode()).hexdigest()


def _checked(password: str) -> str:
    if len(password) < 12:
        raise OperatorError("a password has 12 characters or more")
    return _hash_password(password)


def _fits(password: str, phc: str) -> bool:
    with _slots:
        try:
            Argon2id.verify_phc_encoded(password.encode(), phc)
        except InvalidKey:
            return False
    return True


def _hash_password(password: str) -> str:
    kdf = Argon2id(salt=secrets.token_bytes(16), length=32, iterations=PASSES, lanes=1, memory_cost=MEMORY_KIB)
    return kdf.derive_phc_encoded(password.encode())
