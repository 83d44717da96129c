"""The part of the service that is about people, their keys, and what is kept of what they did."""

from __future__ import annotations

from collections.abc import Iterator

from ..protocol.accounts import CredentialView, UserView
from ..protocol.audit import AuditView, LogReport, verify_log
from ..protocol.budgets import RunBudget
from ..protocol.errors import NotFound
from ..protocol.roles import Role, least
from . import budgets
from .people import WELCOME_S, People
from .store import Store


class Administration:
    """`by` is the account's name, for the audit log. Who may call what is `web.rights`' business."""

    _store: Store
    _people: People

    def users(self) -> list[UserView]:
        return self._people.all()

    def add_user(self, name: str, role: Role, by: str) -> str:
        """Add an account without a password; returns the token of a link that signs it in once, within three days."""
        self._people.add(name, role, None, by=by, new=True)
        return self._people.link(name, lifetime_s=WELCOME_S)

    def set_role(self, name: str, role: Role, by: str) -> None:
        self._store.accounts.set_role(name, role, by=by)

    def remove_user(self, name: str, by: str) -> None:
        self._people.remove(name, by=by)

    def set_password(self, name: str, password: str, before: str) -> None:
        self._people.set_password(name, password, before=before)

    def credentials(self, account: str | None = None) -> list[CredentialView]:
        return self._people.credentials(account)

    def holder_of(self, credential: str) -> str:
        found = next((c.account for c in self.credentials() if c.id == credential), None)
        if found is None:
            raise NotFound("there is no such session or token; it may have ended")
        return found

    def make_token(self, account: str, acting: Role, *, label: str, days: float, role: Role) -> CredentialView:
        """An API token of an account for itself; it may no more than what it is made with, `acting`."""
        lifetime_s = days * 86_400
        return self._people.api_token(account, lifetime_s=lifetime_s, label=label, role=least(acting, role), by=account)

    def withdraw(self, credential: str, by: str) -> None:
        self._people.withdraw(credential, by=by)

    def audit(self, *, by: str = "", what: str = "", skip: int = 0, limit: int = 50) -> tuple[list[AuditView], int]:
        return self._store.audit.newest(by=by, what=what, skip=skip, limit=limit)

    def audit_entries(self, *, by: str = "", what: str = "", after: int = 0) -> Iterator[AuditView]:
        return self._store.audit.entries(by=by, what=what, after=after)

    def check_audit(self) -> LogReport:
        return verify_log(self._store.audit.entries())

    def budgets(self) -> list[RunBudget]:
        return budgets.budgets(self._store)
