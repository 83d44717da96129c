"""Clients trained together against the same clients one after the other, mostly in float64, where 1e-11 is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from murmur.aggregation.strategies import fedavg, fedavgm, fedprox, median
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.sections import Dp
from murmur.simulation import History, simulate
from murmur.simulation.groups import Buffers, Group, member
from murmur.simulation.layers import Copies
from murmur.simulation.lowrank import FirstLayer, LowRank
from murmur.simulation.routes import Route

SIZES = 12, 5, 8, 1, 11, 7  # with batches of 4: short ones, clients of one step an epoch and of two and three


class Classes:
    """Four classes from 12 numbers, or 3 × 4 images, that follow from nothing."""

    def __init__(
        self, make: Callable[[], nn.Module], number: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(number)
        self._make, self._dtype = make, dtype
        self._x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)
        self._y = torch.randint(4, (rows,), generator=generator)

    def model(self) -> nn.Module:
        return self._make().to(self._dtype)

    def data(self, split: str) -> Dataset[Any] | None:
        return TensorDataset(self._x, self._y)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target)), "unasked": (1.0, 1)}


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Sequential(nn.Linear(30, 40), nn.Tanh()), nn.Linear(40, 4))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 30, bias=False), nn.ReLU(), nn.Linear(30, 30, bias=False), nn.Linear(30, 4))


def cnn() -> nn.Module:
    convolved = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.ReLU()
    return nn.Sequential(*convolved, nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 4))


def pooled() -> nn.Module:
    """Convolutions as W1's, where a row and a column are left over from the pooling and ties are many."""
    first = nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2)  # 3 x 4 to 4 x 5 to 2 x 2
    return nn.Sequential(*first, nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh()), nn.Flatten(), nn.Linear(20, 4))


def dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 30), nn.Dropout(0.4), nn.ReLU(), nn.Linear(30, 30), nn.Dropout(), nn.Linear(30, 4)
    )


class Residual(nn.Module):
    """A forward of its own, with a layer that is not trained and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.inner = nn.Linear(12, 30).requires_grad_(False), nn.Linear(30, 30)
        generator = torch.Generator().manual_seed(1)  # every client builds the same
        for parameter in self.fixed.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.outer, self.unused = nn.Linear(30, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fixed(x))
        return self.outer(hidden + torch.relu(self.inner(hidden)))


class Branches(nn.Module):
    """Convolutions in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 1, bias=False)
        self.outer = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer((torch.tanh(self.wide(x)) + self.narrow(x)).flatten(1))


class Twice(nn.Module):
    """A layer that is used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.outer = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Tokens(nn.Module):
    """Several rows of a layer for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.outer = nn.Linear(4, 70), nn.Linear(210, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.each(x.view(-1, 3, 4))).flatten(1))


class Scaled(nn.Module):
    """A parameter that belongs to no layer of torch's, and a norm with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(12)), nn.LayerNorm(12)
        self.outer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(x * self.scale))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "logistic": (logistic, (3, 4)),
    "mlp": (mlp, (12,)),
    "without bias": (without_bias, (12,)),
    "cnn": (cnn, (1, 3, 4)),
    "pooled": (pooled, (1, 3, 4)),
    "branches": (Branches, (1, 3, 4)),
    "dropout": (dropout, (12,)),
    "residual": (Residual, (12,)),
    "twice": (Twice, (12,)),
    "tokens": (Tokens, (12,)),
    "vmap": (Scaled, (12,)),
}

TRAININGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optimizer_options": {"momentum": 0.9}},
    "dampening": {"optimizer_options": {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1}},
    "nesterov": {"optimizer_options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}},
    "decay": {"optimizer_options": {"weight_decay": 0.2}},
    "clipped": {"clip_norm": 0.5},
    "pieces": {"micro_batch": 3},
    "adam": {"optimizer": "Adam", "lr": 0.01, "optimizer_options": {"weight_decay": 0.1}},
    "adamw": {"optimizer": "AdamW", "lr": 0.01, "clip_norm": 1.0},
    "rmsprop": {"optimizer": "RMSprop", "lr": 0.01, "optimizer_options": {"momentum": 0.5}},
}


def federation(model: str, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> list[Any]:
    make, shape = MODELS[model]
    return [Classes(make, k, rows, shape, dtype) for k, rows in enumerate(sizes)]


def recipe(train: dict[str, Any] | None = None, **values: Any) -> Recipe:
    plain: dict[str, Any] = {"name": "test", "task": "test", "rounds": 2, "secure": {"on": False}}
    plain["cohort"] = {"size": 5, "min": 1}
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 0.1}
    return parse_recipe(plain | {"train": settings | (train or {})} | values)


def both(clients: Any, settled: Recipe, **how: Any) -> tuple[History, History]:
    together = simulate(clients, settled, backend="vectorized", **how)
    alone = simulate(clients, settled, backend="sequential", **how)
    assert (together.backend, alone.backend) == ("vectorized", "sequential")
    return together, alone


def assert_equal(together: History, alone: History, near: float = 1e-11) -> None:
    models = together.state_dict(), alone.state_dict()
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[1].items():
        assert tensor.dtype == models[0][name].dtype
        assert float((models[0][name] - tensor).abs().max()) <= near, name
    for a, b in zip(together.rounds, alone.rounds, strict=True):
        assert a.cohort == b.cohort
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)
        assert a.measured.keys() == b.measured.keys()
        for name, (total, count) in b.measured.items():
            assert a.measured[name] == (pytest.approx(total, rel=1e-5, abs=1e-6), count)
    assert together.final == pytest.approx(alone.final, rel=1e-5)


EVERY, SOME = ("logistic", "mlp", "cnn", "vmap"), ("sgd", "nesterov", "adamw")
GRID = [(model, training) for model in MODELS for training in TRAININGS if model in EVERY or training in SOME]


@pytest.mark.parametrize(("model", "training"), GRID)
def test_clients_together_end_where_each_would_end_alone(model: str, training: str) -> None:
    assert_equal(*both(federation(model), recipe(TRAININGS[training])))


@pytest.mark.parametrize("training", ["sgd", "nesterov", "clipped", "adam"])
@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "vmap"])
def test_the_proximal_pull_is_the_same(model: str, training: str) -> None:
    settled = recipe(TRAININGS[training])
    pulled = both(federation(model), settled, strategy=fedprox(0.5))
    assert_equal(*pulled)
    without = simulate(federation(model), settled, backend="vectorized").state_dict()
    moved = (float((without[name] - t).abs().max()) for name, t in pulled[0].state_dict().items())
    assert max(moved) > 1e-3  # the test could tell


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
@pytest.mark.parametrize("training", ["sgd", "adam"])
def test_float32_differs_by_its_rounding_only(model: str, training: str) -> None:
    settled = recipe(TRAININGS[training])
    assert_equal(*both(federation(model, dtype=torch.float32), settled), near=1e-6 if training == "sgd" else 1e-4)


@pytest.mark.parametrize("strategy", [fedavg(weighting="uniform"), fedavgm(0.5)], ids=["uniform", "server momentum"])
def test_the_server_moves_alike(strategy: Any) -> None:
    assert_equal(*both(federation("mlp"), recipe(), strategy=strategy))


def test_a_model_may_be_one_layer_by_itself() -> None:
    clients = [Classes(partial(nn.Linear, 12, 4), k, rows, (12,), torch.float64) for k, rows in enumerate(SIZES)]
    assert_equal(*both(clients, recipe()))


def test_a_cap_on_the_weights_holds() -> None:
    assert_equal(*both(federation("mlp"), recipe(strategy={"max_weight": 6})))


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "dropout"])
@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_any_size_give_the_same(model: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Route, "fits", lambda self, m: size)
    assert_equal(*both(federation(model), recipe()))


def test_equal_clients_with_full_batches_need_no_padding() -> None:
    for model in ("logistic", "mlp", "cnn", "dropout"):
        assert_equal(*both(federation(model, (8, 8, 8, 8, 8)), recipe()))


def test_convolutions_side_by_side_give_what_one_after_the_other_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Copies.__init__
    monkeypatch.setattr(Copies, "__init__", lambda self, **given: made(self, **given | {"grouped": True}))
    assert_equal(*both(federation("cnn"), recipe()))


def test_clients_examples_are_multiplied_where_they_lie() -> None:
    cpu = torch.device("cpu")
    members = [member(f"client-{k}", task, cpu) for k, task in enumerate(federation("logistic", (8, 5, 3)))]
    how: dict[str, Any] = {"seed": 0, "round": 1, "buffers": Buffers(cpu), "device": cpu}
    blocks = Group(members, recipe().train, **how).blocks
    assert [where for where, _ in blocks] == [slice(0, 8), slice(8, 13), slice(16, 19)]
    assert [rows.data_ptr() for _, rows in blocks] == [m.inputs.data_ptr() for m in members]


@pytest.mark.parametrize("model", ["pooled", "mlp"])
def test_several_threads_give_what_one_gives(model: str) -> None:
    before, found = torch.get_num_threads(), list[History]()
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(simulate(federation(model), recipe(), backend="vectorized"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_equal(found[1], found[0])
    assert found[1].model.read_bytes() == found[2].model.read_bytes()


def forms(monkeypatch: pytest.MonkeyPatch, model: str, sizes: tuple[int, ...], **train: Any) -> set[tuple[str, str]]:
    """The layers that trained in the low-rank form, with the kind of it."""
    found: set[tuple[str, str]] = set()
    for kind in (LowRank, FirstLayer):

        def finish(self: Any, *given: Any, of: Any = kind.finish) -> None:
            found.add((self.name, type(self).__name__))
            of(self, *given)

        monkeypatch.setattr(kind, "finish", finish)
    simulate(federation(model, sizes), recipe({"epochs": 1} | train), backend="vectorized")
    return found


def test_layers_take_the_low_rank_form_while_a_client_has_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (12,) * 5, (16,) * 5
    first, second = ("0", "FirstLayer"), ("2.0", "LowRank")  # 12 to 30, 30 to 40; 40 to 4 never is
    assert forms(monkeypatch, "mlp", few) == {first, second}
    assert forms(monkeypatch, "mlp", few, epochs=3) == {first}  # its rows are the same in each epoch
    assert forms(monkeypatch, "mlp", many) == {second}
    assert forms(monkeypatch, "mlp", few, clip_norm=1.0) == forms(monkeypatch, "mlp", few, optimizer="Adam") == set()
    assert forms(monkeypatch, "twice", (3,) * 5) == {("outer", "LowRank")}
    assert forms(monkeypatch, "logistic", few) == {("1", "FirstLayer")}
    assert forms(monkeypatch, "cnn", few) == {("5", "LowRank")}
    assert forms(monkeypatch, "residual", few) == {("inner", "LowRank")}
    assert forms(monkeypatch, "tokens", (1,) * 5) == {("each", "LowRank"), ("outer", "LowRank")}
    assert forms(monkeypatch, "tokens", (3,) * 5) == {("outer", "LowRank")}  # 9 rows of 4 numbers


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two = (simulate(federation("dropout"), recipe(), backend="vectorized") for _ in range(2))
    assert one.model.read_bytes() == two.model.read_bytes()


class Counted(Classes):
    """A loss that sums over something else than examples: each counts as often as its class says."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(output, target, reduction="none")
        return (each * (target + 1)).sum()

    def count(self, target: Tensor) -> int:
        return int((target + 1).sum())


def test_a_tasks_own_count_is_what_the_loss_is_divided_by() -> None:
    clients = [Counted(mlp, k, rows, (12,), torch.float64) for k, rows in enumerate(SIZES)]
    assert_equal(*both(clients, recipe()))


class Part(Classes):
    """Some rows of a larger data set."""

    def data(self, split: str) -> Dataset[Any] | None:
        if split == "test":
            return None
        return Subset(TensorDataset(self._x, self._y), [*range(len(self._x))][::-1][:6])


def test_subsets_and_clients_without_tests_will_do() -> None:
    clients = [Part(mlp, k, rows, (12,), torch.float64) for k, rows in enumerate(SIZES)]
    assert_equal(*both(clients, recipe(metrics=())))


class Items(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        return self._x[n], self._y[n]


class OneByOne(Classes):
    def data(self, split: str) -> Dataset[Any] | None:
        return Items(self._x, self._y)


class Centred(nn.Module):
    """Examples mix: each is compared with the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x - x.mean(0))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.outer(x), 0.5, self.training)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer, self.passes = nn.Linear(12, 4), nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return self.outer(x)


class Softened(Classes):
    """Not a sum: no two clients' losses add up."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) ** 1.5


class Weighted(Classes):
    """A loss that differs from client to client."""

    def __init__(self, number: int) -> None:
        super().__init__(mlp, number, 8, (12,), torch.float64)
        self._number = number

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) * (1 + self._number)


def clients_of(kind: type[Classes], model: Callable[[], nn.Module]) -> list[Any]:
    return [kind(model, k, 8, (12,), torch.float64) for k in range(5)]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "batch norm": (clients_of(Classes, normed), {}, "GroupNorm has none"),
    "data": (clients_of(OneByOne, mlp), {}, "client-0 is a Items, no TensorDataset or Subset"),
    "pieces": (federation("dropout"), {"recipe": recipe({"micro_batch": 3})}, "train.micro_batch"),
    "mixed": (clients_of(Classes, Centred), {}, "changes with the others of the batch"),
    "drawn": (clients_of(Classes, Noisy), {}, "changes with the others'"),
    "buffer": (clients_of(Classes, Counting), {}, "its buffer 'passes' changes"),
    "no sum": (clients_of(Softened, mlp), {}, "client-0 is not the cohort's"),
    "losses": ([Weighted(k) for k in range(5)], {}, "client-1 is not the cohort's"),
    "masks": (federation("mlp"), {"secure": True}, "masked one by one"),
    "rule": (federation("mlp"), {"strategy": median()}, 'strategy.combine = "median"'),
    "private": (
        tasks.lines(),
        {"dp": Dp(mode="local", noise_multiplier=1.0)},
        'dp.mode = "local"',
    ),
    "precision": (federation("mlp"), {"recipe": recipe({"precision": "bf16"})}, "train.precision"),
    "wire": (federation("mlp"), {"recipe": recipe({"wire": "bf16"})}, "train.wire is not done"),
    "optimizer": (federation("mlp"), {"recipe": recipe({"optimizer": "Adafactor"})}, "torch.optim.Adafactor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_together_is_refused_or_done_one_after_the_other(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    clients, how, said = REFUSED[case]
    given = {"recipe": recipe(rounds=1)} | how
    with pytest.raises(OperatorError, match=said):
        simulate(clients, **given, backend="vectorized")
    caplog.set_level(logging.INFO, "murmur.simulation")
    history = simulate(clients, **given)
    assert history.backend == "sequential"
    told = [r for r in caplog.records if r.message == "clients are trained one after the other"]
    assert len(told) == 1
    assert said.replace("\\", "") in told[0].why  # pyright: ignore[reportAttributeAccessIssue]: extra
    if case not in ("private",):
        alone = simulate(clients, **given, backend="sequential")
        assert history.model.read_bytes() == alone.model.read_bytes()


def test_auto_trains_together_where_it_can() -> None:
    assert simulate(federation("mlp"), recipe()).backend == "vectorized"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(OperatorError, match="no backend 'fast'"):
        simulate(federation("mlp"), recipe(), backend="fast")  # pyright: ignore[reportArgumentType]: the point


@pytest.mark.parametrize("backend", ["auto", "vectorized"])
def test_mistakes_are_told_as_one_client_alone_tells_them(backend: Any) -> None:
    with pytest.raises(OperatorError, match=r"NaN or infinity \('0.weight'\): lower train.lr"):
        simulate(tasks.lines(), recipe({"lr": 1000.0, "epochs": 100}), backend=backend, cohort=0)
    with pytest.raises(OperatorError, match="no option 'momentun'; did you mean momentum"):
        simulate(federation("mlp"), recipe({"optimizer_options": {"momentun": 0.9}}), backend=backend)

    class Mean(Classes):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output, target)

    with pytest.raises(OperatorError, match="looks like a mean"):
        simulate(clients_of(Mean, mlp), recipe(), backend=backend)
