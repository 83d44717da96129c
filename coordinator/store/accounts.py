"""People: accounts, and the hashes of what they hold: sessions, one-time links, API tokens."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sqlalchemy import delete, insert, select

from ...protocol.errors import NotFound
from .database import Database
from .tables import account, credential

Kind = Literal["session", "link", "api"]


class Person(NamedTuple):
    name: str
    role: Literal["admin", "viewer"]


class Accounts:
    def __init__(self, db: Database) -> None:
        self._db = db

    def put(self, name: str, role: Literal["admin", "viewer"], password_phc: str | None) -> None:
        """Add an account, or replace its role and password; its sessions end."""
        with self._db.write() as t:
            known = t.scalar(select(account.c.name).where(account.c.name == name))
            values = {"role": role, "password": password_phc}
            if known:
                t.execute(account.update().where(account.c.name == name).values(**values))
                t.execute(delete(credential).where(credential.c.account == name, credential.c.kind == "session"))
            else:
                t.execute(insert(account).values(name=name, created_at=t.now, **values))
            t.append("audit", action="account changed" if known else "account added", account=name, role=role)

    def password(self, name: str) -> str | None:
        """The Argon2id PHC string to check a password against; None where there is no such login."""
        with self._db.read() as c:
            return c.scalar(select(account.c.password).where(account.c.name == name))

    def role(self, name: str) -> str | None:
        with self._db.read() as c:
            return c.scalar(select(account.c.role).where(account.c.name == name))

    def grant(self, name: str, kind: Kind, token_hash: str, *, lifetime_s: float) -> None:
        """Let whoever holds the token act as the account until it expires; raises NotFound for an unknown account."""
        with self._db.write() as t:
            if t.scalar(select(account.c.name).where(account.c.name == name)) is None:
                raise NotFound(f"no account named {name!r}")
            t.execute(delete(credential).where(credential.c.expires_at < t.now))
            row = {"token_hash": token_hash, "kind": kind, "account": name, "created_at": t.now}
            t.execute(insert(credential).values(**row, expires_at=t.now + lifetime_s))
            if kind == "api":
                t.append("audit", action="API token made", account=name)

    def holder(self, kind: Kind, token_hash: str) -> Person | None:
        with self._db.read() as c:
            query = select(account.c.name, account.c.role).join(credential, credential.c.account == account.c.name)
            fits = (
                credential.c.token_hash == token_hash,
                credential.c.kind == kind,
                credential.c.expires_at > self._db.clock(),
            )
            row = c.execute(query.where(*fits)).first()
        return Person(*row) if row else None

    def redeem(self, link_hash: str, session_hash: str, *, lifetime_s: float) -> bool:
        """Turn a one-time link into a session; False where the link is unknown, used or expired."""
        with self._db.write() as t:
            fits = (credential.c.token_hash == link_hash, credential.c.kind == "link", credential.c.expires_at > t.now)
            name = t.scalar(select(credential.c.account).where(*fits))
            if name is None:
                return False
            t.execute(delete(credential).where(credential.c.token_hash == link_hash))
            row = {"token_hash": session_hash, "kind": "session", "account": name, "created_at": t.now}
            t.execute(insert(credential).values(**row, expires_at=t.now + lifetime_s))
            t.append("audit", action="logged in by link", account=name)
            return True

    def end(self, token_hash: str) -> None:
        """Take a session, link or token back; it is worth nothing from now on."""
        with self._db.write() as t:
            t.execute(delete(credential).where(credential.c.token_hash == token_hash))
