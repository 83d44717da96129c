"""How long a client's silence, and its standing still, are borne."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .rounds import State
from .store.attempts import Attempt, Part

UNKNOWN, SLACK, MOST = 5.0, 3.0, 20.0  # times the patience, the longest gap, the patience: see `pace_s`


def why_lost(attempt: Attempt, part: Part, now: float, gaps_s: Callable[[str], Sequence[float]]) -> str:
    """Why a client is not waited for any longer; empty while it is.

    One that is not heard of is gone. One that is heard and gets no further is given the time that it took between
    two steps before (gaps_s, by its name), and some more: a compiler or a large batch can take minutes.
    """
    patience_s = attempt.recipe.cohort.patience_s
    if now - max(part.heard_at, attempt.state_at) > patience_s:
        return f"not heard for {patience_s:g} s while {attempt.state}"
    owes_an_answer = attempt.state != State.COLLECTING and part.phase != "downloading"
    moved_at = attempt.state_at if owes_an_answer else max(part.progress_at, attempt.state_at)
    if now - moved_at <= patience_s:
        return ""
    allowed_s = pace_s(patience_s, gaps_s(part.client))
    return f"no progress for {allowed_s:g} s while {attempt.state}" if now - moved_at > allowed_s else ""


def pace_s(patience_s: float, gaps_s: Sequence[float]) -> float:
    """How long a client that is heard may go without progress, by its longest gaps in its last assignments."""
    if not gaps_s:
        return UNKNOWN * patience_s
    return min(MOST * patience_s, max(patience_s, SLACK * max(gaps_s)))
