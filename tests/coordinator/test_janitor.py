"""A disk that fills up while clients upload: the run is paused, and nobody is dropped for what found no room."""

import pytest

from murmur.coordinator import janitor
from murmur.coordinator.blobs.disk import Disk
from murmur.protocol.errors import StorageFull

from .harness import Agent, World


def test_a_run_whose_updates_find_no_room_is_paused_and_goes_on(
    world: World, agents: list[Agent], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(janitor, "ROOM_S", 0.0)
    run = world.start(rounds=1, secure={"on": False})
    world.tick()
    for agent in agents:
        agent.poll()
    free = [64 << 20]
    monkeypatch.setattr(Disk, "space", lambda self, folder: (free[0], 10 << 30))  # the reserve, and not a byte more
    with pytest.raises(StorageFull):
        agents[0].upload_plain(1.0, 1)
    world.tick()
    view = world.store.runs.detail(run).run
    assert view.state == "paused" and "Free some space" in view.reason
    world.tick(seconds=3600)  # far beyond everybody's patience
    free[0] = 1 << 30
    world.tick()
    assert world.store.runs.detail(run).run.state == "running"
    for agent in agents:
        agent.upload_plain(1.0, 1)
    world.tick()
    assert world.store.runs.detail(run).run.version == 1
