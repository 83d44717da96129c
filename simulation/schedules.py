"""Whose updates make which version, and when, on the world's clock: synchronous rounds and buffered asynchronous ones.

Times follow from devices, bytes and numbers of examples alone: no schedule needs to know what a client learns.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..aggregation.selection import select
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe
from .devices import HOUR_S, Devices
from .stints import Load, Stint, play
from .world import Buffered, World

_STINTS = 100  # that may end in a round, for each that it needs: in a world where hardly anybody gets through
Loads = Callable[[str], Load]  # what a round asks of a client


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """An attempt at a round. stints: all that ended in it, those of clients that nobody waited for among them.

    asked: the cohort, in the order of ids; heard: those of it whose updates make version n. reason: why none is made.
    """

    n: int
    attempt: int
    begins_s: float
    ends_s: float
    asked: tuple[str, ...]
    heard: tuple[Stint, ...]
    stints: tuple[Stint, ...]
    reason: str = ""

    @property
    def cohort(self) -> tuple[str, ...]:
        """The clients whose updates count, in the order of ids."""
        return tuple(sorted({stint.client for stint in self.heard}))

    @property
    def partial(self) -> dict[str, int]:
        """The units of work of those clients among them who did a part of it."""
        return {stint.client: stint.units for stint in self.heard if stint.partial}

    @property
    def by_version(self) -> dict[int, tuple[str, ...]]:
        """The same clients by the version that they trained from, the oldest one first."""
        versions = sorted({stint.version for stint in self.heard})
        return {v: tuple(sorted(t.client for t in self.heard if t.version == v)) for v in versions}

    def staleness(self, version: int) -> int:
        """Versions that were made since this one."""
        return self.n - 1 - version


class Schedule(Protocol):
    """Makes plans, one after the other; the clock stands where the last one ended."""

    @property
    def oldest(self) -> int | None:
        """The oldest version from which somebody still trains; None where nobody does."""
        ...

    def plan(self, n: int, attempt: int) -> Plan: ...


def schedule(world: World, recipe: Recipe, devices: Devices, loads: Loads) -> Schedule:
    """The schedule that a world asks for; raises OperatorError where the recipe does not fit it."""
    world.check(recipe)
    if world.buffered:
        return _Asynchronous(world, world.buffered, recipe, devices, loads)
    return _Synchronous(world, recipe, devices, loads)


class _Synchronous:
    """A round asks clients that are there, and closes when all have delivered or are given up, or enough have."""

    oldest = None

    def __init__(self, world: World, recipe: Recipe, devices: Devices, loads: Loads) -> None:
        self._world, self._recipe, self._devices, self._loads = world, recipe, devices, loads
        self._now_s = world.starts_h * HOUR_S

    def plan(self, n: int, attempt: int) -> Plan:
        recipe, cohort = self._recipe, self._recipe.cohort
        begins_s, there = self._gather(cohort.min)
        asked = select(there, recipe.asked, seed=recipe.seed, round=n, attempt=attempt)
        slow = self._stragglers(n, attempt, asked)
        stints = [self._stint(client, n, attempt, begins_s, slow.get(client)) for client in asked]
        counted = [t for t in stints if not t.lost and (self._keeps_partial or not t.partial)]
        ends_s = self._close(begins_s, stints, counted)
        heard = sorted((t for t in counted if t.uploaded_s <= ends_s + 1e-6), key=lambda t: (t.uploaded_s, t.client))
        if cohort.goal:
            heard = heard[: cohort.goal]
        reason = f"{len(heard)} of {len(asked)} clients delivered, {cohort.min} are needed"
        if len(heard) >= cohort.min:
            reason = ""
        self._now_s = ends_s
        return Plan(
            n=n,
            attempt=attempt,
            begins_s=begins_s,
            ends_s=ends_s,
            asked=asked,
            heard=tuple(heard),
            stints=tuple(stints),
            reason=reason,
        )

    def _gather(self, fewest: int) -> tuple[float, list[str]]:
        """The first moment from now on at which so many clients are there, and who they are."""
        at_s = self._now_s
        while len(there := self._devices.there(at_s)) < fewest:
            at_s = self._devices.next_arrival(at_s)
            if at_s > self._now_s + self._devices.period_s:
                raise OperatorError(
                    f"never are {fewest} clients of this world there together (cohort.min): lower it, or give them "
                    "longer hours (world.online, or the trace)"
                )
        return at_s, there

    @property
    def _keeps_partial(self) -> bool:
        return self._world.keeps_partial(self._recipe)

    def _stint(self, client: str, n: int, attempt: int, begins_s: float, slow: int | None) -> Stint:
        world = self._world
        return play(
            world,
            self._devices[client],
            self._loads(client),
            client=client,
            version=n - 1,
            begins_s=begins_s,
            draw=random.Random(f"{self._recipe.seed}/world/{n}/{attempt}/{client}"),
            masked=self._recipe.secure.on,
            slow=slow,
            until_s=begins_s + world.deadline_s if world.deadline_s and self._keeps_partial else math.inf,
        )

    def _stragglers(self, n: int, attempt: int, asked: Sequence[str]) -> dict[str, int]:
        """The units of work that each straggler of a cohort gets through: one, or some, or all but one alike."""
        draw = random.Random(f"{self._recipe.seed}/world/stragglers/{n}/{attempt}")
        slow = sorted(draw.sample(asked, round(self._world.stragglers * len(asked))))
        units = {client: self._loads(client).units for client in slow}
        return {client: draw.randint(1, n - 1) if n > 1 else 0 for client, n in units.items()}

    def _close(self, begins_s: float, stints: Sequence[Stint], counted: Sequence[Stint]) -> float:
        """When the round closes: nobody waits for an update that would not count, and each silence for its patience."""
        goal, deadline_s = self._recipe.cohort.goal, self._world.deadline_s
        delivered = sorted(t.uploaded_s for t in counted)
        given_up = [t.lost_s + self._recipe.cohort.patience_s for t in stints if t.lost]
        ends_s = max([*delivered, *given_up], default=max((t.ends_s for t in stints), default=begins_s))
        if goal and len(delivered) >= goal:
            ends_s = delivered[goal - 1]
        return min(ends_s, begins_s + deadline_s) if deadline_s else ends_s


class _Asynchronous:
    """Clients begin from the newest version whenever one of `cohort.size` places is free; a full buffer makes the next.

    Nobody trains twice from one version. A place is free when its client has delivered, or is given up.
    """

    def __init__(self, world: World, buffered: Buffered, recipe: Recipe, devices: Devices, loads: Loads) -> None:
        self._world, self._buffered, self._recipe = world, buffered, recipe
        self._devices, self._loads = devices, loads
        self._now_s = world.starts_h * HOUR_S
        self._working: set[str] = set()
        self._free: list[tuple[float, str, Stint]] = []  # when each one's place is free
        self._newest: dict[str, int] = {}  # the version from which each client has delivered last
        self._begun = 0
        if buffered.size > len(devices):
            raise OperatorError(
                f"world.buffered.size = {buffered.size} updates make a version, and nobody gives two from one: the "
                f"federation has {len(devices)} clients"
            )

    @property
    def oldest(self) -> int | None:
        return min((stint.version for _, _, stint in self._free), default=None)

    def plan(self, n: int, attempt: int) -> Plan:
        size, begins_s, heard, stints = self._buffered.size, self._now_s, list[Stint](), list[Stint]()
        most = _STINTS * max(size, self._recipe.cohort.size)
        while len(heard) < size and len(stints) < most:
            if (stint := self._next(n - 1)) is None:
                break
            stints.append(stint)
            too_stale = self._buffered.most_stale and n - 1 - stint.version > self._buffered.most_stale
            if not stint.lost and not too_stale:
                heard.append(stint)
        reason = ""
        if len(heard) < size:
            reason = f"{len(heard)} of {len(stints)} clients delivered, {size} are needed, and no more come"
        return Plan(
            n=n,
            attempt=attempt,
            begins_s=begins_s,
            ends_s=self._now_s,
            asked=tuple(sorted({stint.client for stint in stints})),
            heard=tuple(heard),
            stints=tuple(stints),
            reason=reason,
        )

    def _next(self, version: int) -> Stint | None:
        """The next stint whose place gets free, and the clock stands there; None where nobody works or comes."""
        since_s = self._now_s
        while True:
            self._begin(version)
            places = self._recipe.cohort.size - len(self._working)
            comes_s = self._devices.next_arrival(self._now_s) if places else math.inf
            if self._free and self._free[0][0] <= comes_s:
                self._now_s, client, stint = heapq.heappop(self._free)
                self._working.remove(client)
                if not stint.lost:
                    self._newest[client] = stint.version
                return stint
            if not self._free and comes_s > since_s + self._devices.period_s:
                return None
            self._now_s = comes_s

    def _begin(self, version: int) -> None:
        """Fill the free places with clients that are there and have not given this version's update yet."""
        if (places := self._recipe.cohort.size - len(self._working)) <= 0:
            return
        idle = [
            c for c in self._devices.there(self._now_s) if c not in self._working and self._newest.get(c, -1) < version
        ]
        draw = random.Random(f"{self._recipe.seed}/world/begin/{self._begun}")
        for client in sorted(draw.sample(idle, min(places, len(idle)))):
            self._begun += 1
            stint = play(
                self._world,
                self._devices[client],
                self._loads(client),
                client=client,
                version=version,
                begins_s=self._now_s,
                draw=random.Random(f"{self._recipe.seed}/world/stint/{self._begun}"),
            )
            free_s = stint.ends_s + (self._recipe.cohort.patience_s if stint.lost else 0.0)
            self._working.add(client)
            heapq.heappush(self._free, (free_s, client, stint))
