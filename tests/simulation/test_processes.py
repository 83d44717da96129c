"""Worker processes against the backends of one process, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import torch
from torch import Tensor, nn

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.simulation import History, simulate

from ..waiting import wait_until

CLIENTS = 7


def trained(backend: Any, kind: type[tasks.Line] = tasks.Line, workers: int = 2, **values: Any) -> History:
    given: dict[str, Any] = {"name": "t", "task": "t", "rounds": 2, "secure": {"on": False}, "metrics": ("accuracy",)}
    recipe = parse_recipe(given | {"train": {"batch_size": 4, "lr": 0.05, "epochs": 2}} | values)
    return simulate(tasks.lines(kind, CLIENTS), recipe, backend=backend, workers=workers, secure=None)


def same(one: History, other: History, within: float) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.allclose(tensor.double(), b[name].double(), rtol=0, atol=within), name
    for x, y in zip(one.versions, other.versions, strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    for x, y in zip(one.rounds, other.rounds, strict=True):
        assert x.train_loss == pytest.approx(y.train_loss, rel=1e-5)


class Float64(tasks.Normed):
    """In float64, with a batch norm: one after the other."""

    def model(self) -> nn.Module:
        return super().model().double()

    def data(self, split: str) -> Any:
        inputs, target = super().data(split).tensors
        return torch.utils.data.TensorDataset(inputs.double(), target.double())


def test_workers_give_the_model_of_one_process_and_integers_exactly() -> None:
    """Sums of 7 clients in float64, in another order: far below 1e-12."""
    alone, workers = trained("sequential", Float64), trained("processes", Float64)
    assert (alone.backend, workers.backend) == ("sequential", "processes")
    same(alone, workers, 1e-12)
    assert workers.state_dict()["1.num_batches_tracked"] == alone.state_dict()["1.num_batches_tracked"]


def test_clients_that_can_be_trained_together_are_in_each_worker() -> None:
    same(trained("vectorized"), trained("processes"), 1e-6)


def test_the_result_does_not_depend_on_the_number_of_workers() -> None:
    one, two, three = (trained("processes", tasks.Normed, workers) for workers in (1, 2, 3))
    assert one.model.read_bytes() == two.model.read_bytes() == three.model.read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        {"secure": {"on": True}, "strategy": {"max_weight": 8}},
        {"strategy": {"combine": "median"}},
        {"strategy": {"name": "scaffold"}},
        {"train": {"batch_size": 4, "lr": 0.05, "wire": "bf16"}},
    ],
    ids=["masks", "median", "scaffold", "bf16"],
)
def test_updates_that_are_looked_at_one_by_one_have_the_bits_of_one_process(values: dict[str, Any]) -> None:
    alone, workers = trained("sequential", **values), trained("processes", **values)
    if "scaffold" in str(values):  # a mean, of parts
        return same(alone, workers, 1e-7)
    assert workers.model.read_bytes() == alone.model.read_bytes()


class Killed(tasks.Line):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if len(self.y) == 8 and output.requires_grad:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(output, target)

    def model(self) -> nn.Module:  # with statistics, so that each is trained by itself
        return nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1), nn.Flatten(0))


def test_a_worker_that_dies_is_an_error_with_the_clients_name() -> None:
    with pytest.raises(OperatorError, match=r"was killed \(SIGKILL\) while it trained site-[25]$"):
        trained("processes", Killed)


def test_an_error_in_a_task_has_the_clients_name_and_its_own() -> None:
    with pytest.raises(RuntimeError, match="RuntimeError: the disk with the scans is gone") as caught:
        trained("processes", tasks.Failing, train={"precision": "bf16"})
    assert caught.value.__notes__[0].startswith("in round 1 at site-")


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1]]
import tasks
from murmur.protocol.recipe import parse_recipe
from murmur.simulation import places, simulate
places.memory_disk = lambda: sys.argv[2]
recipe = parse_recipe(
    {"name": "t", "task": "t", "rounds": 100000, "secure": {"on": False}, "train": {"epochs": 50}}
)
simulate(
    tasks.lines(tasks.Normed, 8), recipe, backend="processes", workers=2, on_round=lambda r: print(r.n, flush=True)
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent_and_a_signal_leaves_no_files(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(how)
    wait_until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], 10, "no worker is left")
    assert how == signal.SIGKILL or not [*tmp_path.iterdir()]


def test_sums_of_parts_are_added_in_their_order() -> None:
    from murmur.simulation.cohorts import Part, joined, parts

    assert [len(p) for p in parts(range(130), together=False)] == [3] * 43 + [1]  # pyright: ignore[reportArgumentType]: any sequence
    assert [len(p) for p in parts(range(60), together=True)] == [25, 25, 10]  # pyright: ignore[reportArgumentType]: as above
    found = joined(Part(sums={"w": np.array([x])}, weight=1, measured={"loss": (x, 1)}) for x in (1e16, 1.0, -1e16))
    assert found.sums["w"] == [0.0]  # from the left 1 is lost; from the right it would be there
    assert (found.weight, found.measured["loss"]) == (3, (0.0, 3))
