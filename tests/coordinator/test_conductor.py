"""Rounds from offer to version, over the real store and the real sums, with agents that can vanish anywhere."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from murmur.coordinator.conductor import Conductor
from murmur.coordinator.rounds import State
from murmur.coordinator.store.attempts import Attempt, Key, Outcome
from murmur.protocol.errors import TooLate
from murmur.protocol.messages import StepKind

from .harness import MODEL, SLOW_ON_POSTGRES, Agent, World, masked_round, masked_up_to, plain_round

MASKED = {"secure": {"on": True, "clip_value": 4.0}, "strategy": {"max_weight": 10}}
PLAIN = {"secure": {"on": False}}


def test_a_plain_round_makes_the_weighted_mean(world: World, agents: list[Agent]):
    run = world.start(**PLAIN)
    plain_round(world, agents, [1.0, 2.0, 3.0, 0.0], [1, 1, 2, 0])
    # (1*1 + 1*2 + 2*3 + 0*0) / 4
    assert np.all(world.model(run)["w"] == np.float32(2.25))
    detail = world.store.runs.detail(run)
    assert [(m.version, m.name, m.value, m.count) for m in detail.metrics] == [(0, "loss", 2.0, 4.0)]
    assert world.store.runs.versions(run)[0].contributors == 4


def test_a_masked_round_makes_the_same_mean_to_a_ring_unit(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_round(world, agents, [1.0, 2.0, 3.0, 0.5], [1, 1, 2, 4])
    # (1 + 2 + 6 + 2) / 8; four rounding errors of half a unit, and a unit is 4*10 / (2^28 - 1)
    np.testing.assert_allclose(world.model(run)["w"], 1.375, atol=4 * 0.5 * 40 / (2**28 - 1) / 8 + 2**-23)
    assert [a.step() for a in agents] == [None] * 4 or all(a.log[-1] == StepKind.DONE for a in agents)


@SLOW_ON_POSTGRES
@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_a_masked_round_is_exact_in_every_ring(world: World, agents: list[Agent], ring_bits: int):
    """Bounds of which a unit is 1/256: what is a multiple of it comes out to the bit, with random rounding too."""
    units = (1 << (ring_bits - 3 - 1)) - 1  # four clients take three bits
    terms = {"secure": {"ring_bits": ring_bits, "clip_value": min(units / 256, 1e6)}, "strategy": {"max_weight": 1}}
    if ring_bits == 32:
        terms["secure"]["clip_value"] = units / 2**16
    run = world.start(**terms)
    masked_round(world, agents, [1.0, -2.5, 3.0, 0.25], [1, 1, 1, 1])
    assert agents[0].context().ring_bits == ring_bits
    assert np.all(world.model(run)["w"] == np.float32(0.4375))  # 1.75 / 4


@SLOW_ON_POSTGRES
def test_a_second_round_is_bounded_by_the_weights_of_the_first(world: World, agents: list[Agent]):
    """20 + 30 + 40 + 50 = 140 examples: 175 with a quarter of room, and 256 as a power of two."""
    run = world.start(rounds=3, secure={"on": True, "clip_value": 4.0})
    weights = [20, 30, 40, 50]
    masked_round(world, agents, [1.0] * 4, weights)
    coarse = world.model(run)["w"].copy()
    assert agents[0].context().total_weight == 0
    # four halves of a unit, and a unit is 4 * 65536 / (2^28 - 1), over 140 examples
    np.testing.assert_allclose(coarse, 1.0, atol=2 * 4 * 65536 / (2**28 - 1) / 140)
    masked_round(world, agents, [-1 / 3] * 4, weights)
    assert {a.context().total_weight for a in agents} == {256}
    # the same, and a unit is 4 * 256 / (2^31 - 5); and float32 holds the sum to 2^-24
    moved = world.model(run)["w"].astype(float) - coarse
    np.testing.assert_allclose(moved, -1 / 3, atol=2 * 4 * 256 / (2**31 - 5) / 140 + 2**-24)


@SLOW_ON_POSTGRES
def test_a_sum_that_outgrows_its_bound_fails_its_attempt_and_the_next_has_none(world: World, agents: list[Agent]):
    run = world.start(rounds=3, secure={"on": True, "clip_value": 4.0})
    masked_round(world, agents, [1.0] * 4, [10] * 4)
    masked_round(world, agents, [1.0] * 4, [100, 10, 10, 10])  # 130 of at most 64
    detail = world.store.runs.detail(run)
    assert detail.run.version == 1
    failed = [a for a in detail.attempts if a.round == 2] if hasattr(detail, "attempts") else []
    assert all("130, 64 were expected" in a.reason for a in failed if a.state == "failed")
    masked_round(world, agents, [1.0] * 4, [100, 10, 10, 10])
    assert agents[0].assignment.attempt == 2
    assert agents[0].context().total_weight == 0
    assert world.store.runs.detail(run).run.version == 2
    masked_round(world, agents, [1.0] * 4, [100, 10, 10, 10])
    assert agents[0].context().total_weight == 256


@SLOW_ON_POSTGRES
def test_a_fixed_point_that_is_too_coarse_is_warned_of(world: World, agents: list[Agent], caplog):
    """16 bits with the default bounds: a unit is 8 * 65536 / 4095 = 128, the mean a quarter."""
    for ring_bits, warned in ((16, True), (32, False)):
        caplog.clear()
        world.start(rounds=1, secure={"on": True, "ring_bits": ring_bits})
        masked_round(world, agents, [0.25] * 4, [1000] * 4)
        assert any("fixed point is coarse" in r.message for r in caplog.records) == warned
        masked_round(world, agents, [0.0] * 4, [0] * 4)


@SLOW_ON_POSTGRES
def test_the_bound_outlives_a_restart(world: World, agents: list[Agent]):
    run = world.start(rounds=2, secure={"on": True, "clip_value": 4.0})
    masked_round(world, agents, [1.0] * 4, [20] * 4)
    masked_up_to(world, agents, "advert")
    assert agents[0].context().total_weight == 128
    world.restart()
    assert world.store.rounds.load(Key(run, 2, 1)).total_weight == 128
    for agent in agents:
        agent.share()


@SLOW_ON_POSTGRES
def test_an_agent_that_does_not_know_the_bound_is_never_told_of_it(world: World, agents: list[Agent]):
    agents[2].knows = ()
    world.start(rounds=2, secure={"on": True, "clip_value": 4.0})
    for _ in range(2):
        masked_round(world, agents, [1.0] * 4, [20] * 4)
        assert "total_weight" not in agents[0].assignment.model_dump(mode="json")["secure"]


def test_the_last_version_is_evaluated_and_then_the_run_is_finished(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_round(world, agents, [1.0] * 4, [1] * 4)
    assert world.store.runs.detail(run).run.state == "running"
    masked_round(world, agents, [0.0] * 4, [0] * 4)
    detail = world.store.runs.detail(run)
    assert (detail.run.state, detail.run.round, detail.run.version) == ("finished", 1, 1)
    assert [r.kind for r in detail.rounds] == ["train", "evaluate"]
    assert [(e.by, e.subject) for e in world.store.audit.entries(what="run finished")] == [("coordinator", run)]


def test_updates_are_deleted_once_they_are_in_the_sum(world: World, agents: list[Agent]):
    world.start(**PLAIN)
    plain_round(world, agents, [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1])
    kept = [p for p in (world.folder / "blobs" / "sha256").rglob("*") if p.is_file()]
    assert len(kept) == 2  # versions 0 and 1


def test_a_client_that_vanishes_after_its_keys_does_not_lose_the_round(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_up_to(world, agents, "advert", "share")
    staying = agents[:3]  # four clients have a threshold of three
    for agent in staying:
        agent.upload_masked(2.0, 1)
    world.tick(seconds=11)
    for agent in staying:
        agent.agree()
    world.tick()
    for agent in staying:
        agent.reveal()
    world.tick()
    np.testing.assert_allclose(world.model(run)["w"], 2.0, atol=1e-6)
    first = world.store.runs.detail(run).rounds[0]
    assert {a.client: a.state for a in first.assignments} == {
        "a": "counted",
        "b": "counted",
        "c": "counted",
        "d": "dropped",
    }
    assert "not heard for 10 s" in first.assignments[3].reason


@SLOW_ON_POSTGRES
def test_with_fewer_than_the_threshold_the_attempt_fails_and_another_one_is_opened(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    world.tick()
    for agent in agents[:2]:
        agent.poll()
        agent.advert()
    world.tick(seconds=11)
    current = world.store.runs.detail(run).current
    assert current and (current.attempt, current.state) == (2, "selecting")
    for agent in agents:
        agent.poll()  # the two that were dropped are heard of again
    masked_round(world, agents, [1.0] * 4, [1] * 4)
    np.testing.assert_allclose(world.model(run)["w"], 1.0, atol=1e-6)


def test_a_dead_client_is_not_waited_for_twice(world: World, agents: list[Agent]):
    run = world.start(rounds=2, **PLAIN)
    world.tick()
    for agent in agents[:3]:
        agent.poll()
        agent.upload_plain(1.0, 1)
    world.tick(seconds=11)
    assert world.store.runs.detail(run).run.round == 1
    for agent in agents[:3]:
        agent.poll()
    world.tick()
    second = world.store.runs.detail(run).current
    assert second and [a.client for a in second.assignments] == ["a", "b", "c"]


def test_the_run_fails_with_a_reason_after_the_last_attempt(world: World, agents: list[Agent]):
    run = world.start(cohort={"min": 4, "patience_s": 10, "attempts": 2}, **PLAIN)
    for _ in range(2):
        for agent in agents:
            agent.poll()
        world.tick()
        world.tick(seconds=11)
    view = world.store.runs.detail(run).run
    assert (view.state, view.reason) == ("failed", "0 clients left while collecting, 4 needed")
    (entry,) = world.store.audit.entries(what="run failed")
    assert (entry.by, entry.subject, entry.details) == ("coordinator", run, {"reason": view.reason})
    assert not world.store.rounds.open()


def test_a_coordinator_that_restarts_anywhere_ends_with_the_same_model(tmp_path: Path):
    models = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        world = World(folder)
        agents = [world.agent(name) for name in ("a", "b", "c")]
        run = world.start(rounds=2, **PLAIN)
        for value in (0.1, 0.7):
            world.tick()
            for agent, weight in zip(agents, (1, 2, 3), strict=True):
                if restarts:
                    world.restart()
                agent.poll()
                agent.upload_plain(value * weight, weight)
            if restarts:
                world.restart()
            world.tick()
        models.append(world.model(run)["w"].tobytes())
    assert models[0] == models[1]


def test_a_masked_round_survives_restarts_of_the_coordinator(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    world.tick()
    stages = ["poll", "advert", "share"]
    for stage in stages:
        for agent in agents:
            getattr(agent, stage)()
            world.restart()
        world.tick()
    for agent in agents:
        agent.upload_masked(1.5, 2)
        world.restart()
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
            world.restart()
    world.tick()
    np.testing.assert_allclose(world.model(run)["w"], 1.5, atol=1e-6)


def test_a_restarted_agent_gets_its_plain_assignment_again_and_the_older_holder_is_refused(
    world: World, agents: list[Agent]
):
    world.start(**PLAIN)
    world.tick()
    agent = agents[0]
    first = agent.poll()
    again = agent.poll()
    assert first and again and again.id == first.id and again.fence == first.fence + 1
    step = world.conversation.step("a", first.id, first.fence, "")
    assert step and step.kind == StepKind.GONE


def test_a_restarted_agent_is_dropped_from_a_masked_round(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    world.tick()
    for agent in agents:
        agent.poll()
        agent.advert()
    assert agents[3].poll() is None  # it has lost the secrets behind its advert
    world.tick()
    current = world.store.runs.detail(run).current
    assert current and current.state == "shares"
    assert "restarted" in current.assignments[3].reason


def test_an_hour_of_downtime_drops_nobody(world: World, agents: list[Agent]):
    run = world.start(**MASKED)
    masked_up_to(world, agents, "advert")
    world.now += 3600
    world.restart()
    world.tick()
    for agent in agents:
        agent.share()
    world.tick()
    current = world.store.runs.detail(run).current
    assert current and (current.attempt, current.state) == (1, "collecting")


class Slow:
    """A sum that is never done: the round stays frozen."""

    def submit(self, attempt: Attempt, identities: Mapping[str, bytes]) -> Future[Outcome]:
        return Future()


def test_an_update_that_comes_after_the_freeze_is_refused_and_not_counted(world: World, agents: list[Agent]):
    run = world.start(**PLAIN)
    world.tick()
    for agent in agents:
        agent.poll()
    for agent in agents[:3]:
        agent.upload_plain(1.0, 1)
    world.conductor = Conductor(world.store, world.blobs, world.hub, Slow(), clock=lambda: world.now)
    key = Key(run, 1, 1)
    world.store.rounds.move(key, State.COLLECTING, State.AGGREGATING)  # frozen while one is still at work
    world.tick()
    assert world.state(run) == "aggregating"
    late = agents[3].assignment
    with pytest.raises(TooLate):
        agents[3].upload_plain(9.0, 1)
    with pytest.raises(TooLate):  # not even past every other check
        world.store.assignments.accept_update(late.id, late.fence, sha256="0" * 64, size=1, weight=1.0, metrics={})
    assert len(world.store.rounds.load(key).uploaded) == 3


def test_a_result_is_published_once(world: World, agents: list[Agent]):
    run = world.start(**PLAIN)
    plain_round(world, agents, [1.0] * 4, [1] * 4)
    version = world.store.runs.versions(run)[0]
    again = Outcome(sha256=version.sha256, bytes=1, optimizer=None, metrics={}, facts={}, manifest="{}")
    assert world.store.rounds.publish(Key(run, 1, 1), version.sha256, ["a"], again) is False
    assert [v.n for v in world.store.runs.versions(run)] == [1, 0]
    assert len(world.store.rounds.open()) == 1


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_a_poll_that_the_network_repeats_is_handed_nothing(world: World, agents: list[Agent], secure: bool):
    world.start(**(MASKED if secure else PLAIN))
    world.tick()
    first = world.conversation.work("a", (), ("3f2a9c01b7d4e6f8", 7)).assignment
    assert first is not None
    assert world.conversation.work("a", (), ("3f2a9c01b7d4e6f8", 7)).assignment is None  # the same request again
    assert world.conversation.work("a", (), ("3f2a9c01b7d4e6f8", 6)).assignment is None  # and one from before it
    again = world.conversation.work("a", (), ("3f2a9c01b7d4e6f8", 8)).assignment  # its answer was lost: it asks anew
    assert again is not None and again.fence == first.fence + 1
    anew = world.conversation.work("a", (), ("00000000ffffffff", 1)).assignment  # the agent was started again
    assert anew is not None and anew.fence == again.fence + 1


def test_a_round_of_narrow_updates_makes_the_mean_of_what_they_carry(world: World, agents: list[Agent]):
    run = world.start(**PLAIN, train={"wire": "bf16"})
    world.tick()
    for agent in agents:
        assert agent.poll() is not None
        wire = MODEL.update("bf16")
        body = b"".join(np.full(t.numel, 0x3F80, "<u2").tobytes() for t in wire.tensors)  # the bits of 1.0
        agent.send(wire.header() + body, weight=1, metrics={})
    world.tick()
    assert np.all(world.model(run)["w"] == np.float32(1.0))
