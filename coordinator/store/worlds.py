"""A simulated round in its world as views: what it took there, and what each of its clients did when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from ...protocol.views import LATE, AssignmentView, Phase, WorldRound

Fate = Literal["heard", "late", "partial", "stale", "left", "hours", "crashed"]
REASONS: dict[str, str] = {
    "heard": "",
    "late": LATE,
    "partial": "it got through a part of its work, which does not count",
    "stale": "its update began from too old a version",
    "left": "it left in the midst of its work",
    "hours": "its hours ended in the midst of its work",
    "crashed": "it crashed in the midst of its work",
}
PHASES = ("downloading", "training", "uploading", "sent")


def lived(kept: Mapping[str, Any]) -> WorldRound:
    """What a round took in its world."""
    return WorldRound(**{name: value for name, value in kept.items() if name != "clients"})


def parts(kept: Mapping[str, Any], opened_at: datetime) -> tuple[AssignmentView, ...]:
    """What each client did that was asked, its times as if the round had begun in the world at `opened_at`."""
    begins_s = kept["begins_s"]
    return tuple(
        _part(client, told, [opened_at + timedelta(seconds=s - begins_s) for s in told[2:]])
        for client, told in sorted(kept["clients"].items())
    )


def _part(client: str, told: Sequence[Any], times: Sequence[datetime]) -> AssignmentView:
    """times: when each phase that it came to began and when it ended; empty where they were not kept."""
    heard, late = told[0] == "heard", told[0] == "late"
    begun = zip(PHASES, times if heard else times[:-1], strict=False)
    ended = times[-1] if times else None
    return AssignmentView(
        client=client,
        state="counted" if heard else "dropped",
        reason=REASONS.get(told[0]) or "",
        bytes=told[1],
        started_at=times[0] if times else None,
        phases=tuple(Phase(name=name, at=at) for name, at in begun),
        heard_at=ended,
        lost_at=None if heard or late else ended,
    )
