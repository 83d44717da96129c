"""What is shown of people: their accounts, and what they hold: sessions and API tokens, never the secrets."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from .roles import Role
from .views import View


class UserView(View):
    """An account. password: whether it has one; without, it is entered by one-time links and API tokens."""

    name: str
    role: Role
    password: bool
    created_at: datetime


class CredentialView(View):
    """A session or an API token. `id` names it, and is of no use to sign in; `token` is shown once, when it is made.

    role: what it acts as, which is never more than the account may. used_at: to within a minute.
    """

    id: str
    kind: Literal["session", "api"]
    account: str
    name: str = ""
    role: Role
    created_at: datetime
    expires_at: datetime
    used_at: datetime | None = None
    token: str = ""
