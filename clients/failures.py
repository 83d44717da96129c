"""What a coordinator is told of an error at a site: its code, and little of its text, for the text may quote data."""

from __future__ import annotations

from ..protocol.errors import MurmurError, PrivacyRefusal

LINES = 3
CHARACTERS = 600


def describe(error: Exception, *, share: bool) -> tuple[str, str]:
    """Code and detail of an error as `Failure` carries them.

    share: send the last lines of its text; False sends what kind of error it is and nothing more.
    """
    if isinstance(error, PrivacyRefusal):
        return f"{error.code}:{error.reason}", scrub(error.detail)  # names clients and numbers of the round, no data
    if isinstance(error, MurmurError):
        return error.code, scrub(error.detail) if share else error.title
    kind = type(error).__name__
    return "client_error", scrub(f"{kind}: {error}") if share else kind


def scrub(text: str) -> str:
    """The last lines of a text, short, without anything that a terminal or a page could take for an order."""
    lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
    kept = "\n".join([line for line in lines if line][-LINES:])
    return kept if len(kept) <= CHARACTERS else "…" + kept[1 - CHARACTERS :]
