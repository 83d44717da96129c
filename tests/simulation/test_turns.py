"""Turns in memory against the engine's jobs and files, whose bits they are to have."""

from __future__ import annotations

from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.simulation import History, sequential, simulate


class Items(Dataset[Any]):
    """Rows one by one, each with noise from the global generator: the loader's way."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        x, y = self.rows[row]
        return x + 0.01 * torch.rand(3), y


class Deep(tasks.Line):
    """Every kind of state that a client might leave to the next: dropout's draws, statistics, a buffer of its own."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1), Counting(), nn.Flatten(0)
        )


class Counting(nn.Module):
    """Multiplies by how often it was used since it was built, in a buffer that does not travel."""

    used: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("used", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.used += 0.25
        return x * self.used


class Partly(tasks.Line):
    """A frozen layer, a count of its own, a part of other rows, and a layer that only some passes use."""

    def model(self) -> nn.Module:
        return Sometimes()

    def data(self, split: str) -> Any:
        return Subset(super().data("train"), [4, 1, 3, 0, 2])

    def count(self, target: Tensor) -> int:
        return int((target > 0).sum())


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.frozen = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 3)
        self.frozen.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        return (self.a(x) + (self.b(x) if float(x.detach().sum()) > 0 else 0)).flatten()


class Sharing(tasks.Line):
    """Autograd has one tensor as the gradient of both parameters, and what is done to the one must spare the other."""

    def model(self) -> nn.Module:
        return Sum()


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a + self.b)


class Loaded(tasks.Line):
    def data(self, split: str) -> Any:
        return Items(super().data(split)) if split == "train" else None


def trained(kind: type[tasks.Line], strategy: dict[str, Any], train: dict[str, Any], **values: Any) -> History:
    given = {"name": "t", "task": "t", "rounds": 2, "secure": {"on": False}, "metrics": ("accuracy",)}
    recipe = parse_recipe(given | {"train": {"batch_size": 4, "lr": 0.05, **train}, "strategy": strategy} | values)
    return simulate(tasks.lines(kind), recipe, backend="sequential")


@pytest.mark.parametrize(
    ("kind", "train", "strategy"),
    [
        (tasks.Line, {}, {}),
        (tasks.Line, {"epochs": 3, "optimizer_options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}}, {}),
        (tasks.Line, {"optimizer": "Adam", "clip_norm": 0.5}, {"name": "fedprox", "mu": 0.3}),
        (
            tasks.Line,
            {"steps": 5, "clip_norm": 0.5, "micro_batch": 3},
            {"name": "fedprox", "mu": 0.3, "weighting": "uniform"},
        ),
        (Partly, {"micro_batch": 2}, {}),
        (Sharing, {"clip_norm": 0.1}, {}),
        (Deep, {"epochs": 2, "optimizer_options": {"momentum": 0.9}}, {}),
        (Partly, {"epochs": 2, "batch_size": 1, "optimizer_options": {"momentum": 0.9}}, {}),
        (Loaded, {"epochs": 2}, {}),
    ],
    ids=[
        "plain",
        "momentum",
        "adam",
        "pieces",
        "pieces of plain steps",
        "one gradient of two parameters",
        "buffers and dropout",
        "unused and frozen",
        "loader",
    ],
)
def test_turns_in_memory_have_the_bits_of_jobs_with_files(
    kind: type[tasks.Line], train: dict[str, Any], strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = trained(kind, strategy, train)
    monkeypatch.setattr(sequential, "suits", lambda _: False)
    jobs = trained(kind, strategy, train)
    assert turns.model.read_bytes() == jobs.model.read_bytes()
    assert turns.versions == jobs.versions
    assert [(r.measured, r.train_loss) for r in turns.rounds] == [(r.measured, r.train_loss) for r in jobs.rounds]


def test_plain_rounds_write_no_update_and_call_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "run_job", lambda *_, **__: pytest.fail("a job"))
    assert trained(tasks.Line, {}, {}).backend == "sequential"


@pytest.mark.parametrize(
    "values", [{"train": {"precision": "bf16"}}, {"strategy": {"name": "fednova"}}, {"train": {"qat": True}}]
)
def test_what_turns_cannot_do_goes_through_the_engine(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    work = sequential.run_job
    monkeypatch.setattr(
        sequential, "run_job", lambda task, job, **rest: called.append(job.client) or work(task, job, **rest)
    )
    trained(tasks.Line, values.get("strategy", {}), values.get("train", {}))
    assert called[:4] == ["site-0", "site-1", "site-2", "site-3"]


def test_the_global_generators_are_where_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(Deep, {}, {})
    assert torch.equal(torch.get_rng_state(), before)


def test_training_that_diverges_names_the_client_and_the_tensor() -> None:
    with pytest.raises(OperatorError, match=r"NaN or infinity \('0.weight'\)") as caught:
        trained(tasks.Line, {}, {"lr": 1000.0, "epochs": 100})
    assert caught.value.__notes__ == ["in round 1 at site-0"]
