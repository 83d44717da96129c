"""What the pages ask about people, their keys, the audit log and privacy budgets: the other half of the console."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..protocol.accounts import CredentialView, UserView
from ..protocol.audit import AuditView, LogReport
from ..protocol.budgets import RunBudget
from ..protocol.roles import Role


class Administration(Protocol):
    """Part of `Console`, with its promises."""

    def users(self) -> list[UserView]:
        """Every account, by name."""
        ...

    def add_user(self, name: str, role: Role, by: str) -> str:
        """A new account; the token of a link that signs it in once. Raises Conflict for a name that is taken."""
        ...

    def set_role(self, name: str, role: Role, by: str) -> None:
        """Change what an account may. Raises NotFound, and Conflict where no admin would be left."""
        ...

    def remove_user(self, name: str, by: str) -> None:
        """Remove an account and all that it holds. Raises as `set_role`."""
        ...

    def set_password(self, name: str, password: str, before: str) -> None:
        """Change one's own password. Raises NotAuthenticated for a wrong `before`, OperatorError for a short one."""
        ...

    def credentials(self, account: str | None = None) -> list[CredentialView]:
        """Sessions and API tokens that hold, of one account or of all, the last used first."""
        ...

    def holder_of(self, credential: str) -> str:
        """Whose session or token this is. Raises NotFound."""
        ...

    def make_token(self, account: str, acting: Role, *, label: str, days: float, role: Role) -> CredentialView:
        """A new API token of one's own; this answer alone carries `token`. It may no more than `acting`."""
        ...

    def withdraw(self, credential: str, by: str) -> None:
        """End a session or take a token back. Raises NotFound."""
        ...

    def audit(self, *, by: str = "", what: str = "", skip: int = 0, limit: int = 50) -> tuple[list[AuditView], int]:
        """Entries of the audit log, the newest first, and how many fit. what: part of an action or its subject."""
        ...

    def audit_entries(self, *, by: str = "", what: str = "", after: int = 0) -> Iterator[AuditView]:
        """All that fit, the oldest first."""
        ...

    def check_audit(self) -> LogReport:
        """Whether the log is whole: every entry unchanged, and following from the one before."""
        ...

    def budgets(self) -> list[RunBudget]:
        """What each run has spent of its clients' privacy, and will; the newest run first."""
        ...
