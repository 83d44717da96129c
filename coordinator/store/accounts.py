"""People: accounts, and the hashes of what they hold: sessions, one-time links, API tokens."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal, NamedTuple

from sqlalchemy import delete, func, insert, select, update

from ...protocol.accounts import CredentialView, UserView
from ...protocol.errors import Conflict, NotFound, Unavailable
from ...protocol.roles import Role, least
from .audit import note
from .database import Database, Transaction
from .tables import account, credential
from .times import utc

Kind = Literal["session", "link", "api"]
ID_DIGITS = 16  # of a token's hash, which name it; 64 bits are enough to tell apart and too few to be of any use
USED_S = 60.0  # between two notes of when a token was used


class Person(NamedTuple):
    name: str
    role: Role


class Accounts:
    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[UserView]:
        with self._db.read() as c:
            rows = c.execute(select(account).order_by(account.c.name)).mappings().all()
        return [
            UserView(name=r["name"], role=r["role"], password=bool(r["password"]), created_at=utc(r["created_at"]))
            for r in rows
        ]

    def put(self, name: str, role: Role, password_phc: str | None, *, by: str, new: bool = False) -> None:
        """Add an account, or replace its role and password; its sessions end.

        Raises Conflict where it would leave no admin, and with `new` where the name is taken.
        """
        with self._db.write() as t:
            known = t.scalar(select(account.c.role).where(account.c.name == name))
            values = {"role": role, "password": password_phc}
            if known and new:
                raise Conflict(f"there is a user named {name!r} already")
            if known:
                t.execute(update(account).where(account.c.name == name).values(**values))
                t.execute(delete(credential).where(credential.c.account == name, credential.c.kind == "session"))
            else:
                t.execute(insert(account).values(name=name, created_at=t.now, **values))
            if known == "admin":
                _keep_an_admin(t)
            done = "changed" if known else "added"
            t.append("audit", action=f"account {done}", account=name, role=role)
            note(t, f"user {done}", name, by=by, role=role)

    def set_role(self, name: str, role: Role, *, by: str) -> None:
        """Change what an account may, from its next request on. Raises NotFound; Conflict where no admin would be."""
        with self._db.write() as t:
            if not t.execute(update(account).where(account.c.name == name).values(role=role)).rowcount:
                raise NotFound(f"no user named {name!r}")
            _keep_an_admin(t)
            t.append("audit", action="account changed", account=name, role=role)
            note(t, "user changed", name, by=by, role=role)

    def set_password(self, name: str, password_phc: str, *, by: str) -> None:
        """Replace a password; the sessions stay. Raises NotFound."""
        with self._db.write() as t:
            if not t.execute(update(account).where(account.c.name == name).values(password=password_phc)).rowcount:
                raise NotFound(f"no user named {name!r}")
            note(t, "password changed", name, by=by)

    def remove(self, name: str, *, by: str) -> None:
        """Remove an account with all of its sessions and tokens. Raises NotFound; Conflict for the last admin."""
        with self._db.write() as t:
            t.execute(delete(credential).where(credential.c.account == name))
            if not t.execute(delete(account).where(account.c.name == name)).rowcount:
                raise NotFound(f"no user named {name!r}")
            _keep_an_admin(t)
            t.append("audit", action="account removed", account=name)
            note(t, "user removed", name, by=by)

    def password(self, name: str) -> str | None:
        """The Argon2id PHC string to check a password against; None where there is no such login."""
        with self._db.read() as c:
            return c.scalar(select(account.c.password).where(account.c.name == name))

    def role(self, name: str) -> str | None:
        with self._db.read() as c:
            return c.scalar(select(account.c.role).where(account.c.name == name))

    def grant(
        self,
        name: str,
        kind: Kind,
        token_hash: str,
        *,
        lifetime_s: float,
        label: str = "",
        role: Role | None = None,
        by: str = "",
    ) -> CredentialView:
        """Let whoever holds the token act as the account until it expires; raises NotFound for an unknown account.

        label, role: what an API token is for, and what it may where that is less than its account. by: who made it,
        for the audit log; the account itself where it is empty.
        """
        with self._db.write() as t:
            own = t.scalar(select(account.c.role).where(account.c.name == name))
            if own is None:
                raise NotFound(f"no account named {name!r}")
            t.execute(delete(credential).where(credential.c.expires_at < t.now))
            row = {"token_hash": token_hash, "kind": kind, "account": name, "created_at": t.now, "name": label}
            expires_at = t.now + lifetime_s
            t.execute(insert(credential).values(**row, role=role, expires_at=expires_at))
            acts_as = least(own, role)
            if kind == "api":
                t.append("audit", action="API token made", account=name)
                details = {"account": name, "role": acts_as, "until": f"{utc(expires_at):%Y-%m-%d}", "name": label}
                note(t, "token made", token_hash[:ID_DIGITS], by=by or name, **details)
            elif kind == "session":
                note(t, "signed in", name, by=name)
            return CredentialView(
                id=token_hash[:ID_DIGITS],
                kind="api" if kind == "api" else "session",
                account=name,
                name=label,
                role=acts_as,
                created_at=utc(t.now),
                expires_at=utc(expires_at),
            )

    def holder(self, kind: Kind, token_hash: str) -> Person | None:
        """Who holds a token, with what it may; None where it is unknown or expired. Notes that it was used."""
        now = self._db.clock()
        query = select(account.c.name, account.c.role, credential.c.role.label("less"), credential.c.used_at)
        fits = (credential.c.token_hash == token_hash, credential.c.kind == kind, credential.c.expires_at > now)
        with self._db.read() as c:
            query = query.join(credential, credential.c.account == account.c.name)
            row = c.execute(query.where(*fits)).first()
        if row is None:
            return None
        if row.used_at is None or now - row.used_at > USED_S:
            with suppress(Unavailable), self._db.write(durable=False) as t:  # who only reads need not be able to write
                t.execute(update(credential).where(credential.c.token_hash == token_hash).values(used_at=now))
        return Person(row.name, least(row.role, row.less))

    def credentials(self, name: str | None = None) -> list[CredentialView]:
        """Sessions and API tokens that still hold, of one account or of all, the last used first."""
        query = select(credential, account.c.role.label("own")).join(account, account.c.name == credential.c.account)
        query = query.where(credential.c.kind != "link", credential.c.expires_at > self._db.clock())
        with self._db.read() as c:
            rows = c.execute(query if name is None else query.where(account.c.name == name)).mappings().all()
        found = [
            CredentialView(
                id=r["token_hash"][:ID_DIGITS],
                kind=r["kind"],
                account=r["account"],
                name=r["name"],
                role=least(r["own"], r["role"]),
                created_at=utc(r["created_at"]),
                expires_at=utc(r["expires_at"]),
                used_at=utc(r["used_at"]),
            )
            for r in rows
        ]
        return sorted(found, key=lambda v: v.used_at or v.created_at, reverse=True)

    def withdraw(self, id: str, *, by: str) -> None:
        """Take back a token or end a session by the name it has in lists. Raises NotFound."""
        with self._db.write() as t:
            fits = (func.substr(credential.c.token_hash, 1, ID_DIGITS) == id, credential.c.kind != "link")
            row = t.execute(select(credential).where(*fits)).mappings().first()
            if row is None:
                raise NotFound("there is no such session or token; it may have ended")
            t.execute(delete(credential).where(credential.c.token_hash == row["token_hash"]))
            action = "token taken back" if row["kind"] == "api" else "session ended"
            note(t, action, id, by=by, account=row["account"], name=row["name"])

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
            note(t, "signed in", name, by=name, how="one-time link")
            return True

    def end(self, token_hash: str) -> None:
        """Take a session, link or token back; it is worth nothing from now on."""
        with self._db.write() as t:
            t.execute(delete(credential).where(credential.c.token_hash == token_hash))


def _keep_an_admin(t: Transaction) -> None:
    if t.scalar(select(func.count()).select_from(account).where(account.c.role == "admin")) == 0:
        raise Conflict("this is the last admin: make somebody else one first")
