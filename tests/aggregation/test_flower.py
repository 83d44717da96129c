"""Flower's strategies as the server's move: found by name, tried before a run, kept from round to round."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.serverapp.strategy import FedAdam, FedAvg

from murmur.aggregation import flower as flowers
from murmur.aggregation.flower import Reply, build, flower_step, names, of_all, of_file, register
from murmur.aggregation.flower_probe import check_flower, find
from murmur.aggregation.flower_state import read_state, write_state
from murmur.aggregation.server import server_step
from murmur.aggregation.strategies import fedadam, fedavg, fedavgm, flower
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Strategy
from murmur.protocol.tensors import Layout, TensorSpec, map_file, write_file
from murmur.protocol.wire import to_bf16

LAYOUT = Layout((TensorSpec("b", "F32", ()), TensorSpec("w", "F32", (2, 3))))
BATCH_NORM = Layout(
    (
        TensorSpec("counter", "I64", ()),
        TensorSpec("mean", "F32", (2,)),
        TensorSpec("w", "F32", (2,)),
        TensorSpec("mask", "BOOL", (2,)),
    ),
    buffers=frozenset({"counter", "mean", "mask"}),
)
KEPT = {"counter": np.int64(5), "mask": np.array([True, False])}
Arrays = Mapping[str, Any]


@pytest.fixture(autouse=True)
def only_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(flowers, "_here", {})


def recipe(make: str | Callable[..., Any], options: Mapping[str, Any] | None = None, **values: Any) -> Recipe:
    strategy = flower(make, **(options or {})).model_dump()
    return parse_recipe({"name": "t", "task": "t"} | values | {"strategy": strategy | values.get("strategy", {})})


class Rounds:
    """Server steps one after the other, each from files, as after a restart."""

    def __init__(self, folder: Path, layout: Layout, start: Arrays) -> None:
        self.folder, self.layout, self.n = folder, layout, 0
        self.version, self.state = folder / "version-0", None
        write_file(self.version, {name: np.asarray(a) for name, a in start.items()}, layout)

    def step(self, strategy: Strategy, mean: Arrays, replies: list[Reply] | None = None) -> dict[str, Any]:
        self.n += 1
        version, state = self.folder / f"version-{self.n}", self.folder / f"state-{self.n}"
        moved = self.version, self.layout, mean
        if strategy.flower:
            given = replies if replies is not None else [of_all(mean, {})]
            kept = flower_step(*moved, given, strategy, self.state, version, state, round=self.n)
        else:
            kept = server_step(*moved, strategy, self.state, version, state)
        self.version, self.state = version, state if kept else None
        return map_file(version, self.layout)


def means(rounds: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    return [{t.name: np.asarray(0.1 * rng.normal(size=t.shape)) for t in LAYOUT.tensors} for _ in range(rounds)]


def apart(one: Arrays, other: Arrays) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


ZEROS = {"b": np.float32(0), "w": np.zeros((2, 3), np.float32)}


# What strategies of Flower's come to


@pytest.mark.parametrize(
    ("ours", "theirs", "near"),
    [
        (fedavg(), flower("fedavg"), 1e-7),
        (fedavgm(0.9, 0.5), flower("fedavgm", server_momentum=0.9, server_learning_rate=0.5), 1e-7),
        (
            Strategy(server="Adagrad", server_lr=0.1, server_options={"eps": 1e-3}),
            flower("fedadagrad", eta=0.1, tau=1e-3),
            1e-6,
        ),
    ],
)
def test_flowers_strategies_come_to_the_versions_of_ours(
    tmp_path: Path, ours: Strategy, theirs: Strategy, near: float
) -> None:
    (tmp_path / "theirs").mkdir()
    one, other = Rounds(tmp_path, LAYOUT, ZEROS), Rounds(tmp_path / "theirs", LAYOUT, ZEROS)
    for mean in means():
        assert apart(one.step(ours, mean), other.step(theirs, mean)) < near


def test_flowers_fedadam_is_ours_with_the_rate_of_the_round_after(tmp_path: Path) -> None:
    """Flower corrects the moments as if a round more had been; tau, which it does not correct, is as good as zero."""

    def correction(t: int) -> float:
        return math.sqrt(1 - 0.99**t) / (1 - 0.9**t)

    (tmp_path / "theirs").mkdir()
    one, other = Rounds(tmp_path, LAYOUT, ZEROS), Rounds(tmp_path / "theirs", LAYOUT, ZEROS)
    for t, mean in enumerate(means(), 1):
        rate = 0.1 * correction(t + 1) / correction(t)
        ours = one.step(fedadam(rate, tau=1e-12), mean)
        theirs = other.step(flower("fedadam", eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-12), mean)
        assert apart(ours, theirs) < 1e-6


def test_fedyogi_steps_as_published(tmp_path: Path) -> None:
    """Reddi et al. 2021, algorithm 2, with moments that begin at zero as in Flower."""
    run, m, v, w = Rounds(tmp_path, LAYOUT, ZEROS), 0.0, 0.0, 0.0
    for delta in (0.5, -0.1, 0.02):
        m = 0.9 * m + 0.1 * delta
        v = v - 0.01 * delta**2 * np.sign(v - delta**2)
        w = w + 0.1 * m / (math.sqrt(v) + 1e-3)
        new = run.step(flower("fedyogi", eta=0.1), {"b": np.asarray(delta), "w": np.full((2, 3), delta)})
        assert float(new["b"]) == pytest.approx(w, rel=1e-5)
        assert new["w"].ravel().tolist() == pytest.approx([w] * 6, rel=1e-5)


def test_a_strategy_that_needs_the_mean_moves_parameters_and_the_mean_moves_the_rest(tmp_path: Path) -> None:
    start = {"w": np.float32([1, 2]), "mean": np.float32([3, 4]), **KEPT}
    mean = {"w": np.array([0.5, -0.5]), "mean": np.array([1.0, 1.0]), "counter": np.asarray(7)}
    halved = flower("fedavgm", server_learning_rate=0.5)
    new = Rounds(tmp_path, BATCH_NORM, start).step(halved, mean)
    assert new["w"].tolist() == [1.25, 1.75]
    assert (new["mean"].tolist(), int(new["counter"]), new["mask"].tolist()) == ([4, 5], 12, [True, False])


def test_a_strategy_that_looks_at_single_updates_is_given_every_tensor_of_them(tmp_path: Path) -> None:
    start = {"w": np.float32([1, 1]), "mean": np.float32([0, 0]), **KEPT}
    wire, replies = BATCH_NORM.update("bf16"), list[Reply]()
    for k, (moved, steps) in enumerate(
        [(1.0, 1), (2.0, 2), (4.0, 3), (64.0, 90)]
    ):  # all of them are numbers of bfloat16
        values = to_bf16(np.full(2, moved, np.float32))
        write_file(tmp_path / f"c{k}", {"w": values, "mean": values, "counter": np.asarray(steps)}, wire)
        replies.append(of_file(f"c{k}", tmp_path / f"c{k}", wire, 1.0, {}))
    new = Rounds(tmp_path, BATCH_NORM, start).step(flower("fedmedian"), {}, replies)
    assert (new["w"].tolist(), new["mean"].tolist(), int(new["counter"])) == ([4, 4], [3, 3], 8)  # of 7.5, to even


# Which strategies there are


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(OperatorError, match=r'no Flower strategy "?\'fedyog\' is installed here; there are .*fedyogi'):
        build(flower("fedyog"))
    assert {"fedavg", "fedadam", "fedyogi", "fedmedian", "krum"} <= set(names())


def test_an_installed_package_brings_its_own_which_no_name_of_this_process_hides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = importlib.metadata.EntryPoint("hers", "flwr.serverapp.strategy:FedAdam", flowers.GROUP)
    monkeypatch.setattr(flowers, "entry_points", lambda group: [point])
    register("hers", FedAvg)
    made = build(flower("hers", eta=0.25))
    assert isinstance(made, FedAdam) and made.eta == 0.25


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        ("fedadam", {"etta": 0.1}, "'fedadam' cannot be made with these options: TypeError: .*etta"),
        (dict, {}, "gives a builtins.dict, and not a flwr.serverapp.strategy.Strategy"),
        ("fedprox", {"proximal_mu": 0.1}, "tells its clients proximal-mu, .* strategy.mu"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OperatorError, match=words):
        find(recipe(make, options))


def test_fedprox_goes_with_the_same_term_in_the_recipe() -> None:
    assert find(recipe("fedprox", {"proximal_mu": 0.1}, strategy={"name": "fedprox", "mu": 0.1})).linear


# What a strategy needs to see


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_function_of_the_mean_is_found_to_be_one_and_is_masked(name: str) -> None:
    check_flower(recipe(name))
    check_flower(recipe(name, secure={"groups": 3}, cohort={"min": 9}, strategy={"combine": "median"}))


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_a_rule_for_single_updates_is_found_to_be_one_and_goes_without_masks_only(name: str) -> None:
    with pytest.raises(OperatorError, match=r"looks at single updates .* set secure.on = false; or .*secure.groups"):
        check_flower(recipe(name))
    plain = {"secure": {"on": False}, "cohort": {"min": 5, "size": 5}}
    check_flower(recipe(name, **plain))
    with pytest.raises(OperatorError, match=r'dp.mode = "central" reckons its noise'):
        check_flower(recipe(name, **plain, dp={"mode": "central"}, strategy={"weighting": "uniform"}))
    with pytest.raises(OperatorError, match=r'and so does strategy.combine = "median"'):
        check_flower(recipe(name, **plain, strategy={"combine": "median"}))
    with pytest.raises(OperatorError, match=r'strategy.name = "fednova" needs their mean'):
        check_flower(recipe(name, **plain, strategy={"name": "fednova"}))


@pytest.mark.slow  # Flower collects garbage for each client of these
def test_rules_for_single_updates_that_take_long_are_found_too() -> None:
    assert find(recipe("bulyan")).why == "it fails where it is given their mean"
    assert find(recipe("qfedavg", {"client_learning_rate": 0.1})).why == "their mean gives another model"


class Alike(FedAvg):
    """The mean of the clients, each counting alike."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        for reply in replies:
            reply.content["metrics"]["num-examples"] = 1
        return super().aggregate_train(server_round, replies)


def test_whether_clients_count_alike_belongs_to_the_question() -> None:
    assert not find(recipe(Alike)).linear
    assert find(recipe(Alike, strategy={"weighting": "uniform"})).linear


class Noisy(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        for name, array in (arrays or {}).items():
            arrays[name] = type(array)(np.asarray(array.numpy() + np.random.normal(size=array.shape)))  # type: ignore[index]
        return arrays, metrics


def test_a_strategy_that_draws_at_random_is_not_taken_for_a_function_of_the_mean() -> None:
    assert find(recipe(Noisy)).why == "it draws at random"


class Failing(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        raise KeyError("weights")


def test_a_strategy_that_fails_is_refused_before_a_run_and_ends_the_attempt_in_one(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="failed in round 1: KeyError: 'weights', on 7 random updates"):
        find(recipe(Failing))
    with pytest.raises(BadUpdate, match="failed in round 1: KeyError"):
        Rounds(tmp_path, LAYOUT, ZEROS).step(flower(Failing), means()[0])


# What a strategy keeps


class Counting(FedAvg):
    """Steps once more as far each round; what it counts by is said by the subclasses."""

    def count(self) -> float:
        raise NotImplementedError

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        times = self.count()
        for name, array in (arrays or {}).items():
            arrays[name] = type(array)(np.asarray(times * array.numpy()))  # type: ignore[index]
        return arrays, metrics


class Counter:
    def __init__(self) -> None:
        self.times = 0


class OfObject(Counting):
    """Keeps its count in an object of its own, and things of every kind that can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.counter, self.function = Counter(), lambda: 1
        self.kinds: Any = None

    def count(self) -> float:
        self.counter.times += 1
        self.kinds = [("a", 1, None, True), {1: np.float32(0.5), "x": np.array([1, 2], np.int8)}, float("inf")]
        return self.counter.times


def test_what_a_strategy_keeps_comes_back_as_it_was(tmp_path: Path) -> None:
    assert find(recipe(OfObject)).linear
    strategy, once = flower(OfObject), build(flower(OfObject))
    once.count()  # type: ignore[attr-defined]
    assert write_state(tmp_path / "state", once, strategy)
    again: Any = build(strategy)
    read_state(tmp_path / "state", again, strategy)
    assert again.counter.times == 1 and again.function() == 1
    (letters, values, end), kept = again.kinds, values_of(once)
    assert (letters, end) == (kept[0], kept[2])
    assert type(values[1]) is np.float32 and values[1] == 0.5
    assert values["x"].dtype == np.int8 and values["x"].tolist() == [1, 2]
    assert not write_state(tmp_path / "none", build(strategy), strategy)
    assert not (tmp_path / "none").exists()


def values_of(strategy: Any) -> Any:
    return strategy.kinds


def test_the_state_of_one_strategy_is_not_read_for_another(tmp_path: Path) -> None:
    strategy = flower("fedavgm", server_momentum=0.9)
    run = Rounds(tmp_path, LAYOUT, ZEROS)
    run.step(strategy, means()[0])
    with pytest.raises(OperatorError, match=r"state-1 is not the state of .* 'fedavgm' with its options"):
        run.step(flower("fedavgm", server_momentum=0.8), means()[0])


class OfGenerator(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def count(self) -> float:
        return float(self.rng.normal())


class OfSet(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def count(self) -> float:
        self.seen.add(len(self.seen))
        return len(self.seen)


def of_closure() -> FedAvg:
    """Counts where no attribute is."""
    times = [0]

    class Hidden(Counting):
        def count(self) -> float:
            times[0] += 1
            return times[0]

    return Hidden()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OfGenerator, "its rng is a numpy.random._generator.Generator"),
        (OfSet, "its seen is a builtins.set"),
        (of_closure, "keeps something from round to round that is none of its attributes"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_a_run_begins(make: Any, words: str) -> None:
    with pytest.raises(OperatorError, match=words):
        find(recipe(make))


# How a recipe says it


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"flower": "fedyogi", "server": "Adam"}, "flower moves the server: leave server"),
        ({"flower_options": {"eta": 1}}, "flower_options are of a Flower strategy"),
        ({"flower": "os:system"}, "strategy.flower: String should match"),
    ],
)
def test_a_recipe_that_says_two_things_is_refused(strategy: dict[str, Any], words: str) -> None:
    with pytest.raises(OperatorError, match=words):
        parse_recipe({"name": "t", "task": "t", "strategy": strategy})


def test_options_keep_their_kinds_and_what_is_not_said_is_not_written() -> None:
    options = {"num_malicious_nodes": 1, "eta": 1.0, "on": True, "weighted_by_key": "n"}
    written = Strategy.model_validate_json(flower("krum", **options).model_dump_json())
    assert [type(value) for value in written.flower_options.values()] == [int, float, bool, str]
    assert "flower" not in fedavg().model_dump_json()
