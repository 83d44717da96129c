from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import initial_model, map_tensors
from murmur.clients.job import Job, Result
from murmur.clients.task import Task, load_task
from murmur.clients.trainer import Trainer
from murmur.protocol.sections import Train
from murmur.protocol.tensors import read_layout

TASKS = Path(__file__).with_name("sample_tasks.py")
Update = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task() -> Callable[..., Task]:
    return lambda name="Rows", **options: load_task(f"{TASKS}:{name}", options)


@pytest.fixture
def make_job(tmp_path: Path, task: Callable[..., Task]) -> Callable[..., Job]:
    """A job on a new model of the named task; keywords of Train and of Job are taken alike."""

    def make(name: str = "Rows", options: dict[str, Any] | None = None, **settings: Any) -> Job:
        model = tmp_path / f"{name}.model"
        initial_model(task(name, **(options or {})), 7, model)
        train = Train(**{k: settings.pop(k) for k in [*settings] if k in Train.model_fields})
        values: dict[str, Any] = {
            "id": "job",
            "kind": "train",
            "model": model,
            "update": tmp_path / "update",
            "train": train,
            "mu": 0.0,
            "metrics": ("loss", "accuracy"),
            "seed": 3,
            "round": 1,
            "client": "north",
        }
        return Job(**(values | settings))

    return make


@pytest.fixture
def alone(task: Callable[..., Task], make_job: Callable[..., Job]) -> Callable[..., tuple[Update, Result]]:
    """Train in this process: the update as tensors, and the result."""

    def run(name: str = "Rows", options: dict[str, Any] | None = None, **settings: Any) -> tuple[Update, Result]:
        job = make_job(name, options, **settings)
        result = run_job(task(name, **(options or {})), job)
        return tensors(job.update), result

    return run


@pytest.fixture
def in_ranks(tmp_path: Path, make_job: Callable[..., Job]) -> Callable[..., tuple[Update, Result]]:
    """Train in two ranks of a trainer: the update as tensors, and the result."""

    def run(name: str = "Rows", options: dict[str, Any] | None = None, **settings: Any) -> tuple[Update, Result]:
        job = make_job(name, options, **settings)
        with Trainer(f"{TASKS}:{name}", options or {}, processes=2, workdir=tmp_path) as trainer:
            result = trainer.run(job)
        return tensors(job.update), result

    return run


def tensors(path: Path) -> Update:
    return {name: tensor.clone() for name, tensor in map_tensors(path, read_layout(path)).items()}
