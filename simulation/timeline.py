"""What happened in a world: how long each round took, how many bytes went, and who was heard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from ..coordinator.store.worlds import Fate
from .devices import Devices
from .schedules import Plan
from .stints import Stint
from .world import World

DRAWN = 2000  # stints that are kept for a picture, from the first round on
TIMED = 50  # clients of a round whose times a store keeps, those first that were not heard


@dataclass(frozen=True, kw_only=True, slots=True)
class Lived:
    """An attempt at a round. Times are seconds since the run began; bytes are those of models and updates.

    asked: clients whose stint ended in it, one way or another; heard: whose updates count; lost: who left or crashed;
    late: who was not waited for, or came too late; partial: of those heard, with a part of the work. staleness: of
    those heard, on average. reason: why the attempt failed, empty where it did not.
    """

    n: int
    attempt: int
    begins_s: float
    ends_s: float
    asked: int
    heard: int
    lost: int
    late: int
    partial: int
    staleness: float
    down_bytes: int
    up_bytes: int
    reason: str


@dataclass(kw_only=True)
class Timeline:
    """The attempts of a run in the order of time, and how often each client was asked and heard."""

    world: World
    devices: Devices
    attempts: list[Lived] = field(default_factory=list[Lived])
    asked: Counter[str] = field(default_factory=Counter[str])
    heard: Counter[str] = field(default_factory=Counter[str])
    stints: list[tuple[int, Stint, str]] = field(default_factory=list[tuple[int, Stint, str]])
    began_s: float = 0.0
    newest: Plan | None = None

    def add(self, plan: Plan, reason: str = "") -> None:
        """An attempt that is over; reason: why it failed, where the plan does not know."""
        reason = reason or plan.reason
        heard = set[Stint]() if reason else set(plan.heard)
        if not self.attempts:
            self.began_s = plan.begins_s
        self.newest = plan
        self.asked.update(stint.client for stint in plan.stints)
        self.heard.update(stint.client for stint in heard)
        moved = [stint.bytes_at(plan.ends_s) for stint in plan.stints]
        lost = sum(stint.lost and stint.lost_s <= plan.ends_s for stint in plan.stints)
        for stint in plan.stints[: max(0, DRAWN - len(self.stints))]:
            fate = "heard" if stint in heard else "lost" if stint.lost and stint.lost_s <= plan.ends_s else "late"
            self.stints.append((plan.n, stint, fate))
        self.attempts.append(
            Lived(
                n=plan.n,
                attempt=plan.attempt,
                begins_s=plan.begins_s - self.began_s,
                ends_s=plan.ends_s - self.began_s,
                asked=len(plan.stints),
                heard=len(heard),
                lost=lost,
                late=len(plan.stints) - len(heard) - lost,
                partial=sum(stint.partial for stint in heard),
                staleness=fmean(plan.staleness(stint.version) for stint in heard) if heard else 0.0,
                down_bytes=sum(down for down, _ in moved),
                up_bytes=sum(up for _, up in moved),
                reason=reason,
            )
        )

    def of_newest(self) -> dict[str, Any]:
        """The newest round as a store keeps it: what all of its attempts took, and what came of each client's part.

        That is its fate, the bytes that it sent, and when each of its phases began and the last ended.
        """
        plan = self.newest
        assert plan is not None, "a round is over"
        tried = [a for a in self.attempts[-plan.attempt :] if a.n == plan.n]
        clients: dict[str, list[Any]] = {}
        heard = set(plan.heard)
        for stint in sorted(plan.stints, key=heard.__contains__):
            ends_s = min(stint.ends_s, plan.ends_s)
            begun = (s for s in (stint.downloaded_s, stint.trained_s) if s <= ends_s)
            times = [round(s - self.began_s, 3) for s in (stint.begins_s, *begun, ends_s)]
            told = [self._fate(plan, stint, heard), stint.bytes_at(plan.ends_s)[1]]
            clients[stint.client] = told + (times if len(clients) < TIMED else [])
        return {
            "begins_s": tried[0].begins_s,
            "ends_s": tried[-1].ends_s,
            "attempts": plan.attempt,
            "partial": tried[-1].partial,
            "staleness": tried[-1].staleness,
            "down_bytes": sum(a.down_bytes for a in tried),
            "up_bytes": sum(a.up_bytes for a in tried),
            "clients": clients,
        }

    def _fate(self, plan: Plan, stint: Stint, heard: Set[Stint]) -> Fate:
        if stint in heard:
            return "heard"
        if stint.ends_s > plan.ends_s + 1e-6:
            return "late"
        if stint.lost:
            return stint.lost_by
        stale = self.world.buffered and self.world.buffered.most_stale and plan.staleness(stint.version)
        return "partial" if stint.partial else "stale" if stale else "late"

    @property
    def seconds(self) -> float:
        """How long the run took in the world."""
        return self.attempts[-1].ends_s if self.attempts else 0.0

    @property
    def bytes(self) -> tuple[int, int]:
        """To the clients, and from them."""
        return sum(a.down_bytes for a in self.attempts), sum(a.up_bytes for a in self.attempts)

    @property
    def versions_s(self) -> list[float]:
        """When each version was there, from version 0 on."""
        return [0.0, *(a.ends_s for a in self.attempts if not a.reason)]

    def fairness(self) -> dict[str, float]:
        """How evenly clients were heard.

        least, median, most: times that one was. never: clients that were not once. jain: Jain's index, 1 where all were
        heard alike, 1/n where one alone was. slowest_quarter: the share of the updates that came from the slowest
        quarter of the clients.
        Source: Jain, Chiu and Hawe 1984, "A Quantitative Measure of Fairness", DEC-TR-301.
        """
        counts = [self.heard[client] for client in self.devices]
        slowest = sorted(self.devices, key=lambda c: self.devices[c].examples_per_s)[: max(1, len(counts) // 4)]
        total = sum(counts)
        return {
            "least": min(counts),
            "median": median(counts),
            "most": max(counts),
            "never": counts.count(0),
            "jain": total**2 / (len(counts) * sum(c * c for c in counts)) if total else 0.0,
            "slowest_quarter": sum(self.heard[c] for c in slowest) / total if total else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the stints, in values that `json.dumps` takes."""
        down, up = self.bytes
        return {
            "settings": self.world.model_dump(mode="json"),
            "seconds": self.seconds,
            "down_bytes": down,
            "up_bytes": up,
            "attempts": [asdict(a) for a in self.attempts],
            "asked": dict(sorted(self.asked.items())),
            "heard": dict(sorted(self.heard.items())),
            "fairness": self.fairness(),
        }
