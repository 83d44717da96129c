"""Signs of life of several clients in one transaction."""

from murmur.coordinator.store.signs import Sign
from murmur.protocol.errors import TooLate
from murmur.protocol.messages import Progress

from .harness import Agent, World


def test_signs_of_many_clients_share_a_transaction(world: World, agents: list[Agent]):
    run = world.start(rounds=1, secure={"on": False})
    world.tick()
    taken = [agent.poll() for agent in agents]
    world.now += 1

    def signs(step: int, fence: int = 0) -> list[Sign]:
        said = Progress(phase="training", step=step, steps=9)
        return [Sign(agent.name, a.id, a.fence + fence, said) for agent, a in zip(agents, taken, strict=True) if a]

    for step in (1, 2, 2):  # getting on, further, and merely heard
        assert world.store.signs.note([], signs(step)) == [None] * 4
    assert [a.step for a in world.store.runs.detail(run).rounds[0].assignments] == [2] * 4
    assert [type(why) for why in world.store.signs.note([], signs(3, fence=1))] == [TooLate] * 4
