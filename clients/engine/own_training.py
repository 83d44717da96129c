"""A task that trains by itself, with a trainer that brings its loop: the engine reads the version and takes the update.

version ── model on its device ── task.train(context) ── trained minus incoming
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from ...protocol.errors import OperatorError
from ...protocol.messages import TRAIN_LOSS
from ...protocol.sections import Train
from ..job import Cancelled, Job, Progress, Result
from ..task import Task, optional
from .own import LOCAL, write_own
from .randomness import derive_seed
from .session import Session
from .state import named_tensors, write_update

REPORT_EVERY_S = 1.0
BY_THE_LOOP = ("balanced", "mixture", "qat", "keep_zeros", "distill", "compile")  # of a recipe's `train`
Totals = dict[str, tuple[float, float]]
Told = Callable[[Progress], None] | None
Asked = Callable[[], bool] | None


@dataclass(kw_only=True)
class TrainContext:
    """What a task's `train(context)` and `evaluate(context)` are given, on every rank.

    model: at the round's version, on `device`, not wrapped; what rank 0's has become when `train` returns is the
    update. data: the task's own, of "train" or of "test". settings: the recipe's `train`; lr, and steps, which is the
    number of optimizer steps of a round over these data, are of it. seed: the job's, with which the global generators
    of torch, numpy and Python are seeded already. checkpoint: a folder that a killed client finds again in the same
    round, where something may be kept.
    """

    model: nn.Module
    data: Any
    device: torch.device
    rank: int
    world: int
    round: int
    client: str
    seed: int
    settings: Train
    steps: int
    checkpoint: Path | None
    reporter: Reporter

    @property
    def lr(self) -> float:
        return self.settings.lr

    def report(self, step: int, loss: float, examples: int = 1) -> None:
        """Say that a step is done, with the mean loss over so many examples: a sign of life, and the train_loss.

        Raises Cancelled where the training is to end; let it through.
        """
        self.reporter.take(step, loss, examples)

    @property
    def over(self) -> bool:
        """Whether the site's time for a training (`train_s`) is over: stop then, and what there is is sent."""
        return self.reporter.until is not None and monotonic() >= self.reporter.until


@dataclass(kw_only=True)
class Reporter:
    """Counts a training's steps and losses, tells of them once a second, and stops it where asked to."""

    steps: int
    told: Told
    stop: Asked
    until: float | None
    step: int = 0
    loss: float = 0.0
    examples: float = 0.0
    at: float = field(default_factory=monotonic)

    def take(self, step: int, loss: float, examples: int) -> None:
        self.step = max(self.step, step)
        self.loss, self.examples = self.loss + float(loss) * examples, self.examples + examples
        if self.stop is not None and self.stop():
            raise Cancelled(f"stopped after {self.step} of {self.steps} steps")
        if self.told is not None and (monotonic() - self.at >= REPORT_EVERY_S or self.step in (1, self.steps)):
            self.at = monotonic()
            self.told(Progress(step=self.step, steps=self.steps, loss=float(loss), examples_per_s=0.0))


def trains_by_itself(task: Task) -> bool:
    """Whether the task has a loop of its own; an nn.Module's `train` is none."""
    return optional(task, "train") is not None and not isinstance(task, nn.Module)


def train_by_itself(
    session: Session, job: Job, examples: int, metrics: Callable[[], Totals], told: Told, stop: Asked
) -> Result:
    """Measure the version, have the task train from it if asked, and write the update on rank 0.

    examples: of its data. metrics: the engine's own measuring, for a task that has a loss and no `evaluate`.
    told is called on rank 0; stop is asked at each report of a process alone, several are killed. Raises OperatorError
    for settings that only the engine's loop has, and for a model that has come back with other tensors.
    """
    started, ranks, task = monotonic(), session.ranks, session.task
    assert task is not None, "load() sets it"
    if job.kind == "train":
        _check(job)
    seed = derive_seed("job", job.seed, job.round, job.client, session.mesh.seat)
    steps = job.train.steps_over(examples)
    reporter = Reporter(
        steps=steps,
        told=told if ranks.rank == 0 else None,
        stop=stop if ranks.world == 1 else None,
        until=monotonic() + job.train_s if job.train_s else None,
    )

    def context(split: str) -> TrainContext:
        return TrainContext(
            model=session.module,
            data=session.data(split),
            device=ranks.device,
            rank=ranks.rank,
            world=ranks.world,
            round=job.round,
            client=job.client,
            seed=seed,
            settings=job.train,
            steps=steps,
            checkpoint=_folder(job) if split == "train" else None,
            reporter=reporter,
        )

    if ranks.world > 1:  # as torchrun has them; the process group is there already
        of_rank = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local, "WORLD_SIZE": ranks.world}
        os.environ.update({name: str(value) for name, value in of_rank.items()})
    found = _measured(task, context("test")) if session.data("test") is not None else {}
    if found is None:
        found = metrics()
    if job.kind != "train":
        return Result(update=None, examples=examples, steps=0, metrics=found, seconds=monotonic() - started)
    before = {name: t.shape for name, t in named_tensors(session.module).items()}
    trains = {name: p.requires_grad for name, p in session.module.named_parameters()}
    session.train()
    job.own_after.unlink(missing_ok=True)  # of an earlier start of this job
    own: Any = task
    with torch.enable_grad():
        own.train(context("train"))
    after = named_tensors(session.module)
    if before != {name: t.shape for name, t in after.items()}:
        differing = sorted(before.keys() ^ after.keys()) or ["the shape of one"]
        raise OperatorError(
            f"the task's train(context) has left context.model with other tensors than it came with ({differing[0]}): "
            "take off what it has put around it"
        )
    for name, parameter in session.module.named_parameters():
        parameter.requires_grad_(trains[name])
        parameter.grad = None
    total, count = ranks.sum([reporter.loss, reporter.examples])
    if count:
        found = {**found, TRAIN_LOSS: (total, count)}
    if ranks.rank == 0:
        write_update(after, job.model, job.update)
        if session.local:
            write_own(job, LOCAL, session.local)
    seconds = monotonic() - started
    return Result(update=job.update, examples=examples, steps=reporter.step, metrics=found, seconds=seconds)


def _measured(task: Task, context: TrainContext) -> Totals | None:
    """What the task's own `evaluate` gives; without one nothing, or None where the engine can measure by a loss."""
    measure = optional(task, "evaluate")
    if measure is None:
        return None if optional(task, "loss") else {}
    context.model.eval()
    with torch.no_grad():
        given: Any = measure(context)
    if not isinstance(given, Mapping) or not all(isinstance(v, tuple) and len(v) == 2 for v in given.values()):
        raise OperatorError("the task's evaluate(context) must give a dict of pairs: {name: (sum, count)}")
    return {str(name): (float(total), float(count)) for name, (total, count) in given.items()}


def _folder(job: Job) -> Path | None:
    if job.checkpoint is None or not job.checkpoint_s:
        return None
    folder = job.checkpoint / f"task-{job.digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check(job: Job) -> None:
    """Raise OperatorError for what only the engine's loop does."""
    plan = job.parallel
    wanted = [f"train.{name}" for name in BY_THE_LOOP if getattr(job.train, name) != getattr(Train(), name)]
    wanted += ["strategy.mu"] if job.mu else []
    wanted += [f'strategy.name = "{job.algorithm}"'] if job.algorithm != "plain" else []
    wanted += [f"parallel.{name}" for name in ("shard", "tensor", "pipeline") if getattr(plan, name) > 1]
    wanted += [f'parallel.reduce = "{plan.reduce}"'] if plan.reduce != "allreduce" else []
    wanted += ['dp.mode = "local"'] if job.dp.mode == "local" else []
    if wanted:
        raise OperatorError(
            f"{', '.join(wanted)}: done by the engine's own loop, and this task has a train(context) of its own. Leave "
            "it out, or give the task a loss in place of train"
        )
