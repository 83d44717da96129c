"""Who may do what: one table, from which the pages, the API and the buttons that are shown follow."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Literal

from .errors import NotAllowed

Role = Literal["viewer", "researcher", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "researcher", "admin")  # each may do what the ones before it may


class Right(StrEnum):
    READ = "see the pages"
    CREDENTIAL = "make API tokens of one's own; take back a token or end a session"
    START = "upload a model and start a run"
    STEER = "pause, resume or stop a run"
    ADMINISTER = "admit clients, move aliases and change users"


# What a role may act on: "all", or "own": what its account has made. A right that is not there, it has not.
RIGHTS: dict[Role, dict[Right, Literal["all", "own"]]] = {
    "viewer": {Right.READ: "all", Right.CREDENTIAL: "own"},
    "researcher": {Right.READ: "all", Right.CREDENTIAL: "own", Right.START: "all", Right.STEER: "own"},
    "admin": dict.fromkeys(Right, "all"),
}


def may(name: str, role: Role, right: Right, owner: str | None = None) -> bool:
    """Whether an account has a right; owner: whose the thing is that it would act on, None where there is none yet."""
    scope = RIGHTS[role].get(right)
    return scope == "all" or (scope == "own" and owner in (None, name))


def require(name: str, role: Role, right: Right, owner: Callable[[], str | None]) -> None:
    """Raise NotAllowed unless the account has the right; `owner` is asked only where it matters."""
    scope = RIGHTS[role].get(right)
    if scope is None:
        raise NotAllowed(f"{name} is a {role} and may not {right}")
    if scope == "own" and (whose := owner()) not in (None, name):
        raise NotAllowed(f"{name} is a {role}: this is {whose or 'nobody'}'s, and only an admin may change it")


def least(one: Role, other: Role | None) -> Role:
    """The role that may less; an API token's is never more than its account's."""
    return one if other is None or ROLES.index(one) <= ROLES.index(other) else other
