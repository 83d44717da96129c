"""The training loop: a job on one rank. The same code runs in the ranks of a trainer and inside a simulation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ..job import Cancelled, Job, Progress, Result
from ..task import Task, optional
from .batches import PoissonSchedule, Schedule, Step, move
from .checkpoint import Checkpoints
from .dpsgd import DpSgd, dpsgd
from .mesh import Mesh
from .optimization import Stepper, autocast, resolve_precision
from .randomness import derive_seed, seeded
from .ranks import Ranks, Wish
from .session import Session
from .splitting import rows

REPORT_EVERY_S = 1.0
Totals = dict[str, tuple[float, float]]


def run_job(
    task: Task,
    job: Job,
    *,
    group: Ranks | None = None,
    session: Session | None = None,
    report: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Evaluate the job's version on the task's split "test", train from it if asked, and write the update.

    group: the ranks that train together, each of which calls this with the same job; by default this process alone.
    session: keeps model and data between jobs; it brings its own group. report is called on rank 0 about once a
    second. stop is asked on rank 0 before each batch; when it says yes, every rank raises Cancelled.
    A job that was killed goes on from its last checkpoint, if it keeps any, and ends in the bits it would have had.
    The same job gives the same result, bit for bit in one process: every random choice comes from the job's seed,
    round and client, and the global random generators are put back afterwards. Where dp.mode is "local" batches and
    noise are drawn from the operating system instead, anew for each start: who could repeat them could subtract them.
    Raises OperatorError for mistakes in the task or the settings, BadUpdate for a broken model file.
    """
    started = monotonic()
    session = session or Session(group)
    ranks = session.ranks
    mesh = Mesh.of(job.parallel, ranks)
    seed = derive_seed("job", job.seed, job.round, job.client, mesh.seat)
    kept = Checkpoints(job, ranks, parts=mesh.splits_model)
    with seeded(seed, ranks.device), closing(kept) as checkpoints:
        session.load(task, job)
        if job.kind == "inspect":
            examples = _training_examples(session, job)
            return Result(update=None, examples=examples, steps=0, metrics={}, seconds=monotonic() - started)
        test = session.data("test")
        examples = len(test) if test is not None else 0  # pyright: ignore[reportArgumentType]: data() has checked it
        todo = -(-examples // _evaluation_batch(job, mesh))
        train = schedule = None
        if job.kind == "train":
            train = session.data("train")
            examples = _training_examples(session, job)
            private = job.dp.mode == "local"
            schedule = (
                PoissonSchedule(job, examples, ranks, ranks.secret())
                if private
                else Schedule(job, examples, mesh.seats, alike=session.alike(job.train.micro_batch))
            )
            todo += schedule.steps
        saved = checkpoints.find(session.held, examples) if schedule is not None else None
        watch = _Watch(ranks, todo, report, stop)
        if saved is not None and schedule is not None:
            watch.skip(todo - schedule.steps + saved.step)
            metrics = saved.metrics
        else:
            metrics = _evaluate(session, job, test, watch) if test is not None else {}
        if train is None or schedule is None:
            return Result(update=None, examples=examples, steps=0, metrics=metrics, seconds=monotonic() - started)
        with dpsgd(session, job, train) as private:
            steps, train_loss = _train(session, job, train, schedule, watch, checkpoints, metrics, private)
        metrics = {**metrics, "train_loss": train_loss}
        mesh.average(session.statistics)
        session.write_update(job.model, job.update)
    return Result(update=job.update, examples=examples, steps=steps, metrics=metrics, seconds=monotonic() - started)


def _train(
    session: Session,
    job: Job,
    dataset: Dataset[Any],
    schedule: Schedule | PoissonSchedule,
    watch: _Watch,
    checkpoints: Checkpoints,
    metrics: Totals,
    private: DpSgd | None,
) -> tuple[int, tuple[float, float]]:
    """All epochs, or what is left of them; gives the steps that were taken, and sum and count of the loss."""
    ranks, mesh = session.ranks, session.mesh
    wrapped = session.prepare_training(dataset, wrap=private is None)
    session.train()
    stepper = Stepper(session.parameters, job.train, job.mu, ranks.device, session.placement)
    tally = checkpoints.begin(session.held, stepper, metrics)
    schedule = replace(schedule, done=tally.step)
    save = Wish(ranks, checkpoints.due, tally.step)
    loader_seed = derive_seed("loader", job.seed, job.round, job.client, mesh.replica)
    loader = session.batches(dataset, schedule.pieces(), loader_seed)
    counts_itself = session.task is not None and optional(session.task, "count") is not None
    for step in schedule:
        if checkpoints.on and save.agreed(tally.step + 1):
            checkpoints.write(tally, session.held, stepper)
        # Stages draw different numbers, and must see the same examples all the same.
        drawn = seeded(derive_seed(loader_seed, tally.step), ranks.device) if session.pipeline else nullcontext()
        with drawn:
            batches = [next(loader) for _ in step.pieces]
        watch.before_batch()
        seen = _count(session, batches, step)
        own = seen if mesh.speaks else 0
        # The exact mean of the whole batch needs its count before the first backward pass.
        count = ranks.sum([own])[0] if counts_itself and private is None else step.examples
        scale = mesh.replicas / max(count, 1)  # DDP and FSDP divide by their number again
        step_loss = torch.zeros_like(tally.loss_sum)
        if session.pipeline is not None:
            scaled = functools.partial(stepper.scaled, scale)
            step_loss += session.pipeline.train(batches, step, stepper.precision, loss=session.loss, scaled=scaled)
        whole = zip(batches, step.real, strict=True) if session.pipeline is None else ()
        for number, ((inputs, target), real) in enumerate(whole, 1):
            sync = number == len(batches) or ranks.world == 1 or private is not None
            with session.exchange(wrapped, sync):
                with autocast(stepper.precision, ranks.device):
                    loss = session.loss(wrapped(move(inputs, ranks.device)), move(target, ranks.device))
                stepper.backward(loss * (scale if real else 0.0) if private is None else loss)
            if private is not None:
                private.take(len(step.pieces[number - 1]))
            if real:
                step_loss += loss.detach()
        if private is not None:
            private.finish()
        stepper.step()
        tally.step += 1
        tally.loss_sum += step_loss * mesh.speaks
        tally.loss_count += own
        watch.after_batch(step_loss, seen, step.examples)
    total, count = ranks.sum([float(tally.loss_sum), tally.loss_count])
    return stepper.taken, (total, count)


def _training_examples(session: Session, job: Job) -> int:
    train = session.data("train")
    examples = len(train) if train is not None else 0  # pyright: ignore[reportArgumentType]: data() has checked it
    if not examples:
        raise OperatorError('the task\'s data("train") is empty: this client has nothing to train on')
    if job.expected not in {0, examples}:
        raise OperatorError(
            f"the task's data(\"train\") has {examples} examples, and this site's ledger was charged for "
            f"{job.expected}: the data changed in between"
        )
    return examples


def _count(session: Session, batches: list[tuple[Any, Any]], step: Step) -> int:
    """What the loss sums over in this rank's examples, those that only fill a batch up left out."""
    found = zip(batches, step.pieces, step.real, strict=True)
    return sum(session.count(_real(target, piece, real), real) for (_, target), piece, real in found if real)


def _real(value: Any, piece: Tensor, real: int) -> Any:
    return value if real == len(piece) else rows(value, 0, real)


def _evaluation_batch(job: Job, mesh: Mesh) -> int:
    return (job.train.micro_batch or job.train.batch_size) * mesh.replicas


@torch.no_grad()
def _evaluate(session: Session, job: Job, dataset: Dataset[Any], watch: _Watch) -> Totals:
    """Sums and counts over the whole data set: `loss`, and those of the task's metrics that the job names."""
    ranks, mesh, task = session.ranks, session.mesh, session.task
    assert task is not None, "load() sets it"
    names = ["loss", *(n for n in dict.fromkeys(job.metrics) if n != "loss")]
    measure = optional(task, "metrics") if len(names) > 1 else None
    sums = {name: torch.zeros((), dtype=torch.float64, device=ranks.device) for name in names}
    counts = dict.fromkeys(names, 0.0)
    size: int = len(dataset)  # pyright: ignore[reportArgumentType]: data() has checked it
    largest = _evaluation_batch(job, mesh)
    whole = torch.arange(size).split(largest) if size else ()
    steps = [_evaluation_step(session, batch, min(largest, size)) for batch in whole]
    loader = session.batches(dataset, (piece for step in steps for piece in step.pieces), 0)
    precision = resolve_precision(job.train.precision, ranks.device)
    session.train(False)
    for step in steps:
        watch.before_batch()
        loss = torch.zeros_like(sums["loss"])
        batches = [next(loader) for _ in step.pieces]
        seen = _count(session, batches, step)
        outputs = session.outputs([inputs for inputs, _ in batches], precision) or ()
        for output, (_, target), piece, real in zip(outputs, batches, step.pieces, step.real, strict=False):
            if not real:
                continue
            target = _real(target, piece, real)
            count, target = session.count(target, real), move(target, ranks.device)
            with autocast(precision, ranks.device):
                value = session.loss(output := _real(output, piece, real), target)
                measured = _pairs(measure(output, target)) if measure else {}
            loss += value
            for name, (amount, of) in {**measured, "loss": (value, count)}.items():
                if name in sums and mesh.speaks:
                    sums[name] += amount
                    counts[name] += float(of)
        watch.after_batch(mesh.total(loss, "pipeline"), seen, step.examples)
    flat = ranks.sum([float(sums[n]) for n in names] + [counts[n] for n in names])
    totals = zip(names, flat[: len(names)], flat[len(names) :], strict=True)
    return {name: (total, count) for name, total, count in totals if count > 0}


def _evaluation_step(session: Session, batch: Tensor, largest: int) -> Step:
    seats = session.mesh.seats
    if (alike := session.alike(0)) is not None:
        return alike.cut(batch, seats.rank, seats.world, largest)
    mine = batch[seats.rank :: seats.world]
    return Step(len(batch), (mine,) if len(mine) else (), stand_in=False)


def _pairs(measured: Any) -> dict[str, tuple[Tensor | float, float]]:
    if isinstance(measured, Mapping) and all(isinstance(v, (tuple, list)) and len(v) == 2 for v in measured.values()):
        return {str(name): (value, of) for name, (value, of) in measured.items()}
    raise OperatorError("the task's metrics must be a dict of pairs: {name: (sum, count)}")


class _Watch:
    """Counts the batches of a job, tells about them at a pace, and lets the job be stopped between two of them."""

    def __init__(
        self, ranks: Ranks, steps: int, report: Callable[[Progress], None] | None, stop: Callable[[], bool] | None
    ) -> None:
        self.steps, self.step, self.first = steps, 0, 1
        self.report = report if ranks.rank == 0 else None
        self.stop = Wish(ranks, stop or (lambda: False))
        self.told_at = monotonic()
        self.loss: Tensor | float = 0.0
        self.count = self.examples = 0

    def skip(self, batches: int) -> None:
        """Begin behind these: they were done before this process."""
        self.step, self.first = batches, batches + 1
        self.stop = Wish(self.stop.ranks, self.stop.wished, batches)

    def before_batch(self) -> None:
        """Raises Cancelled, on every rank before the same batch."""
        if self.stop.agreed(self.step + 1):
            raise Cancelled(f"stopped after {self.step} of {self.steps} batches")

    def after_batch(self, loss: Tensor, count: int, examples: int) -> None:
        """loss, count: of this rank; it is read from the device only when it is told."""
        self.step += 1
        if self.report is None:
            return
        self.loss, self.count, self.examples = self.loss + loss.detach(), self.count + count, self.examples + examples
        elapsed = monotonic() - self.told_at
        if elapsed >= REPORT_EVERY_S or self.step in (self.first, self.steps):
            mean, pace = float(self.loss) / max(1, self.count), self.examples / max(elapsed, 1e-9)
            self.report(Progress(step=self.step, steps=self.steps, loss=mean, examples_per_s=pace))
            self.told_at, self.loss, self.count, self.examples = monotonic(), 0.0, 0, 0
