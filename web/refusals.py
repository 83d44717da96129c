"""Why a client refused a round, or was refused in one, in words for the pages.

They come as "privacy_refusal:REASON: DETAIL", with the reasons of `protocol.refusals`.
"""

from __future__ import annotations

from ..protocol.refusals import REASONS
from .language import _
from .reasons import told

CODE = "privacy_refusal:"


def in_words(reason: str, *, brief: bool = False) -> str:
    """A client's reason as it is shown; one that is no refusal stays as it is.

    brief: without the detail, which holds the numbers and names of the round.
    """
    if not reason.startswith(CODE):
        return told(reason)
    name, detail = [*reason.removeprefix(CODE).split(": ", 1), ""][:2]
    words = REASONS.get(name)
    if words is None:  # of a newer agent
        return _("refused: {why}", why=detail or name)
    return _("refused: {why}", why=_(words)) + (f" ({told(detail)})" if detail and not brief else "")
