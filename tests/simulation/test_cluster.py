"""A local Ray against the backends of one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from typing import Any

import pytest
import tasks
import torch

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.simulation import History, cluster, simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def local() -> Generator[None]:
    """One Ray for all of these, which `simulate` finds running and leaves so."""
    ray = cluster._ray()  # pyright: ignore[reportPrivateUsage]: with telemetry off
    ray.init("local", **cluster._here(2), log_to_driver=False)  # pyright: ignore[reportPrivateUsage]: as `simulate` does
    yield
    assert ray.is_initialized()
    ray.shutdown()


def trained(backend: Any, kind: Any = tasks.Line, workers: int = 2, **values: Any) -> History:
    given: dict[str, Any] = {"name": "t", "task": "t", "rounds": 2, "secure": {"on": False}, "metrics": ("accuracy",)}
    recipe = parse_recipe(given | {"train": {"batch_size": 4, "lr": 0.05, "epochs": 2}} | values)
    return simulate(tasks.lines(kind, 7), recipe, backend=backend, workers=workers, secure=None)


@pytest.mark.parametrize(
    ("kind", "values"),
    [(tasks.Line, {}), (tasks.Normed, {}), (tasks.Line, {"strategy": {"name": "scaffold"}})],
    ids=["together", "one by one", "what clients keep"],
)
def test_actors_give_the_model_of_one_process(kind: Any, values: dict[str, Any]) -> None:
    alone, actors = trained("sequential", kind, **values), trained("ray", kind, **values)
    assert actors.backend == "ray"
    a, b = alone.state_dict(), actors.state_dict()
    for name, tensor in a.items():
        assert torch.allclose(tensor.double(), b[name].double(), rtol=0, atol=1e-6), name
    for x, y in zip(alone.versions, actors.versions, strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    if kind is tasks.Normed:
        assert torch.equal(a["1.num_batches_tracked"], b["1.num_batches_tracked"])


@pytest.mark.parametrize(
    "values", [{"secure": {"on": True}, "strategy": {"max_weight": 8}}, {"strategy": {"combine": "median"}}]
)
def test_updates_that_are_looked_at_one_by_one_have_the_bits_of_one_process(values: dict[str, Any]) -> None:
    alone, actors = trained("sequential", **values), trained("ray", **values)
    assert actors.model.read_bytes() == alone.model.read_bytes()


def test_an_error_in_a_task_has_the_clients_name() -> None:
    with pytest.raises(RuntimeError, match="the disk with the scans is gone") as caught:
        trained("ray", tasks.Failing, workers=1, train={"precision": "bf16"})
    assert caught.value.__notes__[0].startswith("in round 1 at site-")


class Leaving(tasks.Line):
    """Its process is gone in the midst of training."""

    def loss(self, output: Any, target: Any) -> Any:
        os._exit(3)


def test_an_actor_that_dies_is_an_error_with_its_clients() -> None:
    with pytest.raises(OperatorError, match="Ray lost what trained site-0 or site-2 or site-4 or site-6"):
        trained("ray", Leaving, train={"precision": "bf16"})


def test_what_ray_cannot_send_or_has_no_room_for_is_refused_before_the_first_round() -> None:
    lock = threading.Lock()
    with pytest.raises(OperatorError, match=r"Ray cannot send the federation to its workers: .*lock"):
        trained("ray", lambda *given: lock and tasks.Line(*given))
    with pytest.raises(OperatorError, match="Ray has 2 CPUs, and each of 3 workers needs one"):
        trained("ray", workers=3)


def test_a_run_whose_clients_files_were_with_ray_is_not_resumed() -> None:
    with pytest.raises(OperatorError, match="begin it anew, without resume"):
        simulate(tasks.lines(), backend="ray", resume="t-1")
