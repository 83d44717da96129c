"""The words of the audit log, which is in English, where it is read in another language."""

from __future__ import annotations

from .language import _

# The audit log's actions, and the names of what else its entries say.
AUDITED = (
    "user added",
    "user changed",
    "user removed",
    "password changed",
    "token made",
    "token taken back",
    "signed in",
    "sign-in failed",
    "session ended",
    "client invited",
    "client enrolled",
    "client approved",
    "client rejected",
    "client revoked",
    "run started",
    "run paused",
    "run resumed",
    "run stopped",
    "run finished",
    "run failed",
    "alias promoted",
    "alias rolled back",
    "alias removed",
)
AUDIT_DETAILS = (
    "account",
    "accounts",
    "fingerprint",
    "how",
    "model",
    "name",
    "one-time link",
    "reason",
    "recipe",
    "role",
    "tries",
    "until",
)


def audited(said: str) -> str:
    """What an audit log is searched for, where somebody names one of its actions in their own language."""
    return next((action for action in AUDITED if _(action) == said), said)
