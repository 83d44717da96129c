"""Signs of life: written together, each refused or taken for itself; silent is told from alive and no further."""

import asyncio

import pytest

from murmur.coordinator.heartbeats import Heartbeats
from murmur.coordinator.patience import pace_s
from murmur.coordinator.store.attempts import MOST_PHASES
from murmur.coordinator.store.signs import Seen, Sign
from murmur.protocol.errors import NotFound, TooLate
from murmur.protocol.messages import Progress

from .harness import Agent, World

PLAIN = {"secure": {"on": False}, "cohort": {"min": 2, "patience_s": 10}}


def sign(agent: Agent, step: int, fence: int | None = None, phase: str = "training") -> Sign:
    said = Progress.model_validate({"phase": phase, "step": step, "steps": 100})
    return Sign(agent.name, agent.assignment.id, fence or agent.assignment.fence, said)


def working(world: World, agents: list[Agent], **recipe: object) -> str:
    run = world.start(**(PLAIN | recipe))
    world.tick()
    for agent in agents:
        agent.poll()
    return run


def part(world: World, run: str, client: str):
    current = world.store.runs.detail(run).current
    assert current
    return next(a for a in current.assignments if a.client == client)


def test_many_signs_share_a_transaction_and_each_is_answered_for_itself(world: World, agents: list[Agent]):
    run = working(world, agents)
    stranger = Sign("a", agents[1].assignment.id, 1, Progress(phase="training", step=1))
    found = world.store.signs.note([], [sign(agents[0], 3), stranger, sign(agents[1], 4, fence=9), sign(agents[2], 5)])
    assert [type(f) for f in found] == [type(None), NotFound, TooLate, type(None)]
    assert [part(world, run, name).step for name in "abc"] == [3, 0, 5]


def test_the_log_keeps_one_event_of_progress(world: World, agents: list[Agent]):
    working(world, agents)
    for step in range(1, 6):
        world.now += 2
        world.store.signs.note([], [sign(agent, step) for agent in agents])
    assert [e.kind for e in world.store.events.recent()].count("progress") == 1


def test_a_client_that_repeats_itself_is_heard_but_gets_no_further(world: World, agents: list[Agent]):
    run = working(world, agents)
    for _ in range(8):  # never silent for 10 s; a client that is not known has five times that between two steps
        world.now += 9
        world.store.signs.note([], [sign(agent, 7) for agent in agents[:1]])
        world.store.signs.note([], [sign(agent, int(world.now)) for agent in agents[1:]])
        world.tick()
    assert (part(world, run, "a").state, part(world, run, "a").reason) == (
        "dropped",
        "no progress for 50 s while collecting",
    )
    assert {part(world, run, name).state for name in "bcd"} == {"working"}


def test_a_client_that_is_silent_is_dropped_though_it_had_got_on(world: World, agents: list[Agent]):
    run = working(world, agents)
    world.store.signs.note([], [sign(agent, 1) for agent in agents])
    world.now += 6
    world.store.signs.note([], [sign(agent, 2) for agent in agents[1:]])
    world.tick(seconds=6)
    assert part(world, run, "a").reason == "not heard for 10 s while collecting"
    assert part(world, run, "b").state == "working"


@pytest.mark.parametrize(
    "gaps, allowed_s",
    [([], 300), ([1.0], 60), ([15.0, 2.0], 60), ([30.0, 1.0], 90), ([5000.0], 1200)],
    ids=["unknown", "quick", "still below the patience", "three times its longest", "at most 20 patiences"],
)
def test_how_long_a_client_may_take_between_two_steps(gaps: list[float], allowed_s: float):
    assert pace_s(60.0, gaps) == allowed_s


def test_a_slow_client_is_known_by_its_last_assignments(world: World, agents: list[Agent]):
    working(world, agents)
    world.store.signs.note([], [sign(agents[0], 1)])
    world.now += 40
    world.store.signs.note([], [sign(agents[0], 2)])
    assert world.store.rounds.gaps_s("a") == []
    agents[0].upload_plain(1.0, 1)
    assert world.store.rounds.gaps_s("a") == [40.0]


def test_a_client_that_was_dropped_alive_is_given_longer_the_next_time(world: World, agents: list[Agent]):
    working(world, agents)
    for _ in range(8):
        world.now += 9
        world.store.signs.note([], [sign(agents[0], 7)] + [sign(agent, int(world.now)) for agent in agents[1:]])
        world.tick()
    (gap_s,) = world.store.rounds.gaps_s("a")
    assert 50 < gap_s < 60 and pace_s(10.0, [gap_s]) == 3 * gap_s


def test_a_parked_client_is_there_for_as_long_as_it_was_told_to_wait(world: World, agents: list[Agent]):
    world.store.signs.note([Seen("a", {}, 300.0)], [])
    world.now += 350
    assert world.store.clients.eligible() == ["a"]
    world.now += 20  # 300 s and 60 s of grace are over
    assert world.store.clients.eligible() == []


def test_who_comes_back_is_told_in_the_log(world: World, agents: list[Agent]):
    before = world.store.events.newest()
    world.store.signs.note([Seen("a", {})], [])
    world.now += 100
    world.store.signs.note([Seen("a", {})], [])
    assert [e.data for e in world.store.events.since(before)] == [{"client": "a", "online": True}]


def test_heartbeats_from_coroutines_are_answered_after_their_commit(world: World, agents: list[Agent]):
    run = working(world, agents)
    heartbeats = Heartbeats(world.store.signs)

    async def beat() -> list[list[object]]:
        return list(await asyncio.gather(*(heartbeats.note([], [sign(a, n + 1)]) for n, a in enumerate(agents))))

    assert asyncio.run(beat()) == [[None]] * 4
    heartbeats.close()
    assert [part(world, run, name).step for name in "abcd"] == [1, 2, 3, 4]


def test_the_row_keeps_when_each_phase_began(world: World, agents: list[Agent]):
    run, began = working(world, agents), world.now
    for after, phase, step in ((1, "downloading", 0), (3, "training", 1), (4, "training", 2)):
        world.now = began + after
        world.store.signs.note([], [sign(agents[0], step, phase=phase)])
    kept = [(p.name, p.at.timestamp() - began) for p in part(world, run, "a").phases]
    assert kept == [("waiting", 0), ("downloading", 1), ("training", 3)]
    assert [p.name for p in part(world, run, "b").phases] == ["waiting"]


def test_what_a_client_sent_stays_known_while_it_waits(world: World, agents: list[Agent]):
    run = working(world, agents)
    agents[0].upload_plain(0.5, 2)
    sent = part(world, run, "a").bytes
    world.store.signs.note([], [sign(agents[0], 0, phase="waiting")])
    assert sent > 0 and part(world, run, "a").bytes == sent


def test_an_agent_that_goes_to_and_fro_does_not_fill_its_row(world: World, agents: list[Agent]):
    run = working(world, agents)
    for step in range(100):
        world.now += 1
        world.store.signs.note([], [sign(agents[0], step, phase=("training", "waiting")[step % 2])])
    assert len(part(world, run, "a").phases) == MOST_PHASES
