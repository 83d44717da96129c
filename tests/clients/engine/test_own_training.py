"""A task's own training loop: what it is given, what becomes of it, and what does not go with it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import initial_model, map_tensors, read_model
from murmur.clients.job import Cancelled, Job, Progress
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.sections import Dp, Parallel, Train
from murmur.protocol.tensors import read_layout
from murmur.simulation import simulate

sys.path.insert(0, str(Path(__file__).parent))
from own_tasks import Hand, Lossy, Measured

FILE = Path(__file__).with_name("own_tasks.py")


def make(folder: Path, task: Any = None, **settings: Any) -> Job:
    initial_model(task or Hand(), 7, folder / "model")
    train = Train(**{"lr": 0.1, "steps": 3} | settings.pop("train", {}))
    values = {"id": "job", "kind": "train", "mu": 0.0, "metrics": ("loss",), "seed": 3, "round": 2, "client": "north"}
    return Job(model=folder / "model", update=folder / "update", train=train, **(values | settings))


def by_hand(task: Hand, job: Job, steps: int = 3) -> torch.Tensor:
    """How far plain descent on half the mean squared error moves the weights."""
    module = task.model()
    read_model(module, job.model)
    start = module[0].weight.detach().clone()  # type: ignore[index]
    w = start.clone()
    for _ in range(steps):
        w -= 0.1 * ((w @ task.x.T - task.y) @ task.x) / len(task.x)
    return w - start


def update(job: Job) -> torch.Tensor:
    return map_tensors(job.update, read_layout(job.model).update())["0.weight"].clone()


def test_the_update_is_what_the_tasks_loop_has_moved(tmp_path: Path) -> None:
    task, job, told = Hand(), make(tmp_path), list[Progress]()
    result = run_job(task, job, report=told.append)
    torch.testing.assert_close(update(job), by_hand(task, job), atol=1e-6, rtol=0)
    assert (result.examples, result.steps, [*result.metrics]) == (6, 3, ["train_loss"])
    assert (told[0].step, told[-1].step, told[-1].steps) == (1, 3, 3)
    (given,) = task.seen
    assert (given.round, given.client, given.rank, given.world, given.settings) == (2, "north", 0, 1, job.train)
    assert result.metrics["train_loss"][1] == 18  # three reports of six examples


def test_a_task_measures_itself_or_is_measured_by_its_loss(tmp_path: Path) -> None:
    for task in (Measured(), Lossy()):
        job = make(tmp_path, task)
        total, count = run_job(task, job).metrics["loss"]
        module = task.model()
        read_model(module, job.model)
        assert count == 2
        assert total == pytest.approx(float(((module(task.x[:2]) - task.y[:2]) ** 2).sum().detach()), rel=1e-5)
        assert run_job(task, replace(job, kind="evaluate")).metrics == {"loss": (pytest.approx(total), 2)}


def test_rounds_of_such_tasks_are_masked_or_plain_as_any(tmp_path: Path) -> None:
    federation = {f"c{k}": Hand(seed=k) for k in range(3)}
    recipe = parse_recipe({"name": "t", "task": "t", "rounds": 1, "train": {"lr": 0.1, "steps": 3}})
    histories = simulate(federation, recipe, secure="real"), simulate(federation, recipe, secure=False)
    job = Job(**{**{n: getattr(make(tmp_path), n) for n in Job.__slots__}, "model": tmp_path / "first"})
    initial_model(federation["c0"], 0, job.model)
    start = map_tensors(job.model, read_layout(job.model))["0.weight"]
    moved = sum(len(t.x) * by_hand(t, job) for t in federation.values()) / sum(len(t.x) for t in federation.values())
    for history, near in zip(histories, (1e-3, 1e-6), strict=True):
        torch.testing.assert_close(history.state_dict()["0.weight"], start + moved, atol=near, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"distill": {"weight": 1.0}}}, r"train\.distill"),
        ({"train": {"balanced": True, "compile": True}}, r"train\.balanced, train\.compile"),
        ({"mu": 0.1}, r"strategy\.mu"),
        ({"algorithm": "scaffold"}, r'strategy\.name = "scaffold"'),
        ({"parallel": Parallel(reduce="powersgd")}, r'parallel\.reduce = "powersgd"'),
        ({"dp": Dp(mode="local")}, r'dp\.mode = "local"'),
    ],
)
def test_what_the_engines_loop_does_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OperatorError, match=words + ".*this task has a train"):
        run_job(Hand(), make(tmp_path, **settings))


def test_a_training_that_is_stopped_ends_at_its_next_report(tmp_path: Path) -> None:
    task, job = Hand(), make(tmp_path)
    with pytest.raises(Cancelled, match="after 1 of 3 steps"):
        run_job(task, job, stop=lambda: bool(task.seen))
    assert not job.update.exists()


def test_a_site_whose_time_is_over_sends_what_there_is(tmp_path: Path) -> None:
    task, job = Hand(), make(tmp_path, train_s=1e-9)
    assert run_job(task, job).steps == 1
    torch.testing.assert_close(update(job), by_hand(task, job, steps=1), atol=1e-6, rtol=0)


def test_a_model_that_comes_back_with_other_tensors_is_no_update(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"other tensors than it came with \(2.bias\)"):
        run_job(Hand("grown"), make(tmp_path))


def test_what_a_loop_froze_trains_again_in_the_next_round(tmp_path: Path) -> None:
    task, session, job = Hand("frozen"), Session(), make(tmp_path)
    for _ in range(2):
        run_job(task, job, session=session)
        torch.testing.assert_close(update(job), by_hand(task, job), atol=1e-6, rtol=0)


def test_what_stays_at_the_site_is_kept_for_its_next_round(tmp_path: Path) -> None:
    task = Hand()
    task.model = lambda: torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))  # type: ignore[method-assign]
    task.local = ("0.bias",)  # type: ignore[attr-defined]
    job = make(tmp_path, task)
    run_job(task, job)
    assert [t.name for t in read_layout(job.update).tensors] == ["0.weight"]
    assert any("0.bias" in t.name for t in read_layout(job.own_after).tensors)


def test_a_killed_client_finds_its_folder_again_for_the_same_job_only(tmp_path: Path) -> None:
    task, folders = Hand(), list[Path]()
    for digest in ("a" * 64, "a" * 64, "b" * 64):
        run_job(task, make(tmp_path, checkpoint=tmp_path / "kept", checkpoint_s=60.0, digest=digest))
        folders.append(task.seen[-1].checkpoint)
    assert folders[0] == folders[1] != folders[2]
    assert (folders[0] / "step").read_text() == "3"
    run_job(task, make(tmp_path))
    assert task.seen[-1].checkpoint is None


def test_a_task_needs_a_loss_or_a_loop(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("class Bare:\n    def model(self): ...\n    def data(self, split): ...\n")
    with pytest.raises(OperatorError, match="without loss"):
        load_task(f"{tmp_path / 'bare.py'}:Bare", {})
    load_task(f"{FILE}:Hand", {})


@pytest.mark.slow
def test_of_several_processes_rank_0_has_the_update(tmp_path: Path) -> None:
    job = make(tmp_path)
    with Trainer(f"{FILE}:Hand", {"how": "ranks"}, processes=2, workdir=tmp_path) as trainer:
        result = trainer.run(job)
    torch.testing.assert_close(update(job), by_hand(Hand(), job), atol=1e-6, rtol=0)
    assert result.metrics["train_loss"][1] == 36  # both ranks report all of their examples
