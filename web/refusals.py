"""Why a client refused a round, or was refused in one, in words for the pages.

They come as "privacy_refusal:REASON: DETAIL", with the reasons of `protocol.refusals`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..protocol.refusals import REASONS
from .language import _
from .reasons import told

CODE = "privacy_refusal:"
SHOWN = 3  # names that one reason is told of, in a line; more are counted
ERROR = re.compile(r"^[a-z_]+_error: ")


def in_words(reason: str, *, brief: bool = False) -> str:
    """A client's reason as it is shown, without the code that it begins with; one that is no refusal keeps its words.

    brief: without the detail, which holds the numbers and names of the round.
    """
    if not reason.startswith(CODE):
        return told(ERROR.sub("", reason))
    name, detail = [*reason.removeprefix(CODE).split(": ", 1), ""][:2]
    words = REASONS.get(name)
    if words is None:  # of a newer agent
        return _("refused: {why}", why=detail or name)
    return _("refused: {why}", why=_(words)) + (f" ({told(detail)})" if detail and not brief else "")


def absent(clients: Iterable[tuple[str, str]]) -> list[str]:
    """Who is missing and why, those of one reason together: "va, st-mary: not heard for 60 s"."""
    by_reason: dict[str, list[str]] = {}
    for client, reason in clients:
        by_reason.setdefault(in_words(reason, brief=True), []).append(client)
    found: list[str] = []
    for reason, clients_of in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        listed = names(clients_of)
        found.append(_("{names}: {reason}", names=listed, reason=reason) if reason else listed)
    return found


def names(clients: Sequence[str]) -> str:
    """Some of these names, and how many more."""
    listed, more = ", ".join(clients[:SHOWN]), len(clients) - SHOWN
    return _("{names} and {n:,} more", names=listed, n=more) if more > 0 else listed
