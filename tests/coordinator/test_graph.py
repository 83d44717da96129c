"""Masked rounds on a k-regular graph, as the coordinator runs them: who may be missing, and when it gives up."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from murmur.coordinator import secure
from murmur.coordinator.rounds import State
from murmur.coordinator.store.attempts import Attempt, Key
from murmur.privacy import bodies
from murmur.privacy.graph import Near, neighbours
from murmur.protocol.messages import AnswerKind

from .harness import Agent, World, masked_up_to

MASKED = {"on": True, "clip_value": 4.0}
RING = {"secure": MASKED | {"degree": 4, "threshold": 4}, "strategy": {"max_weight": 10}}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.store.close()


def patience_ends(world: World) -> None:
    world.tick()  # on a loaded machine the last tick is so long ago that this one counts all deadlines anew
    world.tick(seconds=11)


def near_of(attempt: Attempt) -> Near:
    deals = attempt.answers(AnswerKind.SHARES)
    session = bodies.load_shares(next(iter(deals.values())), 100).fields["session"]
    return neighbours(bytes.fromhex(session), attempt.answers(AnswerKind.ADVERT), secure.degree(attempt))


@pytest.mark.slow
def test_sixty_clients_mask_with_26_each_and_three_may_leave(world: World):
    agents = [world.agent(f"a{i:02}") for i in range(60)]
    run = world.start(secure=MASKED, strategy={"max_weight": 10})
    masked_up_to(world, agents, "advert")
    terms = agents[0].assignment.secure
    assert terms and (terms.degree, terms.threshold) == (26, 21)  # for 10 % corrupt, 10 % dropped
    for agent in agents[1:]:
        agent.share()
    patience_ends(world)  # the first one has sent its keys and is gone
    world.restart()
    for agent in agents[2:]:
        agent.upload_masked(float(agents.index(agent) % 5), 2)
    patience_ends(world)  # the second one has dealt its shares and is gone
    for agent in agents[2:]:
        agent.agree()
    world.tick()
    world.restart()
    for agent in agents[3:]:
        agent.reveal()  # the third one is in the sum and not heard of again
    world.tick()
    mean = sum(i % 5 for i in range(2, 60)) / 58
    np.testing.assert_allclose(world.model(run)["w"], mean, atol=1e-5)
    first = world.store.runs.detail(run).rounds[0]
    assert [(a.client, a.state) for a in first.assignments if a.state != "counted"] == [
        ("a00", "dropped"),
        ("a01", "dropped"),
    ]


@pytest.fixture
def ring(world: World) -> tuple[str, list[Agent], list[Agent]]:
    """Twelve agents on a ring of degree 4, t = 4 of 5 holders, nine of which have dealt; the run, two neighbours on the
    ring without which the client between them lacks a share, and the others."""
    agents = [world.agent(f"a{i:02}") for i in range(12)]
    run = world.start(**RING)
    masked_up_to(world, agents, "advert")
    for agent in agents[:9]:
        agent.share()
    near = near_of(world.store.rounds.load(Key(run, 1, 1)))
    for agent in agents[9:]:
        agent.share()
    victim = agents[0]
    gone = [agent for agent in agents if agent.name in sorted(near[victim.name])[:2]]
    return run, gone, [agent for agent in agents if agent not in gone]


def gives_up(world: World, run: str, state: State) -> None:
    failed = world.store.rounds.load(Key(run, 1, 1))
    assert failed.state == State.FAILED
    detail = world.store.runs.detail(run)
    assert detail.current and detail.current.attempt == 2
    reasons = [e.data["reason"] for e in world.store.events.since(0) if e.data.get("state") == "failed"]
    assert reasons[0].startswith(f"while {state}, fewer than 4 clients are left that hold shares of ")
    assert reasons[0].endswith(": the sum cannot be unmasked")


@pytest.mark.parametrize("state", [State.COLLECTING, State.AGREEING, State.REVEALING])
def test_a_round_that_cannot_be_unmasked_is_given_up_though_clients_enough_are_left(
    world: World, ring: tuple[str, list[Agent], list[Agent]], state: State
):
    run, gone, staying = ring
    world.tick()
    stages = {"upload_masked": State.COLLECTING, "agree": State.AGREEING, "reveal": State.REVEALING}
    for stage, at in stages.items():
        for agent in staying if at == state else [*gone, *staying]:
            getattr(agent, stage)(*((1.0, 1) if stage == "upload_masked" else ()))
        if at == state:
            world.tick()
            assert world.state(run) == state  # they may still come
            patience_ends(world)
            break
        world.tick()
    gives_up(world, run, state)


def test_a_round_is_given_up_when_a_client_sees_too_few_neighbours_share(world: World):
    agents = [world.agent(f"a{i:02}") for i in range(12)]
    run = world.start(**RING)
    masked_up_to(world, agents, "advert")
    agents[0].share()
    near = near_of(world.store.rounds.load(Key(run, 1, 1)))
    gone = sorted(near[agents[0].name])[:2]
    for agent in agents[1:]:
        if agent.name not in gone:
            agent.share()
    patience_ends(world)
    gives_up(world, run, State.SHARES)


def test_a_round_with_its_goal_waits_for_a_client_whose_shares_it_lacks(world: World):
    agents = [world.agent(f"a{i:02}") for i in range(12)]
    run = world.start(**RING, cohort={"min": 3, "size": 10, "over_select": 1.2, "patience_s": 10})
    masked_up_to(world, agents, "advert", "share")
    near = near_of(world.store.rounds.load(Key(run, 1, 1)))
    gone = [agent for agent in agents if agent.name in sorted(near[agents[0].name])[:2]]
    for agent in agents:
        if agent not in gone:
            agent.upload_masked(1.0, 1)
    world.tick()
    assert world.state(run) == "collecting"  # ten of twelve are the goal, but one's secrets lie with three of five
    gone[0].upload_masked(1.0, 1)
    world.tick()
    assert world.state(run) == "agreeing"


def test_an_attempt_that_an_earlier_release_began_keeps_the_complete_graph(world: World):
    agents = [world.agent(f"a{i:02}") for i in range(51)]
    run = world.start(secure=MASKED, strategy={"max_weight": 10})
    world.tick()
    attempt = world.store.rounds.load(Key(run, 1, 1))
    assert (len(attempt.parts), attempt.threshold, secure.degree(attempt), secure.needed(attempt)) == (51, 21, 26, 40)
    before = replace(attempt, threshold=35)  # two thirds of 51, plus one
    assert (secure.degree(before), secure.needed(before)) == (0, 35)
    assert agents[0].poll() is not None
