"""Masked rounds in groups: sums of groups under a robust rule, groups that stay, and groups that are lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from murmur.coordinator.rounds import State
from murmur.coordinator.store.attempts import Attempt, Key
from murmur.coordinator.store.tables import assignment
from murmur.protocol.errors import NotAllowed
from murmur.protocol.messages import AnswerKind, Failure, StepKind

from .harness import Agent, World, masked_up_to

NAMES = [f"c{k:02}" for k in range(15)]
UNIT = 3 * 4.0 * 10 / (2**28 - 1)  # of the fixed point in a group of three, a little more than it is


@pytest.fixture
def world(tmp_path: Path) -> Any:
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def agents(world: World) -> list[Agent]:
    return [world.agent(name) for name in NAMES]


def start(world: World, combine: str = "median", **changes: Any) -> str:
    settings = {
        "cohort": {"min": 15, "patience_s": 10},
        "secure": {"groups": 5, "clip_value": 4.0},
        "strategy": {"combine": combine, "max_weight": 10},
    }
    return world.start(**(settings | changes))


def groups(world: World, run: str, round: int = 1) -> dict[str, int]:
    return {p.client: p.group for p in world.store.rounds.load(Key(run, round, 1)).parts}


def members(world: World, run: str, agents: list[Agent], n: int) -> list[Agent]:
    placed = groups(world, run)
    return [a for a in agents if placed[a.name] == n]


def value_of(agent: Agent) -> tuple[float, int]:
    """Each agent's delta and weight: its number tells both."""
    k = int(agent.name[1:])
    return k / 8, 1 + k % 4


def finish(
    world: World, agents: list[Agent], *, poisoned: tuple[str, ...] = (), last: Callable[[], Any] = lambda: None
) -> None:
    """Upload, agree and reveal with those who are given; `last` comes before the version is made."""
    for agent in agents:
        value, weight = value_of(agent)
        agent.upload_masked(*((-4.0, 10) if agent.name in poisoned else (value, weight)))
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
    last()
    world.tick()


def means(placed: dict[str, int], agents: list[Agent]) -> dict[int, float]:
    """The plain computation of each group's weighted mean."""
    found: dict[int, float] = {}
    for n in sorted({placed[a.name] for a in agents}):
        pairs = [value_of(a) for a in agents if placed[a.name] == n]
        found[n] = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
    return found


def states(world: World, run: str) -> dict[str, str]:
    return {a.client: a.state for a in world.store.runs.detail(run).rounds[0].assignments}


@pytest.mark.parametrize("combine", ["median", "trimmed_mean"])
def test_a_grouped_round_is_the_rule_over_the_plain_means_of_the_same_groups(
    world: World, agents: list[Agent], combine: str
):
    run = start(world, combine)
    masked_up_to(world, agents, "advert", "share")
    finish(world, agents)
    placed = groups(world, run)
    assert sorted(Counter(placed.values()).values()) == [3] * 5
    ordered = sorted(means(placed, agents).values())
    expected = ordered[2] if combine == "median" else sum(ordered[1:4]) / 3  # a fifth of five is one at each end
    np.testing.assert_allclose(world.model(run)["w"], expected, atol=3 * UNIT + 2**-23)
    assert world.store.runs.versions(run)[0].contributors == 15
    assert world.store.runs.detail(run).metrics[0].count == sum(value_of(a)[1] for a in agents)


def test_each_group_has_a_cohort_a_threshold_and_dropouts_of_its_own(world: World, agents: list[Agent]):
    agents += [world.agent("c15"), world.agent("c16")]
    run = start(world)
    masked_up_to(world, agents)
    placed = groups(world, run)
    assert sorted(Counter(placed.values()).values()) == [3, 3, 3, 4, 4]
    for agent in agents:
        terms = agent.assignment.secure
        assert terms and set(terms.cohort) == {name for name, n in placed.items() if n == placed[agent.name]}
        assert (terms.threshold, terms.min_clients) == (3, 3)
    large = next(n for n, size in Counter(placed.values()).items() if size == 4)
    gone = members(world, run, agents, large)[0]
    there = [a for a in agents if a is not gone]
    for stage in ("advert", "share"):
        for agent in there:
            getattr(agent, stage)()
        world.tick(seconds=11)  # the fourth of its group: three are enough
    finish(world, there)
    assert set(world.store.runs.versions(run)[0].who) == {a.name for a in there}


def test_one_poisoned_client_moves_the_median_within_the_honest_range_and_ruins_the_mean(
    world: World, agents: list[Agent]
):
    run = start(world)
    masked_up_to(world, agents, "advert", "share")
    finish(world, agents, poisoned=("c14",))
    placed = groups(world, run)
    honest = [m for n, m in means(placed, agents).items() if n != placed["c14"]]
    found = float(world.model(run)["w"][0, 0])
    assert min(honest) - UNIT <= found <= max(honest) + UNIT
    everybody = [value_of(a) for a in agents[:-1]]
    mean = (sum(v * w for v, w in everybody) - 4.0 * 10) / (sum(w for _, w in everybody) + 10)
    assert mean < min(honest) - 0.5  # what the same client would have made of one sum


@pytest.mark.parametrize("stage", ["advert", "share", "upload_masked", "agree", "reveal"])
def test_a_group_that_loses_a_member_is_dropped_whole_and_the_others_go_on(
    world: World, agents: list[Agent], stage: str
):
    run = start(world)
    masked_up_to(world, agents)
    placed = groups(world, run)
    lost = members(world, run, agents, 2)
    alive = list(agents)
    for step in ("advert", "share", "upload_masked", "agree", "reveal"):
        for agent in alive:
            if step == stage and agent is lost[0]:
                continue
            getattr(agent, step)(*(value_of(agent) if step == "upload_masked" else ()))
        if step == stage:
            world.tick(seconds=11)
            alive = [a for a in agents if a not in lost]
        world.tick()
    left = {n: m for n, m in means(placed, agents).items() if n != 2}
    middle = sorted(left.values())[1:3]
    np.testing.assert_allclose(world.model(run)["w"], sum(middle) / 2, atol=3 * UNIT + 2**-23)
    found = {a.client: (a.state, a.reason) for a in world.store.runs.detail(run).rounds[0].assignments}
    assert {state for name, (state, _) in found.items() if placed[name] == 2} == {"dropped"}
    assert "not heard for 10 s" in found[lost[0].name][1]
    assert found[lost[1].name][1].startswith("its group 2 was dropped: 2 clients left while")
    version = world.store.runs.versions(run)[0]
    assert set(version.who) == {name for name, n in placed.items() if n != 2}
    assert {m.client for m in version.missing} == {a.name for a in lost}
    step = lost[1].step()
    assert step and step.kind == StepKind.GONE and "its group 2 was dropped" in step.reason


def test_no_sum_of_fewer_than_three_is_opened(world: World, agents: list[Agent], monkeypatch: pytest.MonkeyPatch):
    from murmur.coordinator import summing

    opened: list[int] = []
    unmask = summing._unmask  # pyright: ignore[reportPrivateUsage]

    def counting(attempt: Attempt, *rest: Any) -> Any:
        found = unmask(attempt, *rest)
        opened.append(found.totals.clients)
        return found

    monkeypatch.setattr(summing, "_unmask", counting)
    run = start(world)
    masked_up_to(world, agents, "advert", "share")
    lost = members(world, run, agents, 5)
    for agent in agents:
        if agent is not lost[0]:
            agent.upload_masked(1.0, 1)
    world.conversation.fail(lost[0].name, lost[0].assignment.id, Failure(fence=1, code="oom", detail="out of memory"))
    world.tick()
    assert set(states(world, run).values()) == {"uploaded", "dropped", "failed"}
    late = lost[1]  # it has uploaded, and is asked for nothing that would open two updates
    step = late.step()
    assert step and step.kind == StepKind.GONE
    with pytest.raises(NotAllowed, match="only a client whose upload is in the sum"):
        late.say(AnswerKind.AGREE, "{}")
    for stage in ("agree", "reveal"):
        for agent in agents:
            if agent not in lost:
                getattr(agent, stage)()
        world.tick()
    assert opened == [3] * 4
    assert states(world, run)[late.name] == "dropped"


def test_with_too_few_groups_the_attempt_fails_in_words_and_another_one_is_opened(world: World, agents: list[Agent]):
    run = start(world)
    masked_up_to(world, agents)
    lost = [members(world, run, agents, n)[0] for n in (1, 2, 3)]
    for agent in agents:
        if agent not in lost:
            agent.advert()
    world.tick(seconds=11)
    failed = world.store.rounds.load(Key(run, 1, 1))
    assert failed.state == "failed"
    current = world.store.runs.detail(run).current
    assert current and (current.attempt, current.state) == (2, "selecting")
    assert current.reason == "12 clients are online, 15 are needed"  # those who were there are still there
    events = [e.data for e in world.store.events.since(0, run, 1000) if e.kind == "phase"]
    assert any(e.get("reason") == "2 groups left while keys, 3 needed" for e in events)
    for agent in agents:
        agent.poll()
    world.tick()
    assert world.state(run) == "keys"


def goes_away(world: World, agents: list[Agent], gone: Agent) -> None:
    """Let a round's last answers be in, one client be silent for longer than a sign of life lasts, and go on."""
    world.now += 100
    for agent in agents:
        if agent is not gone:
            agent.poll(busy=True)


def test_groups_stay_for_the_run_and_a_newcomer_goes_where_one_is_missing(world: World, agents: list[Agent]):
    run = start(world, rounds=3)
    masked_up_to(world, agents, "advert", "share")
    first, gone = groups(world, run), agents[4]
    finish(world, agents, last=lambda: (goes_away(world, agents, gone), agents.append(world.agent("c15"))))
    agents.remove(gone)
    world.restart()
    second = groups(world, run, 2)
    assert second == {name: n for name, n in first.items() if name != gone.name} | {"c15": first[gone.name]}
    masked_up_to(world, agents, "advert", "share")
    finish(world, agents, last=gone.poll)
    assert groups(world, run, 3) == first | {"c15": first[gone.name]}


def test_a_group_with_two_online_sits_out_while_the_others_begin(world: World, agents: list[Agent]):
    agents.append(world.agent("c15"))
    run = start(world, rounds=2)
    masked_up_to(world, agents, "advert", "share")
    first = groups(world, run)
    small = next(n for n, size in Counter(first.values()).items() if size == 3)
    gone = members(world, run, agents, small)[0]
    finish(world, agents, last=lambda: goes_away(world, agents, gone))
    assert groups(world, run, 2) == {name: n for name, n in first.items() if n != small}


def test_a_round_waits_in_words_while_too_few_groups_have_three_online(world: World, agents: list[Agent]):
    run = start(world, rounds=2)
    masked_up_to(world, agents, "advert", "share")
    placed = groups(world, run)
    with world.store.db.write() as t:  # ten of fifteen are of one group, as after years of coming and going
        moved = [name for name, n in placed.items() if n not in (1, 2)]
        t.execute(update(assignment).where(assignment.c.client.in_(moved)).values(group_n=3))
    finish_nobody = world.store.rounds.fail(Key(run, 1, 1), State.COLLECTING, "for this test", retry=True)
    assert finish_nobody
    gone = next(name for name, n in placed.items() if n == 1)
    world.agent("c15")  # goes to the empty group 4 and leaves 5 empty
    world.now += 100
    for agent in agents:
        if agent.name != gone:
            agent.poll()
    world.agent("c16")
    world.tick()
    current = world.store.runs.detail(run).current
    assert current and current.reason == "2 of 5 groups have 3 clients online, 3 groups are needed"


def test_a_masked_grouped_round_survives_restarts_of_the_coordinator(world: World, agents: list[Agent]):
    run = start(world)
    world.tick()
    for stage in ("poll", "advert", "share"):
        for agent in agents:
            getattr(agent, stage)()
            if agent.name in ("c03", "c11"):
                world.restart()
        world.tick()
    for agent in agents:
        agent.upload_masked(*value_of(agent))
        if agent.name == "c07":
            world.restart()
    for stage in ("agree", "reveal"):
        world.tick()
        world.restart()
        for agent in agents:
            getattr(agent, stage)()
            if agent.name == "c02":
                world.restart()
    world.tick()
    expected = sorted(means(groups(world, run), agents).values())[2]
    np.testing.assert_allclose(world.model(run)["w"], expected, atol=3 * UNIT + 2**-23)


def test_a_group_whose_sum_is_spoiled_is_left_out_of_the_version(
    world: World, agents: list[Agent], monkeypatch: pytest.MonkeyPatch
):
    run = start(world)
    masked_up_to(world, agents, "advert", "share")
    liar = members(world, run, agents, 3)[1]
    encode = type(liar.block(_layout(world, liar))).encode

    def counts_twice(block: Any, **told: Any) -> Any:
        return encode(block, **told) * np.uint64(2)

    for agent in agents:
        with monkeypatch.context() as patch:
            if agent is liar:
                patch.setattr("murmur.privacy.auxiliary.Block.encode", counts_twice)
            agent.upload_masked(*value_of(agent))
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
    world.tick()
    placed = groups(world, run)
    version = world.store.runs.versions(run)[0]
    assert (version.n, set(version.who)) == (1, {name for name, n in placed.items() if n != 3})
    reasons = {m.reason for m in version.missing}
    assert reasons == {
        "its group 3 was left out of the sum: the unmasked sum counts 4 clients, 3 uploaded: it is not theirs"
    }
    middle = sorted(m for n, m in means(placed, agents).items() if n != 3)[1:3]
    np.testing.assert_allclose(world.model(run)["w"], sum(middle) / 2, atol=3 * UNIT + 2**-23)


def _layout(world: World, agent: Agent) -> Any:
    from murmur.protocol.tensors import read_layout

    return read_layout(world.blobs.path(agent.assignment.model))


@pytest.mark.parametrize("combine", ["median", "trimmed_mean", "krum"])
def test_a_plain_round_under_a_rule_survives_a_poisoned_update(world: World, combine: str):
    agents = [world.agent(name) for name in NAMES[:5]]
    strategy = {"combine": combine, "byzantine": 1}
    run = world.start(secure={"on": False}, strategy=strategy, cohort={"min": 5, "patience_s": 10})
    world.tick()
    for agent, value in zip(agents, (1.0, 1.25, 1.5, 1.75, -1e9), strict=True):
        agent.poll()
        agent.upload_plain(value, 1)
    world.tick()
    found = float(world.model(run)["w"][0, 0])
    # of five: the third; the mean of the second to the fourth; the one nearest to its two nearest, the first of two
    assert found == pytest.approx({"median": 1.25, "trimmed_mean": (1.0 + 1.25 + 1.5) / 3, "krum": 1.25}[combine])
