"""The training loop: a job on one rank. The same code runs in the ranks of a trainer and inside a simulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ..job import Cancelled, Job, Progress, Result
from ..task import Task, at_home, optional
from .batches import PoissonSchedule, Schedule, Step, move
from .checkpoint import Checkpoints
from .compression import Shaping
from .distillation import Teacher
from .dpsgd import DpSgd, dpsgd
from .exchange import exchange
from .local import Outcome, local_algorithm
from .mesh import Mesh
from .optimization import Stepper, autocast, resolve_precision
from .own import LOCAL, write_own
from .own_training import train_by_itself, trains_by_itself
from .randomness import derive_seed, seeded
from .ranks import Ranks, Wish, out_of_memory
from .session import Session
from .sources import Sets, in_turn, sizes
from .splitting import rows
from .state import write_tensors, write_update

log = logging.getLogger(__name__)

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
    Where train.micro_batch is "auto", a job that ran out of memory begins anew with half as many.
    Raises OperatorError for mistakes in the task or the settings, BadUpdate for a broken model file.
    """
    session = session or Session(group)
    while True:
        try:
            return _run(task, session.pieces.fit(job, session.ranks.world), session, report, stop)
        except (MemoryError, RuntimeError) as error:
            # Only what one process alone can decide; ranks of a trainer are given a number.
            if session.ranks.world > 1 or not out_of_memory(error) or not session.pieces.shrink(job, 1):
                raise
        if session.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def _run(
    task: Task,
    job: Job,
    session: Session,
    report: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
) -> Result:
    started, ranks = monotonic(), session.ranks
    mesh = Mesh.of(job.parallel, ranks)
    seed = derive_seed("job", job.seed, job.round, job.client, mesh.seat)
    if (work := optional(task, "work")) is not None:
        with seeded(seed, ranks.device):
            return work(job, ranks, report if ranks.rank == 0 else None, stop)
    kept = Checkpoints(job, ranks, parts=mesh.splits_model)
    with at_home(task), seeded(seed, ranks.device), closing(kept) as checkpoints:
        session.load(task, job)
        if job.kind == "inspect":
            _, examples = training_data(session, job)
            return Result(update=None, examples=examples, steps=0, metrics={}, seconds=monotonic() - started)
        test = session.data("test")
        examples = sum(sizes(test)) if test is not None else 0
        if trains_by_itself(task):
            batches = sum(1 for _ in in_turn(test, _evaluation_batch(job, mesh))) if test is not None else 0
            watch = Watch(ranks, batches, report, stop)
            examples = training_data(session, job)[1] if job.kind == "train" else examples
            measure = partial(evaluate, session, job, test, watch) if test is not None else Totals
            return train_by_itself(session, job, examples, measure, report, stop)
        todo = sum(1 for _ in in_turn(test, _evaluation_batch(job, mesh))) if test is not None else 0
        train = schedule = None
        if job.kind == "train":
            train, examples = training_data(session, job)
            if ranks.rank == 0:
                job.own_after.unlink(missing_ok=True)  # of an earlier start of this job
            if job.dp.mode == "local":
                session.drawing(job, train)  # refuses what could not be accounted for
                schedule = PoissonSchedule(job, examples, ranks, ranks.secret())
            else:
                schedule = Schedule(
                    job,
                    examples,
                    mesh.seats,
                    drawing=session.drawing(job, train),
                    sets=train if isinstance(train, Sets) else None,
                    in_company=not mesh.splits_model and session.needs_company(train),
                    alike=session.alike(job.train.piece if job.train.micro_batch else 0),
                )
            todo += schedule.steps
        saved = checkpoints.find(session.held, examples) if schedule is not None else None
        watch = Watch(ranks, todo, report, stop)
        if saved is not None and schedule is not None:
            watch.skip(todo - schedule.steps + saved.step)
            metrics = saved.metrics
        else:
            metrics = evaluate(session, job, test, watch) if test is not None else {}
        if train is None or schedule is None:
            return Result(update=None, examples=examples, steps=0, metrics=metrics, seconds=monotonic() - started)
        with dpsgd(session, job, train) as private:
            steps, train_loss, outcome = _train(session, job, train, schedule, watch, checkpoints, metrics, private)
        metrics = {**metrics, "train_loss": train_loss}
        mesh.average(session.statistics)
        trained = session.trained(job)
        if ranks.rank == 0:
            whole = {**trained, **outcome.tensors} if outcome.tensors else trained
            write_update(whole, job.model, job.update, scale=outcome.scale)
            if outcome.own:
                write_tensors(outcome.own, job.own_after)
            if session.local:
                write_own(job, LOCAL, session.local)
        session.rebalance()
    return Result(
        update=job.update,
        examples=examples,
        steps=steps,
        metrics=metrics,
        seconds=monotonic() - started,
        effective_steps=outcome.effective_steps,
    )


def _train(
    session: Session,
    job: Job,
    dataset: Dataset[Any],
    schedule: Schedule | PoissonSchedule,
    watch: Watch,
    checkpoints: Checkpoints,
    metrics: Totals,
    private: DpSgd | None,
) -> tuple[int, tuple[float, float], Outcome]:
    """All steps, or what is left of them; gives the steps that were taken, sum and count of the loss, and the rest."""
    ranks, mesh = session.ranks, session.mesh
    peers = exchange(job, ranks, session.parameters)
    by_ddp = peers.by_ddp and private is None
    wrapped = session.prepare_training(dataset, job, wrap=by_ddp)
    wrapped.train()
    session.train()
    teacher = Teacher(session, job.train.distill) if job.train.distill.weight else None
    local = local_algorithm(job, session.shared, personal=bool(session.local))
    stepper = Stepper(session.parameters, job.train, local, ranks.device, session.placement)
    stepper.kept |= peers.state
    shaping = Shaping(session.module, job.train)  # by the zeros of the round's model, also where it goes on
    tally = checkpoints.begin(session.held, stepper, metrics, dataset)
    schedule = replace(schedule, done=tally.step)
    save = Wish(ranks, checkpoints.due, tally.step)
    until = monotonic() + job.train_s
    spent = Wish(ranks, lambda: monotonic() >= until, tally.step)
    loader_seed = derive_seed("loader", job.seed, job.round, job.client, mesh.replica)
    loader = session.batches(dataset, schedule.pieces(), loader_seed)
    counts_itself = session.task is not None and optional(session.task, "count") is not None
    for step in schedule:
        if job.train_s and tally.step and spent.agreed(tally.step + 1):
            log.info("train_s is over", extra={"steps": tally.step, "of": schedule.steps})
            break
        if checkpoints.on and save.agreed(tally.step + 1):
            checkpoints.write(tally, session.held, stepper)
        # Stages draw different numbers, and must see the same examples all the same.
        drawn = seeded(derive_seed(loader_seed, tally.step), ranks.device) if session.pipeline else nullcontext()
        with drawn:
            batches = [next(loader) for _ in step.pieces]
        watch.before_batch()
        seen = _count(session, batches, step)
        own = seen if mesh.speaks else 0
        # The exact mean of the whole batch needs its count before the first backward pass; ranks that are apart, which
        # exchange nothing here, take the mean of their own part.
        count = step.examples
        if counts_itself and private is None:
            count = own * ranks.world if peers.apart else ranks.sum([own])[0]
        shaping.begin()
        scale = mesh.replicas / max(count, 1)  # the mean over replicas divides by their number again
        step_loss = torch.zeros_like(tally.loss_sum)
        if session.pipeline is not None:
            scaled = partial(stepper.scaled, scale)
            step_loss += session.pipeline.train(batches, step, stepper.precision, loss=session.loss, scaled=scaled)
        here = zip(batches, step.real, strict=True) if session.pipeline is None else ()
        for number, ((inputs, target), real) in enumerate(here, 1):
            sync = number == len(batches) or ranks.world == 1 or not by_ddp
            with session.exchange(wrapped, sync):
                with autocast(stepper.precision, ranks.device):
                    inputs = move(inputs, ranks.device)
                    output = wrapped(inputs)
                    loss = session.loss(output, move(target, ranks.device))
                    whole = loss + teacher.loss(inputs, output) if teacher else loss
                stepper.backward(whole * (scale if real else 0.0) if private is None else whole)
            if private is not None:
                private.take(len(step.pieces[number - 1]))
            if real:
                step_loss += loss.detach()
        if private is not None:
            private.finish()
        shaping.end()
        peers.gradients()
        stepper.step()
        tally.step += 1
        peers.weights(tally.step)
        tally.loss_sum += step_loss * mesh.speaks
        tally.loss_count += own
        watch.after_batch(step_loss, seen, step.examples)
    peers.finish(tally.step)
    total, count = ranks.sum([float(tally.loss_sum), tally.loss_count])
    return stepper.taken, (total, count), stepper.local.finish(stepper.taken)


def training_data(session: Session, job: Job) -> tuple[Dataset[Any], int]:
    """The train data and its examples, each counted once: an update weighs that, however they are drawn."""
    train = session.data("train")
    examples = sum(sizes(train)) if train is not None else 0
    if train is None or not examples:
        raise OperatorError('the task\'s data("train") is empty: this client has nothing to train on')
    if job.expected not in {0, examples}:
        raise OperatorError(
            f"the task's data(\"train\") has {examples} examples, and this site's ledger was charged for "
            f"{job.expected}: the data changed in between"
        )
    fewest, most = session.ranks.least(examples), -session.ranks.least(-examples)
    if fewest != most:
        raise OperatorError(
            f'the task\'s data("train") has {fewest:.0f} examples on one process and {most:.0f} on another: each '
            "takes its part of the same data set, so all need the whole of it"
        )
    if session.pipeline is not None and isinstance(train, Sets):
        raise OperatorError(
            "parallel.pipeline takes one data set, of whose examples all have one shape: join several with "
            "torch.utils.data.ConcatDataset, or use parallel.shard or parallel.tensor"
        )
    return train, examples


def _count(session: Session, batches: list[tuple[Any, Any]], step: Step) -> int:
    """What the loss sums over in this rank's examples, those that only fill a batch up left out."""
    found = zip(batches, step.pieces, step.real, strict=True)
    return sum(session.count(_real(target, piece, real), real) for (_, target), piece, real in found if real)


def _real(value: Any, piece: Tensor, real: int) -> Any:
    return value if real == len(piece) else rows(value, 0, real)


def _evaluation_batch(job: Job, mesh: Mesh) -> int:
    return job.train.piece * mesh.replicas


@torch.no_grad()
def evaluate(session: Session, job: Job, dataset: Dataset[Any], watch: Watch) -> Totals:
    """Sums and counts over the whole data set: `loss`, and those of the task's metrics that the job names."""
    ranks, mesh, task = session.ranks, session.mesh, session.task
    assert task is not None, "load() sets it"
    names = ["loss", *(n for n in dict.fromkeys(job.metrics) if n != "loss")]
    measure = optional(task, "metrics") if len(names) > 1 else None
    sums = {name: torch.zeros((), dtype=torch.float64, device=ranks.device) for name in names}
    counts = dict.fromkeys(names, 0.0)
    size = _evaluation_batch(job, mesh)
    largest = min(size, sum(sizes(dataset)))
    cut = partial(_evaluation_step, session, largest)
    loader = session.batches(dataset, (piece for batch in in_turn(dataset, size) for piece in cut(batch).pieces), 0)
    precision = resolve_precision(job.train.precision, ranks.device)
    session.train(False)
    for step in map(cut, in_turn(dataset, size)):
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


def _evaluation_step(session: Session, largest: int, batch: Tensor) -> Step:
    seats = session.mesh.seats
    if (alike := session.alike(0)) is not None:
        return alike.cut(batch, seats.rank, seats.world, largest)
    mine = batch[seats.rank :: seats.world]
    return Step(len(batch), (mine,) if len(mine) else (), stand_in=False)


def _pairs(measured: Any) -> dict[str, tuple[Tensor | float, float]]:
    if isinstance(measured, Mapping) and all(isinstance(v, (tuple, list)) and len(v) == 2 for v in measured.values()):
        return {str(name): (value, of) for name, (value, of) in measured.items()}
    raise OperatorError("the task's metrics must be a dict of pairs: {name: (sum, count)}")


class Watch:
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
