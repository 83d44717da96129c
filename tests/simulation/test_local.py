"""SCAFFOLD and FedNova over rounds and clients, against the papers' algorithms in numpy, and in a coordinator."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tasks

from murmur.aggregation.local import CONTROL
from murmur.aggregation.selection import select
from murmur.aggregation.strategies import fedavg, fednova, scaffold
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import initial_model
from murmur.clients.job import Job
from murmur.clients.own import Own
from murmur.clients.updates import metrics_of, weight_of
from murmur.coordinator.service import Service
from murmur.protocol.errors import BadUpdate
from murmur.protocol.messages import Total
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Strategy
from murmur.protocol.tensors import map_file, read_layout
from murmur.simulation import History, simulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # as for `tasks`: the tests' folders are packages only in part
from coordinator.harness import Agent, World

WEIGHT = "0.weight"
Array = np.ndarray[Any, Any]


def recipe(**values: Any) -> Recipe:
    train = {"epochs": 2, "batch_size": 3, "lr": 0.1} | values.pop("train", {})  # 6, 7 and 8 rows: 4, 6 and 6 steps
    plain = {"name": "test", "task": "line", "rounds": 4, "train": train, "secure": {"on": False}}
    return parse_recipe(plain | {"cohort": {"min": 3}, "strategy": {"max_weight": 8}} | values)


def weights(history: History) -> Array:
    return history.state_dict()[WEIGHT].numpy()[0]


@pytest.fixture(scope="module")
def start() -> Array:
    return weights(simulate(tasks.lines(), recipe(train={"lr": 1e-12}), rounds=1))


def gradients(name: str, client: tasks.Line, n: int, w: Array, epochs: int = 2) -> Any:
    """The gradient of each step of a client's round, at the w that is in the array when it is asked for."""
    for epoch in range(epochs):
        order = epoch_order(SimpleNamespace(seed=0, round=n, client=name), epoch, len(client.y))  # pyright: ignore[reportArgumentType]
        for index in order.split(3):
            x, y = client.x[index.numpy()].astype(float), client.y[index.numpy()].astype(float)
            yield x.T @ (x @ w - y) / len(y)


def scaffold_by_hand(start: Array, cohort: int, uniform: bool) -> tuple[Array, Array]:
    """Karimireddy et al. 2020, algorithm 1, option II; x weighted as FedAvg's. Returns x and c."""
    clients = {name: make() for name, make in tasks.lines().items()}
    x, c = start.astype(float), np.zeros(3)
    own = {name: np.zeros(3) for name in clients}
    for n in range(1, 5):
        asked = select(sorted(clients), cohort, seed=0, round=n, attempt=1)
        ys, changes, sizes = [], [], []
        for name in asked:
            y, steps = x.copy(), 0
            for g in gradients(name, clients[name], n, y):
                y -= 0.1 * (g - own[name] + c)
                steps += 1
            after = own[name] - c + (x - y) / (steps * 0.1)
            changes.append(after - own[name])
            own[name] = after
            ys.append(y)
            sizes.append(1 if uniform else len(clients[name].y))
        x = np.average(ys, axis=0, weights=sizes)
        c = c + len(asked) / len(clients) * np.average(changes, axis=0, weights=sizes)
    return x, c


@pytest.mark.parametrize("secure", [False, "real"])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("cohort", [4, 3])
def test_scaffold_equals_the_papers_algorithm(start: Array, cohort: int, uniform: bool, secure: Any) -> None:
    base = Strategy(weighting="uniform" if uniform else "examples", max_weight=1 if uniform else 8)
    history = simulate(tasks.lines(), recipe(), strategy=scaffold(base=base), cohort=cohort, secure=secure)
    x, c = scaffold_by_hand(start, cohort, uniform)
    assert history.recipe.strategy.population == 4
    near = 1e-4 if secure else 5e-6
    assert weights(history) == pytest.approx(x, abs=near)
    held = map_file(history.model, read_layout(history.model))
    assert held[CONTROL + WEIGHT][0] == pytest.approx(c, abs=near)
    assert np.abs(c).max() > 0.05  # and masks, or a wrong sign, could not hide in the tolerance
    assert np.abs(x - weights(simulate(tasks.lines(), recipe(), strategy=base, cohort=cohort))).max() > 1e-2


def test_scaffold_ends_where_everybodys_gradients_cancel_and_fedavg_does_not() -> None:
    """Karimireddy et al. 2020, theorem III: no client drift. What everybody wants is the least squares of all rows."""
    clients = [tasks.Line(k, 8) for k in range(4)]
    x, y = np.concatenate([c.x for c in clients]).astype(float), np.concatenate([c.y for c in clients]).astype(float)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    many = recipe(train={"epochs": 5, "batch_size": 8, "lr": 0.4}, rounds=14)
    drifted, corrected = (weights(simulate(clients, many, strategy=s)) for s in (fedavg(), scaffold()))
    assert np.abs(drifted - best).max() > 0.03
    assert np.abs(corrected - best).max() < 1e-3


def fednova_by_hand(start: Array, momentum: float) -> Array:
    """Wang et al. 2020, equation 6 and section 4: every client's direction per |a|, times the mean of all |a|."""
    clients = {name: make() for name, make in tasks.lines().items()}
    x = start.astype(float)
    for n in range(1, 5):
        directions, lengths, sizes = [], [], []
        for name, client in clients.items():
            w, velocity, coefficients = x.copy(), np.zeros(3), []
            for g in gradients(name, client, n, w):
                velocity = momentum * velocity + g
                w -= 0.1 * velocity
                coefficients = [*coefficients, 0.0]
                coefficients = [a + momentum ** (len(coefficients) - 1 - k) for k, a in enumerate(coefficients)]
            directions.append((w - x) / sum(coefficients))
            lengths.append(sum(coefficients))
            sizes.append(len(client.y))
        x = x + np.average(lengths, weights=sizes) * np.average(directions, axis=0, weights=sizes)
    return x


@pytest.mark.parametrize("secure", [False, "real"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_equals_the_papers_algorithm(start: Array, momentum: float, secure: Any) -> None:
    wanted = recipe(train={"optimizer_options": {"momentum": momentum}} if momentum else {})
    history = simulate(tasks.lines(), wanted, strategy=fednova(Strategy(max_weight=8)), secure=secure)
    assert weights(history) == pytest.approx(fednova_by_hand(start, momentum), abs=1e-4 if secure else 5e-6)
    assert np.abs(weights(history) - weights(simulate(tasks.lines(), wanted, strategy=fedavg()))).max() > 1e-3


def test_statistics_of_a_batch_norm_are_not_scaled() -> None:
    """Four clients of as many steps: FedNova is FedAvg."""
    clients = [tasks.Normed(k, 6) for k in range(4)]
    found = [simulate(clients, recipe(), strategy=s).state_dict() for s in (fedavg(), fednova())]
    for name, tensor in found[0].items():
        assert found[1][name].numpy() == pytest.approx(tensor.numpy(), abs=1e-5), name


@pytest.fixture
def world(tmp_path: Path) -> Any:
    world = World(tmp_path)
    yield world
    world.store.close()


class Site:
    """A client that trains with the engine, and keeps what is its own as an agent does."""

    def __init__(self, agent: Agent, folder: Path) -> None:
        self.agent, self.folder, self.own = agent, folder / agent.name, Own(folder / agent.name / "kept")
        self.task = tasks.lines()[agent.name]()

    def take_part(self) -> None:
        a = self.agent.poll()
        assert a is not None
        job = Job(
            id=a.id,
            kind=a.kind.value,
            model=self.agent.world.blobs.path(a.model),
            update=self.folder / "update",
            train=a.train,
            mu=a.mu,
            metrics=a.metrics,
            seed=a.seed,
            round=a.round,
            client=self.agent.name,
            own=self.own.before(a.run, a.round),
            algorithm=a.algorithm,
        )
        result = run_job(self.task, job)
        if result.update is None:
            self.agent.upload_plain(0, 0)
            return
        said = {"weight": float(weight_of(a, result)), "metrics": metrics_of(a, result)}
        self.agent.send(job.update.read_bytes(), **said)
        if job.own_after.exists():
            self.own.adopt(a.run, a.round, job.own_after)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_a_coordinator_and_the_simulator_end_in_the_same_bits(name: str, world: World, tmp_path: Path) -> None:
    wanted = recipe(strategy={"name": name, "max_weight": 8})
    if name == "scaffold":
        wanted = replace_strategy(wanted, population=4)
    history = simulate(tasks.lines(), wanted)
    sites = [Site(world.agent(client), tmp_path) for client in sorted(tasks.lines())]
    with world.blobs.new() as path:
        initial_model(tasks.lines()["site-0"](), wanted.seed, path)
        sha256 = world.blobs.adopt(path)
    service = Service(world.store, world.blobs, world.hub, None, invitation_s=60)  # pyright: ignore[reportArgumentType]
    run = service.start_run(wanted, sha256, by="admin")
    for _ in range(wanted.rounds + 1):
        world.tick()
        for site in sites:
            site.take_part()
        world.tick()
    assert world.store.runs.detail(run).run.state == "finished"
    newest = world.blobs.path(world.store.runs.versions(run)[0].sha256)
    assert newest.read_bytes() == history.model.read_bytes()
    steps = {m.version: m.value for m in world.store.runs.detail(run).metrics if m.name == "local_steps"}
    expected = (6 * 4 + 7 * 6 + 8 * 6 + 6 * 4) / 27  # rows and steps of each client
    assert steps == ({n: pytest.approx(expected) for n in range(1, 5)} if name == "fednova" else {})


def replace_strategy(wanted: Recipe, **values: Any) -> Recipe:
    return wanted.model_copy(update={"strategy": wanted.strategy.model_copy(update=values)})


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (None, "states local_steps of 0 or more, counted by its weight"),
        (Total(sum=12, count=2), "counted by its weight"),  # it would count twice in the mean of the steps
        (Total(sum=-12, count=1), "of 0 or more"),
    ],
    ids=str,
)
def test_an_update_of_fednova_without_its_steps_is_refused_at_the_door(steps: Any, words: str, world: World) -> None:
    agents = [world.agent(name) for name in ("a", "b", "c")]
    world.start(strategy={"name": "fednova"}, secure={"on": False})
    world.tick()
    for agent in agents:
        assert agent.poll() is not None
    with pytest.raises(BadUpdate, match=words):
        agents[0].upload_plain(1.0, 1.0, metrics={"local_steps": steps} if steps else {})
    agents[1].upload_plain(1.0, 1.0, metrics={"local_steps": Total(sum=12, count=1)})


def test_fedavg_takes_no_steps(world: World) -> None:
    agents = [world.agent(name) for name in ("a", "b", "c")]
    world.start(secure={"on": False})
    world.tick()
    assert agents[0].poll() is not None
    with pytest.raises(BadUpdate, match="metrics that the run does not have: local_steps"):
        agents[0].upload_plain(1.0, 1.0, metrics={"local_steps": Total(sum=12, count=1)})
