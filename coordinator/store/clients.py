"""Clients: invitations, enrolment, approval, tokens, nonces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from ...protocol.encoding import fingerprint
from ...protocol.errors import Conflict, NotAllowed, NotAuthenticated, NotFound, Replayed
from ...protocol.views import ClientView, InvitationView
from .audit import note
from .database import Database
from .fresh import Fresh
from .tables import assignment, bearer, client, invitation, nonce
from .times import ONLINE_S, utc

FORGET_S = 10.0  # between two times that old nonces are deleted
_USED = insert(nonce)


class Known(NamedTuple):
    """Who signs, and whether an admin lets it."""

    public_key: bytes
    state: str


class Clients:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._known = Fresh[Known | None](db)
        self._tokens = Fresh[tuple[str, float] | None](db)
        self._forget_at = 0.0

    def invite(self, name: str, token_hash: str, *, by: str, lifetime_s: float) -> InvitationView:
        """Let one agent enrol as `name`, anew if it was revoked; raises Conflict where a client of it is enrolled."""
        with self._db.write() as t:
            if t.scalar(select(client.c.id).where(client.c.id == name, client.c.state != "revoked")):
                raise Conflict(f"a client named {name!r} is enrolled already")
            expires_at = t.now + lifetime_s
            row = {"token_hash": token_hash, "name": name, "created_by": by, "created_at": t.now}
            t.execute(insert(invitation).values(**row, expires_at=expires_at))
            t.append("audit", action="invited", client=name, by=by)
            note(t, "client invited", name, by=by)
        return InvitationView(name=name, expires_at=utc(expires_at), used=False)

    def invitations(self) -> list[InvitationView]:
        with self._db.read() as c:
            rows = c.execute(select(invitation).order_by(invitation.c.created_at.desc())).mappings().all()
        return [InvitationView(name=r["name"], expires_at=utc(r["expires_at"]), used=bool(r["used_at"])) for r in rows]

    def enrol(self, name: str, token_hash: str, public_key: bytes, info: dict[str, Any]) -> None:
        """Use up an invitation and add the client, pending, or give a revoked one its new key. It may be repeated.

        Raises NotAuthenticated for a token that is unknown, used, expired or made for another name, and Conflict for a
        name or key that is taken, or a key that was revoked.
        """
        with self._db.write() as t:
            known = t.execute(select(client).where(client.c.id == name)).mappings().first()
            if known and known["public_key"] == public_key:
                if known["state"] == "revoked":
                    raise Conflict(f"this key of {name!r} was revoked: enrol with a new one (--new-key)")
                return
            fits = (
                invitation.c.token_hash == token_hash,
                invitation.c.name == name,
                invitation.c.used_at.is_(None),
                invitation.c.expires_at > t.now,
            )
            if not t.execute(update(invitation).where(*fits).values(used_at=t.now)).rowcount:
                raise NotAuthenticated("the invitation is unknown, used, expired or for another name")
            row = {"id": name, "public_key": public_key, "state": "pending", "info": info, "created_at": t.now}
            row |= {"seen_at": t.now, "expected_at": t.now + ONLINE_S, "decided_by": None}
            try:
                if known and known["state"] == "revoked":
                    t.execute(update(client).where(client.c.id == name).values(row))
                else:
                    t.execute(insert(client).values(row))
            except IntegrityError:
                raise Conflict(f"a client named {name!r}, or with this key, is enrolled already") from None
            t.append("client", client=name, state="pending", fingerprint=fingerprint(public_key))
            note(t, "client enrolled", name, by=name, fingerprint=fingerprint(public_key))
        self._known.clear()

    def decide(self, name: str, state: Literal["active", "revoked"], *, by: str) -> None:
        """Approve or revoke a client. A revoked one loses its tokens at once and cannot be approved again."""
        before = ("pending",) if state == "active" else ("pending", "active")
        with self._db.write() as t:
            row = t.execute(select(client.c.state, client.c.public_key).where(client.c.id == name)).first()
            if row is None:
                raise NotFound(f"no client named {name!r}")
            if (now := row.state) == state:
                return
            if now not in before:
                raise Conflict(f"{name!r} is {now} and cannot become {state}; a revoked organization enrols anew")
            t.execute(update(client).where(client.c.id == name).values(state=state, decided_by=by))
            if state == "revoked":
                t.execute(delete(bearer).where(bearer.c.client == name))
            t.append("client", client=name, state=state, by=by)
            done = "approved" if state == "active" else "rejected" if now == "pending" else "revoked"
            note(t, f"client {done}", name, by=by, fingerprint=fingerprint(row.public_key))
        self._known.clear()
        self._tokens.clear()

    def known(self, name: str) -> Known | None:
        """A client's key and state, as they were a moment ago."""

        def read() -> Known | None:
            with self._db.read() as c:
                row = c.execute(select(client.c.public_key, client.c.state).where(client.c.id == name)).first()
            return Known(*row) if row else None

        return self._known.get(name, read)

    def public_key(self, name: str) -> bytes | None:
        """The identity of a client that is not revoked, for checking a signature."""
        found = self.known(name)
        return found.public_key if found and found.state != "revoked" else None

    def state(self, name: str) -> str | None:
        found = self.known(name)
        return found.state if found else None

    def all_know(self, names: Sequence[str], what: str) -> bool:
        """Whether the agents of all of these clients can do something that those of release 0.1.0 could not."""
        with self._db.read() as c:
            found = c.scalars(select(client.c.info).where(client.c.id.in_(names))).all()
        return len(found) == len(names) and all(what in info.get("knows", ()) for info in found)

    def identities(self, names: tuple[str, ...]) -> dict[str, bytes]:
        with self._db.read() as c:
            rows = c.execute(select(client.c.id, client.c.public_key).where(client.c.id.in_(names))).all()
        return {name: key for name, key in rows}

    def use_nonce(self, name: str, value: str, *, lifetime_s: float) -> None:
        """Raises Replayed when this client's nonce was used before.

        It is not waited for: should the machine lose power with it, what the signed request did is lost too, or was
        acknowledged, and then the same request is answered as before.
        """
        with self._db.write(durable=False) as t:
            if t.now > self._forget_at:
                self._forget_at = t.now + FORGET_S
                t.execute(delete(nonce).where(nonce.c.expires_at < t.now))
            try:
                t.execute(_USED, {"client": name, "nonce": value, "expires_at": t.now + lifetime_s})
            except IntegrityError:
                raise Replayed() from None

    def issue_token(self, name: str, token_hash: str, *, lifetime_s: float) -> None:
        with self._db.write() as t:
            if t.scalar(select(client.c.state).where(client.c.id == name)) != "active":
                raise NotAllowed(f"{name!r} is not active")
            t.execute(delete(bearer).where(bearer.c.expires_at < t.now))
            t.execute(insert(bearer).values(token_hash=token_hash, client=name, expires_at=t.now + lifetime_s))

    def of_token(self, token_hash: str) -> str | None:
        """The active client that holds this token, if it has not expired; as it was a moment ago."""

        def read() -> tuple[str, float] | None:
            query = select(client.c.id, bearer.c.expires_at).join(bearer, bearer.c.client == client.c.id)
            with self._db.read() as c:
                fits = (bearer.c.token_hash == token_hash, client.c.state == "active")
                row = c.execute(query.where(*fits)).first()
            return (row[0], row[1]) if row else None

        return self._holder(self._tokens.get(token_hash, read))

    def remembered(self, token_hash: str) -> str | None:
        """As `of_token`, from memory alone: for callers that must not wait for the database."""
        return self._holder(self._tokens.peek(token_hash))

    def _holder(self, found: tuple[str, float] | None) -> str | None:
        return found[0] if found and found[1] > self._db.clock() else None

    def eligible(self) -> list[str]:
        """Active clients that are there, sorted; one that let a round wait is out until it is heard of again."""
        lost = select(assignment.c.id).where(
            assignment.c.client == client.c.id, assignment.c.lost_at > client.c.seen_at
        )
        fits = (client.c.state == "active", client.c.expected_at > self._db.clock(), ~exists(lost))
        with self._db.read() as c:
            return list(c.scalars(select(client.c.id).where(*fits).order_by(client.c.id)))

    def all(self) -> list[ClientView]:
        with self._db.read() as c:
            rows = c.execute(select(client).order_by(client.c.id)).mappings().all()
        now = self._db.clock()
        return [
            ClientView(
                id=r["id"],
                state=r["state"],
                fingerprint=fingerprint(r["public_key"]),
                online=r["state"] == "active" and (r["expected_at"] or 0) > now,
                seen_at=utc(r["seen_at"]),
                created_at=utc(r["created_at"]),
                info=r["info"],
            )
            for r in rows
        ]
