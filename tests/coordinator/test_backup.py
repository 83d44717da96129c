"""A copy taken in the middle of a round, restored elsewhere, ends the run with the model of the original."""

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from murmur.coordinator.backup import backup, restore
from murmur.coordinator.settings import Settings
from murmur.coordinator.store import tables
from murmur.protocol.errors import OperatorError

from .harness import Agent, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "data").mkdir()
    return World(tmp_path / "data")  # SQLite in the data folder, where a coordinator has it


def deliver(world: World, agents: list[Agent], values: list[float]) -> None:
    for agent, value in zip(agents, values, strict=True):
        agent.world = world
        agent.poll()
        agent.upload_plain(value, 1)


def test_a_backup_in_mid_round_finishes_the_run_with_the_same_model(world: World, tmp_path: Path):
    agents = [world.agent(name) for name in "abc"]
    run = world.start(rounds=2, secure={"on": False})
    world.tick()
    deliver(world, agents, [1.0, 2.0, 3.0])
    world.tick()
    world.tick()
    deliver(world, agents[:2], [0.5, 0.25])  # two of three in round 2: their updates are blobs that no version names
    assert backup(Settings(data=tmp_path / "data"), tmp_path / "copy") == 4  # versions 0 and 1, and the two updates
    restore(tmp_path / "copy", Settings(data=tmp_path / "new"))
    models: list[bytes] = []
    for folder in ("data", "new"):
        world = World(tmp_path / folder)
        world.now = 1_000_010.0
        deliver(world, agents[2:], [4.0])
        world.tick()
        models.append(world.model(run)["w"].tobytes())
        assert world.store.runs.detail(run).run.version == 2
        world.store.close()
    assert models[0] == models[1]


def test_a_backup_and_a_restore_overwrite_nothing(world: World, tmp_path: Path):
    backup(Settings(data=tmp_path / "data"), tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0
    with pytest.raises(OperatorError, match="exists already"):
        backup(Settings(data=tmp_path / "data"), tmp_path / "copy")
    with pytest.raises(OperatorError, match="is not empty"):
        restore(tmp_path / "copy", Settings(data=tmp_path / "data"))
    with pytest.raises(OperatorError, match="is no backup"):
        restore(tmp_path, Settings(data=tmp_path / "new"))
    world.store.close()


def test_a_small_update_that_lies_in_its_row_is_copied_with_it(world: World, tmp_path: Path):
    agents = [world.agent(name) for name in "abc"]
    run = world.start(secure={"on": False})
    world.tick()
    for agent in agents:
        agent.poll()
    agents[0].upload_inline(1.0, 1)
    settings, copy = Settings(data=tmp_path / "data"), tmp_path / "copy"
    assert backup(settings, copy) == 1  # version 0; the update is in the database
    for agent in agents[1:]:
        agent.upload_inline(4.0, 1)
    world.tick()
    assert np.all(world.model(run)["w"] == np.float32(3.0))
    with world.store.db.read() as c:
        assert set(c.scalars(select(tables.update.c.data))) == {None}, "one organization's update is nobody's to keep"
    world.store.close()
    again = World(copy)
    for agent in agents[1:]:
        agent.world = again
        agent.upload_inline(4.0, 1)
    again.tick()
    assert np.all(again.model(run)["w"] == np.float32(3.0))  # (1 + 4 + 4) / 3, with the update from the copied row
    again.store.close()
