"""One client's part in one round on the world's clock: download, train, upload, and what comes in between."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from .devices import HOUR_S, Device
from .world import World

LostBy = Literal["left", "hours", "crashed"]
_CRASHES = 1000  # in one training: a client that crashes more often never gets through


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a round asks of a client. examples: to train on, over all epochs; units: epochs, or steps, of them."""

    down_bytes: int
    up_bytes: int
    examples: int
    units: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stint:
    """When a client that is asked at `begins_s` has the model, has trained and has delivered, in the world's seconds.

    lost_s: when it leaves; infinity where it does not. lost_by: why it would: by chance, at the end of its hours, or by
    a crash. version: the number of the one that it trains from. units: of work in its update, which may be fewer than
    its load's.
    """

    client: str
    version: int
    begins_s: float
    downloaded_s: float
    trained_s: float
    uploaded_s: float
    lost_s: float
    lost_by: LostBy
    units: int
    load: Load

    @property
    def lost(self) -> bool:
        return self.lost_s < self.uploaded_s

    @property
    def ends_s(self) -> float:
        """When it has delivered or is gone."""
        return min(self.uploaded_s, self.lost_s)

    @property
    def partial(self) -> bool:
        return self.units < self.load.units

    def bytes_at(self, at_s: float) -> tuple[int, int]:
        """Bytes that came down and that went up until then."""
        at_s = min(at_s, self.ends_s)
        down = _share(at_s - self.begins_s, self.downloaded_s - self.begins_s)
        up = _share(at_s - self.trained_s, self.uploaded_s - self.trained_s)
        return round(self.load.down_bytes * down), round(self.load.up_bytes * up)


def play(
    world: World,
    device: Device,
    load: Load,
    *,
    client: str,
    version: int,
    begins_s: float,
    draw: random.Random,
    masked: bool = False,
    slow: int | None = None,
    until_s: float = math.inf,
) -> Stint:
    """The stint of a client that is asked at `begins_s`, when it is there.

    slow: the units that a straggler gets through, in the time in which others do all. until_s: it stops training early
    enough to deliver by then, after as many whole units as fit and one at least.
    A plain round's client goes on from its last checkpoint after a crash; a masked one's keys are gone, and so is it.
    """
    down_s = 8e-6 * load.down_bytes / device.down_mbit_s
    up_s = 8e-6 * load.up_bytes / device.up_mbit_s
    train_s = load.examples / device.examples_per_s
    room = 1.0 if until_s == math.inf else (until_s - begins_s - down_s - up_s) / max(train_s, 1e-9)
    fits = min(load.units, max(1, int(load.units * room + 1e-9)))
    train_s *= fits / load.units
    leaves, when = draw.random() < world.dropout, draw.random()
    crashed_s, took_s = _crashes(world, train_s, draw, masked)
    downloaded_s = begins_s + down_s
    trained_s = downloaded_s + took_s
    uploaded_s = trained_s + up_s
    lost: list[tuple[float, LostBy]] = [(downloaded_s + crashed_s, "crashed")]
    if leaves:
        lost.append((begins_s + when * (down_s + took_s + up_s), "left"))
    if (away_s := device.until(begins_s)) < uploaded_s:
        lost.append((away_s, "hours"))
    lost_s, lost_by = min(lost)
    return Stint(
        client=client,
        version=version,
        begins_s=begins_s,
        downloaded_s=downloaded_s,
        trained_s=trained_s,
        uploaded_s=uploaded_s,
        lost_s=lost_s,
        lost_by=lost_by,
        units=fits if slow is None else min(slow, fits),
        load=load,
    )


def _crashes(world: World, train_s: float, draw: random.Random, masked: bool) -> tuple[float, float]:
    """When the client is lost by a crash (infinity: it is not), in seconds of training, and what the training takes."""
    if not world.crashes_per_h:
        return math.inf, train_s
    clock_s = done_s = 0.0
    for _ in range(_CRASHES):
        gap_s = -math.log(1 - draw.random()) * HOUR_S / world.crashes_per_h
        if done_s + gap_s >= train_s:
            return math.inf, clock_s + train_s - done_s
        if masked:
            return gap_s, train_s
        clock_s += gap_s + world.restart_s
        done_s = (done_s + gap_s) // world.checkpoint_s * world.checkpoint_s
    return clock_s, math.inf


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else float(part >= 0)
