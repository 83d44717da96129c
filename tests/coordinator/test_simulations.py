"""Simulated runs in a coordinator's database: its own to show, and another process's to carry out."""

import asyncio

import pytest

from murmur.coordinator.conductor import Conductor
from murmur.coordinator.hub import Hub
from murmur.coordinator.janitor import ROOM_S
from murmur.coordinator.service import Service
from murmur.coordinator.simulated import held
from murmur.coordinator.store import Store
from murmur.coordinator.store.attempts import Key
from murmur.coordinator.store.simulations import Made
from murmur.protocol.errors import Conflict, NotFound
from murmur.protocol.recipe import parse_recipe

from .harness import Agent, Inline, World

ABOUT = {"clients": 3, "backend": "vectorized", "secure": "off", "command": "c0"}
RECIPE = parse_recipe({"name": "lines", "task": "line", "rounds": 2, "secure": {"on": False}})


def made(n: int) -> Made:
    return Made(sha256=f"{n:064x}", bytes=12, optimizer=None, contributors=["virtual-1", "virtual-2"])


def commit(world: World, n: int, fence: int = 1) -> None:
    measured = {n - 1: {"loss": (6.0, 3.0)}, n: {"train_loss": (4.0, 2.0)}}
    kept = {"figures": {"seconds": n}}
    world.store.simulations.commit(Key("run", n, 1), fence, made(n), measured, kept, facts={})


def state(world: World) -> str:
    return world.store.runs.detail("run").run.state


@pytest.fixture
def begun(world: World) -> World:
    assert world.store.simulations.start("run", RECIPE, ABOUT, made(0), by="ada") == 1
    return world


def test_the_conductor_leaves_a_simulation_alone(begun: World, agents: list[Agent]):
    begun.tick(3600.0)
    assert state(begun) == "running" and begun.state("run") == "collecting"
    assert all(agent.poll() is None for agent in agents)
    begun.start(name="real")
    begun.tick()
    assert agents[0].poll() is not None  # real ones go on beside it


def test_a_round_is_there_with_its_version_its_clients_and_its_metrics(begun: World):
    commit(begun, 1)
    found = begun.store.runs.detail("run")
    assert (found.run.round, found.run.version, found.run.latest) == (1, 1, {"loss": 2.0, "train_loss": 2.0})
    assert [r.state for r in found.rounds] == ["committed", "collecting"]
    assert [(a.client, a.state) for a in found.rounds[0].assignments] == [
        ("virtual-1", "counted"),
        ("virtual-2", "counted"),
    ]
    commit(begun, 2)
    assert begun.store.runs.detail("run").rounds[-1].kind == "evaluate"
    begun.store.simulations.finish(Key("run", 3, 1), 1, {"loss": (1.0, 2.0)})
    found = begun.store.runs.detail("run")
    assert found.run.state == "finished" and found.run.latest["loss"] == 0.5
    assert [e.by for e in begun.store.audit.entries(what="run finished")] == ["simulation"]
    versions = begun.store.runs.versions("run")
    assert [v.parent for v in versions] == [made(1).sha256, made(0).sha256, None]


def test_of_two_processes_only_the_later_writes(begun: World):
    commit(begun, 1)
    found = begun.store.simulations.go_on("run", by="bob")
    assert (found.fence, found.newest, found.about) == (2, made(1), ABOUT)
    assert found.rounds == ((("virtual-1", "virtual-2"), {"figures": {"seconds": 1}}),)
    before = begun.store.events.newest()
    with pytest.raises(Conflict, match="another process goes on with run"):
        commit(begun, 2, fence=1)
    begun.store.simulations.interrupt("run", 1, "too late to say", by="ada")
    begun.store.simulations.fail("run", 1, "too late to say")
    assert begun.store.events.newest() == before and state(begun) == "running"
    commit(begun, 2, fence=2)


def test_a_stopped_simulation_takes_no_more_rounds(begun: World):
    begun.store.runs.stop("run", by="admin")
    with pytest.raises(Conflict, match="was ended meanwhile: stopped by admin"):
        commit(begun, 1)
    with pytest.raises(Conflict, match="is stopped: there is nothing to go on with"):
        begun.store.simulations.go_on("run", by="ada")


def test_nobody_but_its_process_pauses_or_resumes_a_simulation(begun: World):
    begun.store.simulations.interrupt("run", 1, "interrupted", by="ada")
    with pytest.raises(Conflict, match="Ctrl-C holds it, `murmur simulate --resume run` goes on"):
        begun.store.runs.resume("run", by="admin")
    assert state(begun) == "paused"
    begun.tick(10.0)  # nor does the coordinator, which lets go on what it has paused itself
    assert state(begun) == "paused"
    begun.store.simulations.go_on("run", by="ada")
    with pytest.raises(Conflict, match="is a simulation"):
        begun.store.runs.pause("run", "paused by admin", by="admin")


def test_a_real_run_is_not_gone_on_with_as_a_simulation(begun: World):
    real = begun.start()
    with pytest.raises(Conflict, match="the coordinator goes on with it"):
        begun.store.simulations.go_on(real, by="ada")
    with pytest.raises(NotFound):
        begun.store.simulations.find(real)
    assert begun.store.simulations.unfinished("c0") == [("run", 0)] and not begun.store.simulations.unfinished("c1")


def test_the_pages_hear_of_what_another_process_has_written(begun: World):
    hub = Hub()
    hub.newest_event = begun.store.events.newest()
    service = Service(begun.store, begun.blobs, hub, None, invitation_s=1.0)  # pyright: ignore[reportArgumentType]

    async def look() -> int:
        hub.attach(asyncio.get_running_loop())
        other = Store(begun.url, clock=lambda: begun.now)  # nobody tells this process's hub of its commits
        other.simulations.interrupt("run", 1, "interrupted", by="ada")
        newest = other.events.newest()
        other.close()
        async with asyncio.timeout(30):
            async for found in service.changes(hub.newest_event):
                assert found == newest
                return found
        raise AssertionError("the changes ended")

    assert asyncio.run(look())


def test_a_simulation_whose_process_was_killed_is_interrupted_and_can_be_stopped(begun: World):
    place = begun.folder / "simulations" / "run"
    begun.conductor = Conductor(
        begun.store, begun.blobs, begun.hub, Inline(begun.blobs), clock=lambda: begun.now, simulations=place.parent
    )

    def look() -> str:
        begun.conductor._janitor._looked_at -= 2 * ROOM_S  # pyright: ignore[reportPrivateUsage]
        begun.tick()
        return state(begun)

    with held(place):
        assert look() == "running"
        with pytest.raises(Conflict, match="run is being simulated by another process"), held(place):
            pass
    assert look() == "paused"
    found = begun.store.runs.detail("run").run
    assert (found.word, found.paused_by) == ("interrupted", "ada")
    assert found.reason == "interrupted (its process was killed): murmur simulate --resume run goes on"
    said = begun.store.events.newest()
    assert look() == "paused" and begun.store.events.newest() == said  # said once
    with held(place):
        begun.store.simulations.go_on("run", by="bob")
        assert look() == "running"
    look()
    begun.store.runs.stop("run", by="admin")
    assert look() == "stopped" and not place.exists()
