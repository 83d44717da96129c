"""Groups and robust rules in the simulator: the bits of a coordinator, and poisoned clients that change little."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tasks import Line, Normed, lines

from murmur.aggregation.strategies import fedadam, fedavg, median, trimmed_mean
from murmur.clients.updates import float_pieces, weighted_integers
from murmur.protocol.errors import OperatorError
from murmur.protocol.messages import StepKind
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import map_file, masked_layout, read_layout
from murmur.simulation import History, rounds, sequential, simulate
from tests.coordinator.harness import Agent, World, masked_up_to

GROUPED = {"groups": 3}


def recipe(**changes: Any) -> Any:
    values: dict[str, Any] = {"name": "t", "task": "t", "rounds": 1, "cohort": {"min": 9}, "secure": GROUPED}
    values |= {"train": {"batch_size": 4, "lr": 0.1}, "strategy": {"combine": "median", "max_weight": 8}}
    return parse_recipe(values | changes)


def weights(history: History) -> np.ndarray[Any, Any]:
    return next(iter(load_file(history.model).values())).ravel()


@pytest.mark.parametrize("kind", [Line, Normed], ids=["floats", "integers too"])
@pytest.mark.parametrize("combine", ["median", "trimmed_mean"])
def test_a_grouped_round_has_the_bits_of_a_coordinators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Line], combine: str
) -> None:
    settled = recipe(strategy={"combine": combine, "max_weight": 8})
    given: dict[str, tuple[Path, Any]] = {}
    work = sequential.run_job

    def kept(task: Any, job: Any, **rest: Any) -> Any:
        result = work(task, job, **rest)
        if result.update is not None:
            given[job.client] = tmp_path / f"{job.client}.update", result
            shutil.copyfile(result.update, given[job.client][0])
        return result

    monkeypatch.setattr(sequential, "run_job", kept)
    history = simulate(lines(kind, 10), settled, secure=None, folder=tmp_path / "simulated")
    (tmp_path / "real").mkdir()
    world = World(tmp_path / "real")
    agents = [world.agent(name) for name in sorted(given)]
    with world.blobs.new() as path:
        shutil.copyfile(tmp_path / "simulated" / "version-0.safetensors", path)
        size, sha256 = path.stat().st_size, world.blobs.adopt(path)
    world.store.runs.start("run", settled, sha256=sha256, size=size, by="admin")
    masked_up_to(world, agents, "advert", "share")
    for agent in agents:
        upload(world, agent, *given[agent.name])
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
    world.tick()
    expected = map_file(history.model, read_layout(history.model))
    found = world.model("run")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
    world.store.close()


def upload(world: World, agent: Agent, path: Path, result: Any) -> None:
    """What the simulated client made, masked as a real one does."""
    step = agent.step()
    assert agent.session and step and step.kind == StepKind.INBOX
    agent.session.open(step.body)
    layout, context = read_layout(world.blobs.path(agent.assignment.model)), agent.context()
    weight = int(result.examples)
    integers = weighted_integers(path, layout, weight)
    aux = agent.block(layout).encode(weight=weight, clipped=0, metrics={}, integers=integers)
    words = agent.session.mask(float_pieces(path, layout), weight=weight, aux=aux)
    agent.send(masked_layout(context.dim, context.aux).header() + b"".join(bytes(w) for w in words))


class Liar(Line):
    """Trains away from what it sees."""

    def loss(self, output: Any, target: Any) -> Any:
        return -20 * super().loss(output, target) if output.requires_grad else super().loss(output, target)


def losses(strategy: Any, *, masked: bool) -> tuple[float, float]:
    """The honest clients' loss after four rounds, without a liar and with one among nine."""
    found: list[float] = []
    secure = GROUPED if masked else {"on": False}
    settled = recipe(rounds=4, strategy=strategy.model_dump(), secure=secure)
    for liars in (0, 1):
        clients = lines(Line, 9) | ({"site-3": lambda: Liar(3, 6)} if liars else {})
        history = simulate(clients, settled, secure=masked)
        w = weights(history).astype(np.float64)
        tasks = [make() for name, make in lines(Line, 9).items() if name != "site-3"]
        found.append(float(np.mean([np.mean((t.x @ w - t.y) ** 2) for t in tasks])))
    return found[0], found[1]


@pytest.mark.parametrize("strategy", [median(), trimmed_mean(0.2)], ids=["median", "trimmed mean"])
def test_a_liar_ruins_the_mean_and_moves_a_robust_rule_little(strategy: Any) -> None:
    clean, ruined = losses(fedavg(), masked=False)
    assert ruined > 10 * clean
    for masked in (False, True):  # every client by itself, and three groups of three
        clean, lied = losses(strategy, masked=masked)
        print("clean", clean, "lied", lied, "ruined", ruined)
        assert lied < 3 * clean < ruined / 3


def test_any_server_optimizer_follows_a_rule() -> None:
    with_adam = median(fedadam(0.05))
    assert (with_adam.combine, with_adam.server) == ("median", "Adam")
    history = simulate(lines(Line, 9), recipe(rounds=3, strategy=with_adam.model_dump()), secure=True)
    assert history.final["loss"] < history.versions[0]["loss"]


def test_groups_stay_over_the_rounds_and_a_smaller_cohort_is_spread_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[str, ...]] = []
    summed = rounds.Simulation._sum  # pyright: ignore[reportPrivateUsage]

    def seen(self: Any, n: int, cohort: tuple[str, ...], *rest: Any) -> Any:
        sums.append(cohort)
        return summed(self, n, cohort, *rest)

    monkeypatch.setattr(rounds.Simulation, "_sum", seen)  # pyright: ignore[reportPrivateUsage]
    simulate(lines(Line, 12), recipe(rounds=4, cohort={"min": 9, "size": 9}), secure=None)
    assert {len(cohort) for cohort in sums} == {3}
    together = [set(cohort) for cohort in sums]
    group_of: dict[str, int] = {}
    for place, cohort in enumerate(together):
        assert {group_of.setdefault(name, place % 3) for name in cohort} == {place % 3}


def test_groups_without_masks_are_refused_in_words() -> None:
    with pytest.raises(OperatorError, match=r"sums in groups \(secure.groups = 3\)"):
        simulate(lines(Line, 9), recipe())
    with pytest.raises(OperatorError, match="needs 9, 3 in each of 3 groups"):
        simulate(lines(Line, 8), recipe(), secure=True)
