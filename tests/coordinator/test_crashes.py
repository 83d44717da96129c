"""Whole runs under chaos, from many seeds: see `schedules` for what goes wrong and what has to hold."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from sqlalchemy import text

from .harness import World
from .schedules import memory_folder, run_schedule


@pytest.mark.parametrize(
    ("secure", "often", "seldom", "fewest"),
    [
        pytest.param(False, range(2), (100,), 600, id="plain"),
        pytest.param(True, range(1), (100,), 500, id="masked", marks=pytest.mark.slow),
        pytest.param(False, range(2, 16), (101, 102), 5_300, id="plain, more", marks=pytest.mark.slow),
    ],
)
def test_nothing_breaks_whatever_dies(secure: bool, often: Iterable[int], seldom: Iterable[int], fewest: int):
    crashes = lost = twins = 0
    for seed, crash in [*((n, 0.3) for n in often), *((n, 0.04) for n in seldom)]:
        print(f"seed {seed}, crash {crash}")
        with memory_folder() as folder:
            chaos = run_schedule(seed, folder, secure=secure, crash=crash)
        crashes, lost, twins = crashes + chaos.crashes, lost + chaos.lost, twins + chaos.twins
    print(f"{crashes} crashes, {lost} lost replies, {twins} twins")
    assert crashes > fewest


@pytest.mark.parametrize(
    ("secure", "seeds"), [pytest.param(False, 2, marks=pytest.mark.slow), (True, 1)], ids=["plain", "masked"]
)
def test_no_acknowledged_update_is_lost_with_the_power(secure: bool, seeds: int):
    crashes = 0
    for seed in range(100, 100 + seeds):
        print(f"seed {seed}")
        with memory_folder() as folder:
            crashes += run_schedule(seed, folder, secure=secure, crash=0.1, power=True).crashes
    assert crashes > 50 * seeds


@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "masked"])
def test_a_seed_replays_its_schedule_exactly(secure: bool):
    traces: list[list[str]] = []
    for _ in range(2):
        with memory_folder() as folder:
            traces.append(run_schedule(5, folder, secure=secure, crash=0.1, power=True).trace)
    assert len(traces[0]) > 300
    assert traces[0] == traces[1]


def test_sqlite_syncs_every_commit():
    """The disk model leaves the database out: that a commit outlives the power is SQLite's matter, set so."""
    with memory_folder() as folder:
        world = World(folder)
        with world.store.db.write() as t:
            assert t.scalar(text("PRAGMA synchronous")) == 2  # FULL
            assert t.scalar(text("PRAGMA journal_mode")) == "wal"
        world.store.close()
