"""Which version is the newest: what a person pulls who names only the run."""

from .harness import Agent, World


def test_a_clock_that_was_set_back_makes_no_older_version_the_newest(world: World, agents: list[Agent]):
    run = world.start(rounds=1, secure={"on": False})
    world.tick()
    world.now -= 86_400
    for agent in agents:
        agent.poll()
        agent.upload_plain(1.0, 1)
    world.tick()
    other = world.start(rounds=1)
    assert [v.n for v in world.store.runs.versions(run)] == [1, 0]
    assert [v.n for v in world.store.runs.versions() if v.run == run] == [1, 0]
    assert [v.n for v in world.store.runs.versions(other)] == [0]
