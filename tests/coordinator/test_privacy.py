"""Differential privacy between organizations, through the coordinator: what is refused, published, and spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from murmur.clients.updates import clip_update, float_pieces, private_words
from murmur.coordinator.conductor import Conductor
from murmur.coordinator.people import People
from murmur.coordinator.registry import lineage
from murmur.coordinator.rounds import State
from murmur.coordinator.service import Service
from murmur.coordinator.store.attempts import Key
from murmur.privacy.dp.accounting import Event, epsilon
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.messages import Failure, Total
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.tensors import Layout, TensorSpec, masked_layout, read_layout, write_file
from murmur.protocol.views import PrivacyView

from .harness import MODEL, Agent, Inline, World, masked_up_to, plain_file

QUIET = 1e-4  # a noise multiplier under which a sum can be checked by hand
D = 8  # elements of the model
WIDE = Layout((TensorSpec("w", "F32", (4000,)),))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def settings(
    *, secure: bool = False, cohort: dict[str, Any] | None = None, rounds: int = 1, **dp: Any
) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "cohort": {"min": 3, "size": 3, "patience_s": 10} | (cohort or {}),
        "strategy": {"weighting": "uniform"},
        "secure": {"on": secure},
        "dp": {"mode": "central", "noise_multiplier": QUIET, "clip_norm": 1.0} | dp,
    }


def agents_of(world: World, n: int = 3) -> list[Agent]:
    return [world.agent(f"c{i}") for i in range(n)]


def clipped_file(agent: Agent, value: float) -> bytes:
    """A plain update of `value` everywhere as a real agent would send it."""
    layout = read_layout(agent.world.blobs.path(agent.assignment.model))
    trained, sent = agent.world.folder / "trained", agent.world.folder / "sent"
    trained.write_bytes(plain_file(layout.update(), value))
    clip_update(trained, layout, agent.assignment.dp.clip_norm, sent)
    return sent.read_bytes()


def upload(agent: Agent, value: float) -> None:
    agent.send(clipped_file(agent, value), weight=1.0, metrics={"loss": Total(sum=2.0, count=1.0)})


def upload_private(agent: Agent, value: float) -> None:
    """Mask an update of `value` everywhere as a real agent would."""
    step = agent.step()
    assert agent.session and step
    agent.session.open(step.body)
    context, layout = agent.context(), read_layout(agent.world.blobs.path(agent.assignment.model))
    trained = agent.world.folder / "trained"
    trained.write_bytes(plain_file(layout.update(), value))
    assert agent.assignment.secure
    encoder, bit = private_words(trained, agent.assignment, layout, agent.assignment.secure)
    aux = agent.block(layout).encode(weight=1, clipped=bit, metrics={"loss": (2.0, 1.0)})
    masked = agent.session.mask(float_pieces(trained, layout), weight=1, aux=aux, encoder=encoder)
    agent.send(masked_layout(context.dim, context.aux).header() + b"".join(bytes(c) for c in masked))


def plain_round(world: World, agents: list[Agent], values: list[float]) -> None:
    world.tick()
    for agent, value in zip(agents, values, strict=True):
        assert agent.poll() is not None, agent.name
        upload(agent, value)
    world.tick()


def masked_uploaded(world: World, agents: list[Agent], values: list[float]) -> None:
    masked_up_to(world, agents, "advert", "share")
    for agent, value in zip(agents, values, strict=True):
        upload_private(agent, value)
    world.tick()


def say(world: World, agents: list[Agent], stage: str) -> None:
    for agent in agents:
        getattr(agent, stage)()
    world.conductor.tick()


def masked_round(world: World, agents: list[Agent], values: list[float]) -> None:
    masked_uploaded(world, agents, values)
    say(world, agents, "agree")
    say(world, agents, "reveal")
    world.tick()


def spent(world: World, run: str) -> list[Event]:
    return world.store.ledger.of(run)


def whole(model: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate([a.reshape(-1) for a in model.values()])


@pytest.mark.parametrize("secure", [False, True])
def test_the_mean_is_over_a_fixed_number_and_every_update_is_clipped(world: World, secure: bool):
    agents = agents_of(world, 4)
    run = world.start(**settings(secure=secure, cohort={"size": 4}))
    # 0.1 everywhere has norm 0.28; 10 everywhere is clipped to norm 1, which is 1 / sqrt(8) everywhere; c3 drops out
    values = [0.1, 0.2, 10.0]
    if secure:
        masked_up_to(world, agents, "advert", "share")
        for agent, value in zip(agents, values, strict=False):
            upload_private(agent, value)
        agents[3].world.conversation.fail("c3", agents[3].assignment.id, failure(agents[3]))
        world.tick()
        say(world, agents[:3], "agree")
        say(world, agents[:3], "reveal")
    else:
        world.tick()
        for agent, value in zip(agents, values, strict=False):
            agent.poll()
            upload(agent, value)
        agents[3].poll()
        world.conversation.fail("c3", agents[3].assignment.id, failure(agents[3]))
    world.tick()
    assert whole(world.model(run)) == pytest.approx((0.1 + 0.2 + 1 / np.sqrt(D)) / 4, abs=10 * QUIET / 4)


def failure(agent: Agent) -> Failure:
    return Failure(fence=agent.assignment.fence, code="task_error", detail="broken")


def test_central_noise_is_in_what_is_published(world: World):
    agents = agents_of(world)
    run = start(world, WIDE, **settings(noise_multiplier=1.5, clip_norm=2.0))
    plain_round(world, agents, [0.0, 0.0, 0.0])
    # z * clip_norm / size = 1, and 5 deviations of a deviation over 4,000 values
    assert float(np.std(whole(world.model(run)))) == pytest.approx(1.0, abs=5 / np.sqrt(8000))


def test_an_update_above_the_bound_is_refused_with_the_numbers(world: World):
    agents = agents_of(world)
    run = world.start(**settings())
    world.tick()
    assert agents[0].poll() is not None
    with pytest.raises(BadUpdate, match=r"norm is 2\.82843, this round's dp\.clip_norm is 1"):
        agents[0].upload_plain(1.0, 1.0)
    assert world.store.runs.detail(run).rounds[0].assignments[0].state == "failed"


@pytest.mark.parametrize("mode", ["distributed", "central"])
def test_masked_noise_is_added_by_the_clients_or_by_the_coordinator_and_never_by_both(world: World, mode: str):
    agents = agents_of(world)
    run = start(world, WIDE, **settings(secure=True, mode=mode, noise_multiplier=1.5, clip_norm=2.0))
    masked_round(world, agents, [0.0, 0.0, 0.0])
    assert float(np.std(whole(world.model(run)))) == pytest.approx(1.0, abs=5 / np.sqrt(8000))


def test_a_plain_sum_is_spent_once_even_if_it_is_taken_twice(world: World):
    agents = agents_of(world)
    run = world.start(**settings(noise_multiplier=2.0))
    world.tick()
    for agent in agents:
        agent.poll()
        upload(agent, 0.1)
    assert spent(world, run) == []
    world.conductor.tick()  # the sum is under way
    assert world.state(run) == State.AGGREGATING and spent(world, run) == [Event(noise_multiplier=2.0)]
    world.restart()
    world.tick()
    assert len(world.store.runs.versions(run)) == 2 and spent(world, run) == [Event(noise_multiplier=2.0)]


def test_a_masked_sum_is_spent_with_the_question_that_reveals_it(world: World):
    agents = agents_of(world)
    run = world.start(**settings(secure=True, mode="distributed", noise_multiplier=2.0))
    masked_uploaded(world, agents, [0.1, 0.1, 0.1])
    assert world.state(run) == State.AGREEING and spent(world, run) == []
    say(world, agents, "agree")
    assert world.state(run) == State.REVEALING and spent(world, run) == [Event(noise_multiplier=2.0)]
    world.restart()
    say(world, agents, "reveal")
    world.tick()
    assert len(world.store.runs.versions(run)) == 2 and spent(world, run) == [Event(noise_multiplier=2.0)]


def test_an_attempt_that_fails_before_the_reveal_costs_nothing_and_one_after_it_costs_full(world: World):
    agents = agents_of(world)
    run = world.start(**settings(secure=True, mode="distributed", noise_multiplier=4.0))
    masked_uploaded(world, agents, [0.1, 0.1, 0.1])
    world.tick(11)  # nobody agrees: the attempt fails
    assert spent(world, run) == []
    for agent in agents:
        agent.poll()
    masked_uploaded(world, agents, [0.1, 0.1, 0.1])
    say(world, agents, "agree")
    world.tick(11)  # nobody reveals
    assert world.store.rounds.head_of(Key(run, 1, 3)).state == State.SELECTING
    assert spent(world, run) == [Event(noise_multiplier=4.0)]


def test_a_sum_beyond_the_budget_ends_the_run_in_words(world: World):
    agents = agents_of(world)
    one = Event(noise_multiplier=4.0)
    budget = epsilon([one], 1e-5, unit="client").value + 0.01
    run = world.start(**settings(secure=True, mode="distributed", noise_multiplier=4.0, budget=budget))
    masked_uploaded(world, agents, [0.1, 0.1, 0.1])
    say(world, agents, "agree")
    world.tick(11)  # spent, and nobody reveals
    for agent in agents:
        agent.poll()
    masked_uploaded(world, agents, [0.1, 0.1, 0.1])
    say(world, agents, "agree")
    shown = world.store.runs.detail(run).run
    assert shown.state == "failed" and "privacy budget is spent" in shown.reason and f"{budget:g}" in shown.reason
    assert spent(world, run) == [one]  # and nobody was asked to reveal
    assert agents[0].step() is None or agents[0].seen != "reveal"


def test_what_is_shown_while_it_goes_on_and_when_it_has_ended(world: World):
    agents = agents_of(world)
    run = world.start(**settings(rounds=2, noise_multiplier=2.0, budget=10.0))
    assert world.store.runs.detail(run).run.privacy is None
    plain_round(world, agents, [0.1, 0.1, 0.1])
    shown = world.store.runs.detail(run).run.privacy
    assert shown and (shown.accountant, shown.unit, shown.delta, shown.spent) == ("rdp", "client", 1e-5, 1)
    assert shown.value == epsilon([Event(noise_multiplier=2.0)], 1e-5, unit="client").value
    assert "With 3 clients" in shown.meaning and any("trusted" in said for said in shown.assumptions)
    world.store.runs.stop(run, by="admin")
    world.tick()
    ended = world.store.runs.detail(run).run.privacy
    assert ended and ended.accountant == "pld" and ended.value and shown.value and ended.value < shown.value
    assert ended.text == f"epsilon {ended.value:.3g} at delta 1e-05, client-level, by PLD, budget 10"
    events = [e.data for e in world.store.events.since(0, run, 100) if e.kind == "privacy"]
    assert [e["accountant"] for e in events] == ["rdp", "pld"]
    assert json.loads(world.store.runs.detail(run).model_dump_json())["run"]["privacy"]["unit"] == "client"


@pytest.mark.parametrize("mode", ["plain", "masked", "distributed"])
def test_an_adaptive_bound_follows_the_norms_and_outlives_a_restart(world: World, mode: str):
    agents = agents_of(world)
    noise = {"noise_multiplier": QUIET, "bit_noise": 1e-3} if mode != "distributed" else {"bit_noise": 1e-3}
    dp = {"mode": "central" if mode != "distributed" else "distributed", "adaptive": True, **noise, "clip_lr": 0.5}
    dp |= {"noise_multiplier": 1e-3} if mode == "distributed" else {}
    run = world.start(**settings(secure=mode != "plain", rounds=3, quantile=0.5, **dp))
    go = plain_round if mode == "plain" else masked_round
    go(world, agents, [10.0, 10.0, 10.0])  # all are clipped: b = 0
    world.restart()
    expected = np.exp(0.5 * 0.5)  # C * exp(-lr (0 - 1/2))
    assert world.store.rounds.head_of(Key(run, 2, 1)).dp.clip_norm == pytest.approx(expected, rel=1e-2)
    go(world, agents, [0.1, 0.1, 10.0])  # two of three are not
    assert agents[0].assignment.dp.clip_norm == pytest.approx(expected, rel=1e-2)
    following = expected * np.exp(-0.5 * (2 / 3 - 0.5))
    assert world.store.rounds.head_of(Key(run, 3, 1)).dp.clip_norm == pytest.approx(following, rel=1e-2)
    assert len(spent(world, run)) == 2  # the count is paid for by the update's noise


def test_runs_without_privacy_say_nothing_of_it(world: World):
    agents = agents_of(world)
    world.start(secure={"on": False}, dp={"delta": 1e-7})
    world.tick()
    work = agents[0].poll()
    assert work is not None and "dp" not in work.model_dump(mode="json")  # agents of 0.1.0 would refuse it


def service(world: World) -> Service:
    people = People(world.store, session_s=60)
    return Service(world.store, world.blobs, world.hub, people, invitation_s=60)


def start(world: World, layout: Layout = MODEL, **recipe: Any) -> str:
    with world.blobs.new() as path:
        write_file(path, {t.name: np.zeros(t.shape, np.float32) for t in layout.tensors}, layout)
        sha256 = world.blobs.adopt(path)
    return service(world).start_run(parse_recipe({"name": "t", "task": "t"} | recipe), sha256, by="admin")


def test_a_run_that_its_budget_does_not_cover_cannot_start(world: World):
    with pytest.raises(OperatorError, match=r"20 rounds .* epsilon of [\d.]+ .*budget is 3: \d+ rounds would fit"):
        start(world, **settings(rounds=20, noise_multiplier=4.0, budget=3.0))
    with pytest.raises(OperatorError) as refused:
        start(world, **settings(rounds=20, noise_multiplier=4.0, budget=3.0))
    fits = int(refused.value.detail.split(": ")[1].split()[0])
    start(world, **settings(rounds=fits, noise_multiplier=4.0, budget=3.0))
    with pytest.raises(OperatorError):
        start(world, **settings(rounds=fits + 1, noise_multiplier=4.0, budget=3.0))


def test_a_model_with_running_statistics_cannot_be_protected(world: World):
    buffers = Layout((*MODEL.tensors, TensorSpec("bn.running_mean", "F32", (3,))), frozenset({"bn.running_mean"}))
    with pytest.raises(OperatorError, match=r"bn\.running_mean"):
        start(world, buffers, **settings(noise_multiplier=1.0))
    start(world, buffers)  # without dp it may


class Unlucky(Inline):
    """Its process dies over the first ledger; the second one it cannot add up."""

    def __init__(self, world: World) -> None:
        super().__init__(world.blobs)
        self.asked = 0

    def account(self, recipe: Recipe, spent: Sequence[Event]) -> Future[PrivacyView]:
        self.asked += 1
        done: Future[PrivacyView] = Future()
        done.set_exception(BrokenProcessPool("killed") if self.asked == 1 else OperatorError("no such accounting"))
        return done


def test_a_ledger_that_cannot_be_added_up_stops_nothing(world: World):
    agents = agents_of(world)
    unlucky = Unlucky(world)
    world.conductor = Conductor(world.store, world.blobs, world.hub, unlucky, clock=lambda: world.now)
    first, second = world.start(**settings(noise_multiplier=2.0)), world.start(secure={"on": False})
    plain_round(world, agents, [0.1, 0.1, 0.1])
    world.store.runs.stop(first, by="admin")
    for _ in range(4):
        world.tick()
    assert unlucky.asked == 2
    shown = world.store.runs.detail(first).run.privacy
    assert shown and shown.accountant == "rdp"
    assert world.state(second) == State.COLLECTING


def test_a_versions_lineage_has_what_was_spent_by_then_and_the_last_one_the_runs_total(world: World):
    agents = agents_of(world)
    run = world.start(**settings(noise_multiplier=2.0, rounds=3))
    for _ in range(3):
        plain_round(world, agents, [0.1] * 3)
    for agent in agents:  # the final evaluation
        assert agent.poll() is not None
        agent.upload_plain(0.0, 1.0)
    world.tick()
    events = world.store.ledger.of(run)
    total = world.store.runs.detail(run).run.privacy
    found = [lineage(world.store, run, n).privacy for n in range(4)]
    assert found[0] is None and total is not None and total.accountant == "pld"
    for n in (1, 2):
        told = found[n]
        assert told is not None and (told.accountant, told.spent, told.assumptions) == ("rdp", n, total.assumptions)
        assert told.value == pytest.approx(epsilon(events[:n], total.delta, unit="client").value)
    assert found[3] == total
