"""Every point at which a coordinator can die in a run of three rounds, one by one: each run ends in the same model.

Training is the same each time here, so the undisturbed run's model is the only right one, to the last bit.
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from murmur.protocol.messages import Assignment

from .schedules import Chaos, Crash, check, memory_folder, stage

TURNS = 400


@dataclass
class Plan(Chaos):
    """Dies at one failpoint, counted from 1; 0 never."""

    at: int = 0
    hits: int = 0

    def failpoint(self, name: str) -> None:
        self.hits += 1
        if self.hits == self.at:
            self.die(name)

    def train(self, assignment: Assignment, client: str) -> tuple[float, float]:
        drawn = hashlib.sha256(f"{assignment.round} {client}".encode()).digest()
        return drawn[0] / 128 - 1, float(1 + drawn[1] % 9)


def play(folder: Path, *, at: int, secure: bool) -> tuple[int, str]:
    """A run of three rounds with three agents that dies at failpoint `at`; (failpoints passed, the last model)."""
    plan = Plan(random.Random(0), crash=0.0, lose=0.0, at=at)
    with stage(folder, plan, secure=secure, clients=3) as s:
        s.arm()
        for _ in range(TURNS):
            s.world.now += 0.1
            try:
                s.world.conductor.tick()
                for player in s.players:
                    player.turn()
            except Crash:
                s.recover()
            if s.finished():
                break
        s.disarm()
        check(s.world, s.run, s.truth, secure=secure)
        assert plan.crashes == bool(at), f"failpoint {at} was never reached"
        newest = s.world.store.runs.versions(s.run)[0]
        assert newest.contributors == 3
        return plan.hits, newest.sha256


def try_points(secure: bool, stride: int) -> None:
    began = time.monotonic()
    with memory_folder() as folder:
        points, model = play(folder, at=0, secure=secure)
    tried = range(1, points + 1, stride)
    for at in tried:
        with memory_folder() as folder:
            assert play(folder, at=at, secure=secure)[1] == model, f"another model after a crash at point {at}"
    print(f"{points} points, {len(tried)} tried, each {stride}., in {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize(
    ("secure", "stride"), [(False, 97), pytest.param(True, 307, marks=pytest.mark.slow)], ids=["plain", "masked"]
)
def test_a_crash_at_a_point_changes_no_model(secure: bool, stride: int):
    try_points(secure, stride)


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_a_crash_at_any_point_changes_no_model(secure: bool):
    try_points(secure, 1)
