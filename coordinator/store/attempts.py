"""An attempt at a round as its rows tell it, and what came out of it: what the rest of the coordinator reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import RowMapping

from ...protocol.messages import AnswerKind
from ...protocol.recipe import Recipe
from ..rounds import State

HELD = ("offered", "working", "uploaded")  # assignments that may still come to something


class Key(NamedTuple):
    """One attempt."""

    run: str
    round: int
    attempt: int

    def assignment(self, client: str) -> str:
        return f"{self.run}.{self.round}.{self.attempt}.{client}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One client's part in an attempt, with what it has delivered."""

    id: str
    client: str
    state: str
    phase: str
    fence: int
    progress_at: float
    answers: Mapping[str, str]
    update: str | None
    weight: float | None
    metrics: Mapping[str, Any] | None

    @property
    def lost(self) -> bool:
        """Nothing more will come from this client in this attempt."""
        return self.state not in HELD or self.phase == "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An attempt as its rows tell it."""

    key: Key
    kind: str
    state: State
    threshold: int
    state_at: float
    recipe: Recipe
    base: str
    base_bytes: int
    optimizer: str | None
    parts: tuple[Part, ...]

    @property
    def cohort(self) -> tuple[str, ...]:
        return tuple(p.client for p in self.parts)

    def answers(self, kind: AnswerKind) -> dict[str, str]:
        return {p.client: p.answers[kind] for p in self.parts if kind in p.answers}

    @property
    def uploaded(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if p.update)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came out of an attempt: a version (absent after an evaluation) and metrics by version."""

    sha256: str | None
    bytes: int
    optimizer: str | None
    metrics: Mapping[int, Mapping[str, tuple[float, float]]]
    facts: Mapping[str, Any]


def part_of_row(row: RowMapping, answers: Mapping[str, str]) -> Part:
    return Part(
        id=row["id"],
        client=row["client"],
        state=row["state"],
        phase=row["phase"],
        fence=row["fence"],
        progress_at=row["progress_at"],
        answers=answers,
        update=row["sha256"],
        weight=row["weight"],
        metrics=row["metrics"],
    )
