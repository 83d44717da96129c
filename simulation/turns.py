"""Clients' turns at one model in memory: the bits of the engine's loop, without what only ranks and files need.

For one process, fp32 and plain steps (`suits`); the engine (`run_job`) does the rest, and is this file's oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count as numbers
from itertools import islice, tee
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import SGD, sgd
from torch.utils.data import Dataset

from ..aggregation.weighted_sum import CHUNK
from ..clients.engine.batches import Schedule, move
from ..clients.engine.drawing import Once
from ..clients.engine.local import Plain, Proximal
from ..clients.engine.loop import Watch, evaluate, training_data
from ..clients.engine.optimization import Stepper
from ..clients.engine.own_training import trains_by_itself
from ..clients.engine.parts import local_of
from ..clients.engine.randomness import derive_seed, seed_all
from ..clients.engine.session import Session
from ..clients.engine.sources import Sets, as_tensors, in_turn, sizes
from ..clients.engine.state import deltas, named_tensors
from ..clients.job import Job, Result
from ..clients.task import Task, at_home, optional
from ..privacy.masks import Array
from ..protocol.recipe import Recipe
from ..protocol.sections import Parallel, Train
from ..protocol.tensors import Layout
from .cohorts import Unsuited

_SGD = {
    "weight_decay",
    "momentum",
    "lr",
    "dampening",
    "nesterov",
    "maximize",
    "foreach",
    "fused",
}  # as `sgd` takes them
_READ = 1024  # steps whose losses are read from the device together

# Of a recipe's [train], what decides nothing but the batches, the optimizer and its step.
_TRAIN = {"epochs", "steps", "batch_size", "optimizer", "lr", "optimizer_options", "clip_norm", "balanced", "mixture"}


def suits(recipe: Recipe) -> bool:
    """Whether the recipe's plain rounds are trained by turns."""
    train, odd = recipe.train, set(Train.model_fields) - _TRAIN - {"micro_batch"}
    usual = Train()
    return (
        recipe.strategy.algorithm == "plain"
        and recipe.parallel == Parallel()
        and train.micro_batch != "auto"
        and all(getattr(train, name) == getattr(usual, name) for name in odd)
    )


def add_times(total: Array, values: Array, weight: float) -> None:
    """total += weight * values, as `RunningMean` takes it: torch's one pass costs two thirds of numpy's three."""
    torch.from_numpy(total).add_(torch.from_numpy(values), alpha=weight)


def check(task: Task) -> None:
    """Raise Unsuited for a task that does more than give a model and data."""
    if optional(task, "work") is not None or trains_by_itself(task) or local_of(task):
        raise Unsuited("the task works by itself, or has parts that stay at the site")


class Turns:
    """Clients after each other, each from the version's weights: `begin` a round, then a `turn` for each client."""

    def __init__(self, session: Session, layout: Layout) -> None:
        """layout: the model's. Clients are to have no parts of their own in it."""
        self._session, self._wire = session, layout.update()
        self._travels = [t.name for t in layout.tensors]
        self._device = session.ranks.device

    def begin(self, task: Task, job: Job) -> None:
        """Read the version; task, job: of any client of the round."""
        check(task)
        session = self._session
        with at_home(task):
            session.load(task, job)
        module = session.module
        self._stepper: _Steps | None = None
        self._mode: bool | None = None
        self._module, self._live = module, named_tensors(module)
        self._version = {name: self._live[name].clone() for name in self._travels}
        self._buffers = {name: b.clone() for name, b in module.named_buffers()}
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._values = [p.detach().clone() for p in self._parameters]

    def turn(self, task: Task, job: Job) -> Result:
        """What `run_job` gives, without a file; `update` has the difference until the next turn."""
        began, session = monotonic(), self._session
        check(task)
        with at_home(task):
            seed_all(derive_seed("job", job.seed, job.round, job.client, 0), self._device)
            session.hand_on(task)
            self._put_back()
            test, metrics = session.data("test"), dict[str, tuple[float, float]]()
            examples = sum(sizes(test)) if test is not None else 0
            if job.kind != "train":
                if test is not None:
                    metrics = self._evaluate(job, test)
                return Result(update=None, examples=examples, steps=0, metrics=metrics, seconds=monotonic() - began)
            train, examples = training_data(session, job)
            schedule = Schedule(
                job,
                examples,
                session.mesh.seats,
                drawing=session.drawing(job, train),
                sets=train if isinstance(train, Sets) else None,
                in_company=session.needs_company(train),
            )
            if test is not None:
                metrics = self._evaluate(job, test)
            if self._stepper is None:
                session.prepare_training(train, job)
                self._stepper, self._mode = _Steps(session, job), None
            if self._mode is not True:
                session.train()
                self._mode = True
            taken, metrics["train_loss"] = self._train(job, train, schedule, self._stepper)
            return Result(update=None, examples=examples, steps=taken, metrics=metrics, seconds=monotonic() - began)

    def update(self) -> Iterator[tuple[str, slice, Array]]:
        """The trained difference of the last turn, as `RunningMean.add_parts` takes it."""
        if self._buffers:  # training may have put another tensor in a buffer's place
            self._live = named_tensors(self._module)
        for name, part, delta in deltas(self._live, self._version, self._wire, chunk=CHUNK):
            yield name, part, delta.numpy()

    @torch.no_grad()
    def _put_back(self) -> None:
        for p, value in zip(self._parameters, self._values, strict=True):
            p.copy_(value)
        for name, buffer in self._module.named_buffers() if self._buffers else ():
            if buffer.shape == self._buffers[name].shape:
                buffer.copy_(self._buffers[name])

    def _evaluate(self, job: Job, dataset: Dataset[Any]) -> dict[str, tuple[float, float]]:
        self._mode = False
        todo = sum(1 for _ in in_turn(dataset, job.train.piece))
        return evaluate(self._session, job, dataset, Watch(self._session.ranks, todo, None, None))

    def _train(
        self, job: Job, dataset: Dataset[Any], schedule: Schedule, stepper: _Steps
    ) -> tuple[int, tuple[float, float]]:
        """Steps taken; sum and count of the loss."""
        session, module, device = self._session, self._module, self._device
        counts_itself = session.task is not None and optional(session.task, "count") is not None
        losses: list[list[Tensor]] = []
        total, counted = 0.0, 0
        stepper.begin()
        for count, pieces in self._batches(job, dataset, schedule):
            if counts_itself:
                count = sum(session.count(target, 0) for _, target in pieces)
            counted += count
            found = list[Tensor]()
            for inputs, target in pieces:
                if device.type != "cpu":
                    inputs, target = move(inputs, device), move(target, device)
                loss = session.loss(module(inputs), target)
                stepper.backward(loss, count, alone=len(pieces) == 1)
                found.append(loss.detach())
            stepper.step()
            losses.append(found)
            if len(losses) == _READ:
                total, losses = _total(losses, total), []
        return stepper.taken, (_total(losses, total), float(counted))

    def _batches(self, job: Job, dataset: Dataset[Any], schedule: Schedule) -> Iterator[tuple[int, list[Any]]]:
        """Examples of each step, and its pieces as pairs: what the engine's loader gives for this schedule."""
        tensors, session = as_tensors(dataset), self._session
        own = session.task is not None and optional(session.task, "collate")
        if (
            tensors is not None
            and len(tensors[0]) == 2
            and not own
            and not schedule.in_company
            and isinstance(schedule.drawing, Once)
            and job.train.piece >= job.train.batch_size
        ):
            (inputs, targets), rows = tensors
            batches = (batch for epoch in numbers() for batch in schedule.drawing.batches(epoch))
            for batch in islice(batches, schedule.steps):
                at = batch if rows is None else rows[batch]
                yield at.shape[0], [(inputs.index_select(0, at), targets.index_select(0, at))]
            return
        steps, ahead = tee(schedule)
        seed = derive_seed("loader", job.seed, job.round, job.client, 0)
        loader = session.batches(dataset, (piece for step in ahead for piece in step.pieces), seed)
        for step in steps:
            yield step.examples, [next(loader) for _ in step.pieces]


class _Steps:
    """`Stepper`'s steps for client after client; SGD's without what an optimizer of torch does around each step."""

    def __init__(self, session: Session, job: Job) -> None:
        local = Proximal(session.shared, job.mu) if job.mu else Plain(session.shared)
        self._inner = Stepper(session.parameters, job.train, local, session.ranks.device)
        self._parameters = (*session.parameters,)
        self._clip_norm = job.train.clip_norm
        self._factors: dict[int, Tensor] = {}
        optimizer = self._inner.optimizer
        self._sgd: dict[str, Any] | None = None
        self._plain = False
        if type(optimizer) is SGD:
            self._sgd = {name: value for name, value in optimizer.param_groups[0].items() if name in _SGD}
            moves = any(self._sgd[name] for name in ("weight_decay", "momentum", "maximize"))
            self._plain = not (moves or job.mu or self._clip_norm)
        self.begin()

    def begin(self) -> None:
        """Of the next client: no momentum, no steps."""
        self._inner.optimizer.state.clear()
        self._inner.taken = self._own = 0
        self._grads: Sequence[Tensor | None] | None = None
        self._buffers: list[Tensor | None] = [None] * len(self._parameters)

    @property
    def taken(self) -> int:
        return self._inner.taken + self._own

    def backward(self, loss: Tensor, count: int, *, alone: bool) -> None:
        """Add to the gradients those of loss / count. alone: it is all of its step."""
        if count not in self._factors:  # what the engine multiplies the loss by is the gradient that it begins with
            self._factors[count] = torch.ones_like(loss.detach()) * (1 / max(count, 1))
        if self._plain and alone:
            self._grads = _backward(loss, self._factors[count], self._parameters)
        else:
            _backward(loss, self._factors[count])

    def step(self) -> None:
        """As `Stepper.step`."""
        grads, self._grads = self._grads, None
        if grads is None:
            if self._sgd is None:
                return self._inner.step()
            self._inner.local.before_step()
            if self._clip_norm:
                nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
            grads = [p.grad for p in self._parameters]
            for p in self._parameters:
                p.grad = None
        assert self._sgd is not None, "only SGD's gradients come by themselves"
        self._own += 1
        live = [k for k, grad in enumerate(grads) if grad is not None]
        parameters: list[Tensor] = [self._parameters[k] for k in live]
        used = [grad for grad in grads if grad is not None]
        with torch.no_grad():
            if self._plain:  # what SGD comes to
                # torch's own optimizers are built on it; the public names have no multi-tensor form.
                torch._foreach_add_(parameters, used, alpha=-self._sgd["lr"])  # pyright: ignore
                return None
            buffers = [self._buffers[k] for k in live]
            sgd(parameters, used, buffers, has_sparse_grad=any(g.is_sparse for g in used), **self._sgd)
        for k, buffer in zip(live, buffers, strict=True):
            self._buffers[k] = buffer
        return None


def _backward(loss: Tensor, gradient: Tensor, parameters: tuple[Tensor, ...] = ()) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of these parameters, of which some may be unused; of none: `loss.backward`.

    Without torch's checks of the arguments and its bookkeeping, a tenth of a small model's step.
    """
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
    return engine.run_backward((loss,), (gradient,), False, False, parameters, True, accumulate_grad=not parameters)


def _total(losses: list[list[Tensor]], before: float) -> float:
    """In float64, one after the other: each step's pieces, then the steps."""
    flat = [loss for found in losses for loss in found]
    values = iter(torch.stack(flat).tolist() if flat else ())
    return sum((sum((next(values) for _ in found), 0.0) for found in losses), before)
