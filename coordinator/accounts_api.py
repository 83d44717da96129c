"""Users, sessions and API tokens, the audit log and privacy budgets, under `/v1/admin`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ..protocol.accounts import CredentialView, UserView
from ..protocol.audit import AuditView, LogReport
from ..protocol.budgets import RunBudget
from ..protocol.roles import Right, Role, may
from ..protocol.sections import Name
from .http import Admin, Holder, WithParts, person
from .store.accounts import Person

router = APIRouter(prefix="/v1/admin", dependencies=[Depends(person)])
Count = Annotated[int, Query(ge=0, lt=1 << 63)]
Part = Annotated[str, Query(max_length=64)]
Label = Annotated[str, Field(max_length=64)]


class NewUser(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Name
    role: Role


class Welcome(BaseModel):
    """`link`: what follows /login?link= to sign in once, within three days."""

    name: str
    role: Role
    link: str


class NewRole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Role


class NewToken(BaseModel):
    """role: what it may, never more than who makes it."""

    model_config = ConfigDict(extra="forbid")
    name: Label
    days: float = Field(default=90, ge=0.01, le=3650)
    role: Role = "viewer"


@router.get("/users")
def users(p: WithParts) -> list[UserView]:
    return p.service.users()


@router.post("/users", status_code=201)
def add_user(wanted: NewUser, who: Admin, p: WithParts) -> Welcome:
    """Add an account; it signs in by the link that is answered, once, and may then set a password."""
    return Welcome(name=wanted.name, role=wanted.role, link=p.service.add_user(wanted.name, wanted.role, who.name))


@router.put("/users/{user}/role")
def set_role(user: str, wanted: NewRole, who: Admin, p: WithParts) -> NewRole:
    p.service.set_role(user, wanted.role, who.name)
    return wanted


@router.delete("/users/{user}", status_code=204)
def remove_user(user: str, who: Admin, p: WithParts) -> None:
    """Remove an account with its sessions and tokens; what it did stays in the audit log."""
    p.service.remove_user(user, who.name)


@router.get("/credentials")
def credentials(p: WithParts, who: Annotated[Person, Depends(person)]) -> list[CredentialView]:
    """Sessions and API tokens that hold: one's own, and to an admin everybody's."""
    return p.service.credentials(None if may(who.name, who.role, Right.ADMINISTER) else who.name)


@router.post("/tokens", status_code=201)
def make_token(wanted: NewToken, who: Holder, p: WithParts) -> CredentialView:
    """Make an API token of one's own; `token` is answered this once."""
    return p.service.make_token(who.name, who.role, label=wanted.name, days=wanted.days, role=wanted.role)


@router.delete("/credentials/{credential}", status_code=204)
def withdraw(credential: str, who: Holder, p: WithParts) -> None:
    """Take a token back or end a session: one's own, or as an admin anybody's."""
    p.service.withdraw(credential, who.name)


@router.get("/audit")
def audit(p: WithParts, by: Part = "", what: Part = "", skip: Count = 0, limit: Count = 50) -> list[AuditView]:
    """Who did what, the newest first. what: part of an action or of what it was done to."""
    return p.service.audit(by=by, what=what, skip=skip, limit=min(limit, 1000))[0]


@router.get("/audit/log")
def audit_log(p: WithParts, by: Part = "", what: Part = "", after: Count = 0) -> StreamingResponse:
    """The whole log as JSON Lines, the oldest entry first, as `murmur audit verify-log` takes it."""
    lines = (entry.model_dump_json() + "\n" for entry in p.service.audit_entries(by=by, what=what, after=after))
    return StreamingResponse(lines, media_type="application/x-ndjson")


@router.get("/audit/check")
def check_audit(p: WithParts) -> LogReport:
    """Whether every entry is unchanged and follows from the one before."""
    return p.service.check_audit()


@router.get("/privacy")
def budgets(p: WithParts) -> list[RunBudget]:
    """What each run has spent of its clients' privacy, and what it will come to."""
    return p.service.budgets()
