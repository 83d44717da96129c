"""Clients of a cohort trained together in memory: the results of `sequential`, up to the rounding of floats.

K = clients of a group, A = those that still train, B = rows of one step, R = A · B
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..aggregation.flower import looks_at_single
from ..clients.engine.local import Plain
from ..clients.engine.optimization import Stepper, resolve_precision
from ..clients.engine.session import Session
from ..clients.engine.state import diverged, read_model
from ..clients.job import Job, Result
from ..clients.task import optional
from ..privacy.masks import Array
from ..protocol.messages import TRAIN_LOSS, Assignment, Kind
from ..protocol.recipe import Recipe
from ..protocol.sections import Section, Strategy
from ..protocol.tensors import FLOATS, Layout, TensorSpec
from .agreement import compare
from .cohorts import Asked, Part, Summed, Unsuited
from .copies import ELEMENTWISE, Sums
from .crew import for_clients_only
from .evaluation import evaluate
from .federation import Federation
from .groups import Buffers, Group, Member, Step, member
from .losses import ByColumns
from .routes import Route

# What is done here of a recipe; another setting that is not at its default belongs to another backend.
_TRAIN = frozenset({"epochs", "batch_size", "micro_batch", "optimizer", "lr", "optimizer_options", "clip_norm"})
_RECIPE = frozenset({"name", "task", "rounds", "seed", "metrics", "cohort", "strategy", "train", "parallel", "secure"})
_MEMORY = 1 << 32  # bytes of clients' data that are remembered from round to round


class Vectorized:
    """Clients trained together; raises Unsuited for what it cannot do, before anything has changed."""

    name = "vectorized"

    def __init__(self, federation: Federation, recipe: Recipe, layout: Layout) -> None:
        self._federation, self._recipe, self._layout = federation, recipe, layout
        self._session = Session()
        self._device = self._session.ranks.device
        self._buffers = Buffers(self._device)
        self._route: Route | None = None
        self._members: dict[str, Member] = {}
        self._remembered = 0
        _check(recipe, layout, self._device)

    def mean(self, asked: Asked) -> Summed:
        return self.part(asked).mean(self._layout.update(), asked.assignment.kind)

    def part(self, asked: Asked) -> Part:
        """Of a cohort's clients, those that are asked here."""
        n, kind = asked.assignment.round, asked.assignment.kind
        members = [self._member(name) for name in asked.cohort]
        module = self._load(members, n, asked.version)
        measured = evaluate(module, members, self._recipe.metrics, self._device)
        if kind is not Kind.TRAIN:
            return Part(sums={}, weight=0, measured=measured)
        if self._route is None:
            self._route = Route(module, self._recipe, self._buffers, self._device).find(sorted(members, key=len)[-3:])
        sums = {t.name: torch.zeros(t.shape, dtype=torch.float64, device=self._device) for t in self._floats}
        losses, count = list[Tensor](), 0
        module.train()
        for part in self._parts(members):
            count += self._train(part, asked.assignment, sums, losses)
        measured[TRAIN_LOSS] = float(torch.stack(losses).sum()), float(count)
        wire = self._layout.update().tensors
        found: dict[str, Array] = {t.name: np.zeros(t.shape, np.int64) for t in wire if t.name not in sums}
        for name, summed in sums.items():
            if not summed.isfinite().all():
                raise diverged(name)
            found[name] = summed.cpu().numpy()
        return Part(sums=found, weight=sum(map(self._weight, members)), measured=measured)

    @property
    def _floats(self) -> list[TensorSpec]:
        return [t for t in self._layout.update().tensors if t.dtype in FLOATS]

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        """Nothing: clients that are trained together have no updates of their own."""
        raise Unsuited("updates are looked at one by one")

    def close(self) -> None: ...

    def _member(self, name: str) -> Member:
        if name in self._members:
            return self._members[name]
        made = member(name, self._federation.task(name), self._device)
        if self._remembered < _MEMORY:
            self._remembered += made.nbytes
            self._members[name] = made
        return made

    def _load(self, members: Sequence[Member], n: int, version: Path) -> nn.Module:
        """The model with the version's weights; the first time its task is checked as a client's own session does."""
        if self._route is not None:
            read_model(self._session.module, version, self._session.parts)
            return self._session.module
        job = Job(
            id="simulation",
            kind="train",
            model=version,
            update=version,
            train=self._recipe.train,
            mu=self._recipe.strategy.mu,
            metrics=(),
            seed=self._recipe.seed,
            round=n,
            client=members[0].name,
        )
        self._session.load(members[0].task, job)
        # Says in words what is wrong with the optimizer's name or options, with a loss that is a mean, …
        Stepper(self._session.parameters, self._recipe.train, Plain(self._session.shared), self._device)
        dataset = self._session.data("train")
        assert dataset is not None, "member() has looked"
        self._session.prepare_training(dataset, job)
        return self._session.module

    def _parts(self, members: Sequence[Member]) -> Iterator[Sequence[Member]]:
        """Groups of clients with about as many examples."""
        assert self._route is not None
        left = sorted(members, key=len, reverse=True)
        while left:
            size = self._route.fits(left[0])
            yield left[:size]
            left = left[size:]

    def _weight(self, m: Member) -> int:
        strategy = self._recipe.strategy
        return 1 if strategy.weighting == "uniform" else min(len(m), strategy.weight_cap)

    def _train(self, members: Sequence[Member], told: Assignment, sums: Sums, losses: list[Tensor]) -> int:
        """Train one group; adds to the sums and to the losses, and gives what the losses are sums over."""
        route = self._route
        assert route is not None
        group = Group(members, told.train, seed=told.seed, round=told.round, buffers=self._buffers, device=self._device)
        with for_clients_only() if route.small(group) else nullcontext():
            return self._train_group(route, group, sums, losses)

    def _train_group(self, route: Route, group: Group, sums: Sums, losses: list[Tensor]) -> int:
        weights = [float(self._weight(m)) for m in group.members]
        route.begin(group)
        counted = 0
        for step in group:
            route.narrow(step.active, weights, sums)
            output_R = route.forward(step)
            loss, gradient_R, count = self._loss(output_R.detach(), group, step)
            route.backward(output_R, gradient_R)
            route.step()
            losses.append(loss)
            counted += count
        route.finish(weights, sums)
        return counted

    def _loss(self, output_R: Tensor, group: Group, step: Step) -> tuple[Tensor, Tensor, int]:
        """The sum of the clients' losses, the gradients of their means, and what all losses are sums over."""
        if len(output_R) != len(step.at_R):
            raise Unsuited("the model's output has no row for each example")
        target_R = group.targets_KN.flatten(0, 1).index_select(0, step.at_R)
        leaf_R = output_R.requires_grad_()
        with ByColumns() as losses:
            if step.valid is None:
                loss = self._session.loss(leaf_R, target_R)
            else:
                loss = self._session.loss(leaf_R[step.valid], target_R[step.valid])
        gradient_R = losses.gradient(loss, leaf_R)
        width = len(target_R) // step.active
        counts, counts_itself = step.sizes, optional(group.members[0].task, "count") is not None
        if counts_itself or not group.agreed:
            ranges = [slice(k * width, k * width + size) for k, size in enumerate(step.sizes)]
            if not group.agreed:
                compare(group.members, leaf_R, target_R, ranges, loss, gradient_R)
                group.agreed = True
            if counts_itself:
                counts = tuple(self._session.count(target_R[part], 0) for part in ranges)
        if len(set(counts)) == 1:
            gradient_R /= max(counts[0], 1)
        else:
            count_A = torch.tensor(counts, dtype=gradient_R.dtype, device=gradient_R.device).clamp(min=1)
            gradient_R /= count_A.repeat_interleave(width).view(-1, *(1 for _ in gradient_R.shape[1:]))
        return loss.detach().double(), gradient_R, sum(counts)


def _check(recipe: Recipe, layout: Layout, device: torch.device) -> None:
    """Raise Unsuited for settings that are not done here."""
    train, strategy = recipe.train, recipe.strategy
    if recipe.secure.on:
        raise Unsuited("updates are masked one by one (secure.on)")
    if strategy.algorithm != "plain":
        raise Unsuited(f'updates are not plain differences (strategy.name = "{strategy.name}")')
    if recipe.dp.mode != "off":
        raise Unsuited(f'updates or gradients are clipped one by one (dp.mode = "{recipe.dp.mode}")')
    if strategy.combine != "mean":
        raise Unsuited(f'the rule looks at single updates (strategy.combine = "{strategy.combine}")')
    if looks_at_single(recipe):
        raise Unsuited(f'the strategy looks at single updates (strategy.flower = "{strategy.flower}")')
    if resolve_precision(train.precision, device) != "fp32":
        raise Unsuited(f'the precision is fp32 there, not "{train.precision}" (train.precision)')
    if train.optimizer not in ELEMENTWISE:
        raise Unsuited(f"torch.optim.{train.optimizer} looks at a whole tensor (train.optimizer)")
    known: tuple[tuple[str, Section, frozenset[str]], ...] = (
        ("train.", train, _TRAIN | {"precision"}),
        ("strategy.", strategy, frozenset(Strategy.model_fields)),
        ("", recipe, _RECIPE),
    )
    for table, section, done in known:
        for name, field in type(section).model_fields.items():
            if name not in done and getattr(section, name) != field.get_default(call_default_factory=True):
                raise Unsuited(f"{table}{name} is not done there")
    if odd := next((t for t in layout.tensors if t.name not in layout.buffers and t.dtype not in ("F32", "F64")), None):
        raise Unsuited(f"the parameter {odd.name!r} is {odd.dtype}, not float32 or float64")
