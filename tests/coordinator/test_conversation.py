"""What is known without a look at the database: that a client has part in nothing, until it is woken.

The harness compares it with the database before every poll of every other test. On PostgreSQL nothing is known: other
processes give work too.
"""

import pytest

from murmur.coordinator.conversation import IDLE_S

from .harness import Agent, World

PLAIN = {"secure": {"on": False}}


def test_who_had_part_in_nothing_is_idle_until_it_is_chosen(world: World, agents: list[Agent]):
    assert [world.conversation.idle(agent.name) for agent in agents] == [not world.store.db.shared] * 4
    world.start(**PLAIN)
    world.tick()
    assert [world.conversation.idle(agent.name) for agent in agents] == [False] * 4
    assert all(agent.poll() for agent in agents)
    assert not world.conversation.idle("a")  # it has work, which a paused run may only hold back


def test_a_wake_during_the_look_counts(world: World, agents: list[Agent], monkeypatch: pytest.MonkeyPatch):
    look = world.store.assignments.held

    def slow(client: str) -> dict[str, bool]:
        found = look(client)
        world.start(**PLAIN)
        world.tick()  # chooses it after it was looked for
        return found

    monkeypatch.setattr(world.store.assignments, "held", slow)
    agents[0].poll()
    assert not world.conversation.idle("a")


def test_everybody_is_looked_for_again_after_a_while_and_after_a_wake_of_all(world: World, agents: list[Agent]):
    world.now += IDLE_S + 1
    assert not world.conversation.idle("a")
    agents[0].poll()
    assert world.conversation.idle("a") == (not world.store.db.shared)
    world.hub.wake(["*"])
    assert not world.conversation.idle("a")
