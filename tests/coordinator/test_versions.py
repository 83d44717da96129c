"""Which version is the newest, who it is made from, and who was asked and is missing, with the reason."""

from sqlalchemy import event

from murmur.protocol.messages import Failure
from murmur.protocol.views import Missing, VersionView

from .harness import Agent, World, masked_round, masked_up_to, plain_round
from .test_conductor import MASKED, PLAIN


def newest(world: World, run: str) -> VersionView:
    return world.store.runs.versions(run)[0]


def test_a_version_names_who_is_in_it_and_who_was_dropped_and_why(world: World, agents: list[Agent]):
    run = world.start(**PLAIN)
    world.tick()
    for agent in agents[:3]:
        agent.poll()
        agent.upload_plain(1.0, 1)
    world.tick(seconds=11)
    version = newest(world, run)
    assert (version.n, version.contributors, version.who) == (1, 3, ("a", "b", "c"))
    assert version.missing == (Missing(client="d", reason="not heard for 10 s while collecting"),)


def test_a_masked_version_names_them_too(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_up_to(world, agents, "advert", "share")
    for agent in agents[1:]:
        agent.upload_masked(2.0, 1)
    world.tick(seconds=11)
    for stage in ("agree", "reveal"):
        for agent in agents[1:]:
            getattr(agent, stage)()
        world.tick()
    version = newest(world, run)
    assert version.who == ("b", "c", "d")
    assert [m.client for m in version.missing] == ["a"] and "not heard" in version.missing[0].reason


def test_one_that_came_too_late_is_missing_with_that_reason(world: World, agents: list[Agent]):
    run = world.start(cohort={"min": 3, "size": 3, "over_select": 1.3, "patience_s": 10}, **PLAIN)
    world.tick()
    for agent in agents:
        assert agent.poll() is not None  # ceil(3 * 1.3) = 4 are asked
    for agent in agents[1:]:
        agent.upload_plain(1.0, 1)
    world.tick()
    version = newest(world, run)
    assert version.who == ("b", "c", "d")
    assert version.missing == (Missing(client="a", reason="the round had enough updates before this one came"),)


def test_one_that_failed_after_its_update_was_in_the_sum_is_not_missing(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    world.tick()
    for stage in ("poll", "advert", "share"):
        for agent in agents:
            getattr(agent, stage)()
        world.tick()
    for agent in agents:
        agent.upload_masked(2.0, 1)
    world.tick()
    refused = Failure(fence=1, code="privacy_refusal:left_out", detail="no")
    world.conversation.fail("a", agents[0].assignment.id, refused)
    for stage in ("agree", "reveal"):
        for agent in agents[1:]:
            getattr(agent, stage)()
        world.tick()
    version = newest(world, run)
    assert (version.who, version.missing) == (("a", "b", "c", "d"), ())
    first = world.store.runs.detail(run).rounds[0].assignments[0]
    assert (first.client, first.state, first.reason) == ("a", "counted", "privacy_refusal:left_out: no")


def test_only_the_attempt_that_made_the_version_is_told_of(world: World, agents: list[Agent]):
    run = world.start(rounds=2, **PLAIN)
    world.tick()
    world.tick(seconds=11)  # nobody came: a second attempt is opened
    for agent in agents[1:]:
        agent.poll()
    plain_round(world, agents[1:], [1.0] * 3, [1] * 3)  # a is away and is not asked again
    version = newest(world, run)
    assert (version.n, version.who, version.missing) == (1, ("b", "c", "d"), ())


def test_another_runs_missing_clients_are_not_told_of(world: World, agents: list[Agent]):
    other = world.start(**PLAIN)
    world.tick()
    for agent in agents[:3]:
        agent.poll()
        agent.upload_plain(1.0, 1)
    world.tick(seconds=11)
    assert [m.client for m in newest(world, other).missing] == ["d"]
    world.store.runs.stop(other, by="ada")
    for agent in agents[:3]:
        agent.poll()
    run = world.start(**PLAIN)
    plain_round(world, agents[:3], [1.0] * 3, [1] * 3)  # d is not asked
    assert newest(world, run).missing == ()


def test_a_run_that_began_has_nobody_in_version_0(world: World, agents: list[Agent]):
    version = newest(world, world.start(**PLAIN))
    assert (version.n, version.who, version.missing) == (0, (), ())


def test_a_list_of_all_runs_is_short_and_the_queries_do_not_grow_with_the_versions(world: World, agents: list[Agent]):
    run = world.start(rounds=3, **MASKED)
    asked: list[str] = []
    event.listen(world.store.db.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))

    def queries(of: str | None) -> int:
        before = len(asked)
        world.store.runs.versions(of)
        return sum(statement.startswith("SELECT") for statement in asked[before:])

    few = queries(run)
    masked_round(world, agents, [1.0] * 4, [1] * 4)
    masked_round(world, agents, [1.0] * 4, [1] * 4)
    assert len(world.store.runs.versions(run)) == 3
    assert queries(run) == few == 3 and queries(None) == 2
    (version, *_) = world.store.runs.versions()
    assert (version.contributors, version.who, version.missing) == (4, (), ())


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


def test_the_clients_of_a_plain_round_are_told_with_what_they_said_of_themselves(world: World, agents: list[Agent]):
    run = world.start(**PLAIN)
    plain_round(world, agents, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    reports = world.store.runs.detail(run).reports
    assert [(r.client, r.version, r.weight) for r in reports] == [("a", 0, 1), ("b", 0, 2), ("c", 0, 3), ("d", 0, 4)]
    assert {r.metrics["loss"] for r in reports} == {2.0}  # each sent a sum of 2 times its weight


def test_of_a_masked_round_nothing_is_told_of_a_single_client(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_round(world, agents, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    assert newest(world, run).contributors == 4 and world.store.runs.detail(run).reports == ()
