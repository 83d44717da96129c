"""What is shown of the coordinator's state: the same objects for the JSON API, the pages, the CLI and notebooks."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .recipe import Recipe

LATE = "the round had enough updates before this one came"
OVER = ("finished", "failed", "stopped")  # states of a run that has ended; a paused one has not


class View(BaseModel):
    model_config = ConfigDict(frozen=True)


class Track(View):
    """What a client's parts in rounds came to. done: arrived; lost: failed or dropped, but not for being late.

    upload_bytes_s: the median of its newest uploads that took two seconds or more; None where there is none.
    """

    done: int = 0
    lost: int = 0
    upload_bytes_s: float | None = None


class ClientView(View):
    id: str
    state: Literal["pending", "active", "revoked"]
    fingerprint: str
    online: bool
    seen_at: datetime | None
    created_at: datetime
    info: dict[str, Any] = {}
    track: Track | None = None


class InvitationView(View):
    """`join` is shown once, when the invitation is made; afterwards it is empty."""

    name: str
    expires_at: datetime
    used: bool
    join: str = ""


class MetricPoint(View):
    """A metric of one version over all clients that reported: the weighted mean, and the examples behind it."""

    version: int
    name: str
    value: float
    count: float


class Phase(View):
    """What a client did from then on: waiting, downloading, training or uploading; "sent" once its update is here."""

    name: str
    at: datetime


class AssignmentView(View):
    """One client in one attempt. `phase` is what it says it is doing; `reason` why it failed, in words.

    group: which of the run's groups it is summed in, from 1; 0 where there are none. phases, heard_at: what it did
    when, and its last sign of life; of a run's newest attempt only.
    """

    client: str
    state: Literal["offered", "working", "uploaded", "counted", "failed", "dropped"]
    phase: str = ""
    step: int = 0
    steps: int = 0
    bytes: int = 0
    reason: str = ""
    started_at: datetime | None = None
    updated_at: datetime | None = None
    group: int = 0
    phases: tuple[Phase, ...] = ()
    heard_at: datetime | None = None
    lost_at: datetime | None = None

    @property
    def lost(self) -> bool:
        return self.state in ("failed", "dropped")

    @property
    def late(self) -> bool:
        """Whether it did its part and came too late, which is no failure."""
        return self.state == "dropped" and self.reason == LATE


class GroupView(View):
    """A group of a round's clients: how many it has, how many are left, and why it was dropped if it was."""

    n: int
    clients: int
    left: int
    reason: str = ""


class WorldRound(View):
    """What a simulated round took on its world's clock, failed attempts with it.

    begins_s, ends_s: since the run began there; bytes are those of models and updates. partial: updates in it after a
    part of the work; staleness: of its updates, in versions, on average.
    """

    begins_s: float
    ends_s: float
    attempts: int = 1
    partial: int = 0
    staleness: float = 0.0
    down_bytes: int
    up_bytes: int

    @property
    def seconds(self) -> float:
        return self.ends_s - self.begins_s


class RoundView(View):
    """The latest attempt of a round. `state` is a value of coordinator.rounds.State.

    world: of a round that was simulated in one, whose clients' times are then the world's, from `opened_at` on.
    """

    n: int
    kind: Literal["train", "evaluate"]
    attempt: int
    state: str
    reason: str = ""
    opened_at: datetime
    closed_at: datetime | None
    version: int | None = None
    threshold: int = 0
    assignments: tuple[AssignmentView, ...] = ()
    world: WorldRound | None = None

    @property
    def groups(self) -> tuple[GroupView, ...]:
        """The groups that are summed apart; none where the cohort is one sum."""
        found: list[GroupView] = []
        for n in sorted({a.group for a in self.assignments} - {0}):
            mine = [a for a in self.assignments if a.group == n]
            whole = f"its group {n} was "  # so begins the reason of who was dropped for it alone
            why = next((a.reason.removeprefix(whole) for a in mine if a.reason.startswith(whole)), "")
            found.append(GroupView(n=n, clients=len(mine), left=sum(not a.lost for a in mine), reason=why))
        return tuple(found)


class PrivacyView(View):
    """What a run has spent of its clients' privacy. An epsilon means nothing without the rest of what stands here.

    unit: whose contribution it bounds; accountant: "rdp" while the run goes on, "pld" (tighter) once it has ended;
    meaning: what that says, for people; spent: sums that were taken, failed ones too.
    """

    value: float | None
    delta: float
    unit: Literal["client", "example"]
    accountant: Literal["rdp", "pld"]
    assumptions: tuple[str, ...] = ()
    budget: float = 0.0
    spent: int = 0
    meaning: str = ""

    @property
    def text(self) -> str:
        """The epsilon with unit, delta and accountant, in one line."""
        value = "infinite" if self.value is None else f"{self.value:.3g}"
        bound = f", budget {self.budget:g}" if self.budget else ""
        return f"epsilon {value} at delta {self.delta:g}, {self.unit}-level, by {self.accountant.upper()}{bound}"


class SimulationView(View):
    """Who takes part in a simulated run, and how: virtual clients, by a backend, masked ("real", "ideal") or "off"."""

    clients: int
    backend: str
    secure: str


class RunView(View):
    """A run in one row of a list. `round` counts the rounds that are done, `version` is the newest model.

    paused_by: who paused it, None while it is not paused; empty: the coordinator, which lets it go on when it can.
    """

    id: str
    name: str
    state: Literal["running", "paused", "finished", "failed", "stopped"]
    reason: str = ""
    paused_by: str | None = None
    recipe: Recipe
    round: int
    rounds: int
    version: int
    created_at: datetime
    finished_at: datetime | None
    created_by: str = ""
    latest: dict[str, float] = {}
    privacy: PrivacyView | None = None
    simulation: SimulationView | None = None

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def word(self) -> str:
        """The state as it is shown: a simulation that nobody carries out just now is paused, and "interrupted"."""
        return "interrupted" if self.simulation and self.state == "paused" else self.state


class RunEstimate(View):
    """What a run will come to, before it starts. Bytes are of one client in one round, without HTTP's own.

    needed: clients without which no round begins; asked: in a round, 0 for all that are online; online: that could be
    asked just now. privacy: after all rounds, where the run protects whole clients.
    """

    rounds: int
    download_bytes: int
    upload_bytes: int
    needed: int
    asked: int
    online: int
    privacy: PrivacyView | None = None

    @property
    def bytes_of_client(self) -> int:
        """What a client that is in every round moves: each round's model and update, and the last model to measure."""
        return self.rounds * (self.download_bytes + self.upload_bytes) + self.download_bytes


class SiteReport(View):
    """What a client of a plain round said of itself: its weight, and the means of what it measured of a version."""

    client: str
    version: int
    weight: float
    metrics: dict[str, float] = {}


class RunDetail(View):
    """A run with its rounds. reports: of the newest committed round's clients; empty in masked runs."""

    run: RunView
    current: RoundView | None
    rounds: tuple[RoundView, ...] = ()
    metrics: tuple[MetricPoint, ...] = ()
    reports: tuple[SiteReport, ...] = ()


class Missing(View):
    """A client that was asked for a version's round and is not in it."""

    client: str
    reason: str = ""


class VersionView(View):
    """A model after a round. Version 0 is what the run started from: it has no parent and no contributors.

    who, missing: the clients in it and those that were asked and are not, by name. Both are empty in a list of
    all runs' versions, which is long enough without them. aliases: the names that point at it now.
    """

    run: str
    run_name: str
    n: int
    sha256: str
    bytes: int
    parent: str | None
    contributors: int
    who: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()
    created_at: datetime
    metrics: dict[str, float] = {}
    aliases: tuple[str, ...] = ()


class ManifestView(View):
    """The manifest of a committed round; `sha256` is that of its text, which the next one names."""

    round: int
    attempt: int
    sha256: str
    at: datetime


class EventView(View):
    """One row of the event log, which everything live reads."""

    id: int
    at: datetime
    run: str | None
    kind: str
    data: dict[str, Any] = {}
