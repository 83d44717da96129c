"""A model in stages on several processes: micro-batches follow each other through them, by a schedule of torch's.

torch's schedules take whole batches of tensors and cut them evenly. Here they are handed the micro-batches' numbers
only: the first stage looks its input up, the last one its target, which may then be of any shape and kind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.utils import _pytree  # pyright: ignore[reportPrivateUsage]: torch's own public functions are built on it

from ...protocol.errors import OperatorError
from .batches import Step, move
from .mesh import Mesh
from .optimization import Precision, autocast
from .randomness import seeded
from .rebalancing import Stopwatch, better, layer_costs
from .splitting import rows

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
TWO_STAGES = ("interleaved", "zero-bubble")  # on each process
KEPT = 8  # schedules for other shapes: each has buffers for what the stages exchange


class Stage(nn.Module):
    """Some layers, in the precision of the moment. feed: a step's inputs, where they are the first; caught: outputs."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.feed: Sequence[Any] | None = None
        self.caught: list[Any] | None = None
        self.precision: Precision = "fp32"
        self.device = torch.device("cpu")

    def forward(self, *given: Any) -> Any:
        if self.feed is not None:
            given = (move(self.feed[int(given[0][0])], self.device),)
        with autocast(self.precision, self.device):
            output = self.layers(*given)
        if self.caught is not None:
            self.caught.append(output)
        return output


class TimedStage(PipelineStage):
    """torch's, which tells a stopwatch how long its passes take, without the waits for other stages."""

    watch: Stopwatch

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.span(("forward", self.stage_index)):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self.watch.span(("backward", self.stage_index)):
            super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self.watch.span(("weights", self.stage_index)):
            super().backward_weight_one_chunk(*args, **kwargs)


class Pipeline:
    """The stages of this rank, run together with those of the others along the axis `pipeline` of the mesh.

    stages: by number, of `count` in all. Every rank has the same inputs and targets, of which it takes what it needs.
    Within a step all micro-batches have one shape; another step may have another, which costs an exchange of shapes.
    cuts: borders of the stages of a chain of layers, which `layer_costs` then knows; empty where nobody may move them.
    """

    def __init__(
        self, stages: Mapping[int, Stage], count: int, schedule: str, mesh: Mesh, cuts: Sequence[int] = ()
    ) -> None:
        self._stages, self._count, self._mesh, self._schedule = stages, count, mesh, schedule
        self.is_first, self.is_last = 0 in stages, count - 1 in stages
        self._made: dict[Any, Any] = {}
        self._rehearsed = weakref.WeakSet[Any]()
        self._loss: Callable[[Any, int], Tensor] = lambda output, number: output
        self._cuts, self._watch = cuts, Stopwatch(mesh.ranks.device)
        for number, stage in stages.items() if cuts else ():
            for layer, module in enumerate(stage.layers.children(), cuts[number]):
                self._watch.watch(("layer", layer), module)

    def train(
        self,
        batches: Sequence[tuple[Any, Any]],
        step: Step,
        precision: Precision,
        *,
        loss: Callable[[Any, Any], Tensor],
        scaled: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run a step's micro-batches forward and backward; gives the sum of their losses, on every rank of the line.

        batches: (input, target) of each. scaled: makes of a loss what is differentiated.
        """
        inputs, real = [value for value, _ in batches], step.real
        found: dict[int, Tensor] = {}

        def one(output: Any, number: int) -> Tensor:
            with autocast(precision, self._mesh.ranks.device):
                target = move(batches[number][1], self._mesh.ranks.device)
                if 0 < real[number] < len(step.pieces[number]):
                    output, target = rows(output, 0, real[number]), rows(target, 0, real[number])
                value = loss(output, target)
            found[number] = value.detach() if real[number] else torch.zeros_like(value)
            return scaled(value if real[number] else value * 0)

        self._loss = one
        schedule = self._ready(inputs, precision, train=True)
        numbers = torch.arange(len(inputs))

        def run() -> None:
            schedule.step(*[numbers] * self.is_first, target=numbers if self.is_last else None, return_outputs=False)

        if schedule not in self._rehearsed:
            self._rehearse(run)
            self._rehearsed.add(schedule)
        run()
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.ranks.device)
        for value in found.values():
            total += value
        return self._mesh.total(total, "pipeline")

    def better_cuts(self) -> list[int] | None:
        """Where the stages should be cut by what the training since the last call took, if that is worth it.

        All ranks call it, and get the same.
        """
        if not self._cuts:
            return None
        alike = self._mesh.ranks.world // self._mesh.size("pipeline")
        mine = layer_costs(self._watch.medians(), self._cuts)
        self._watch.forget()
        return better(self._mesh.ranks.sum([cost / alike for cost in mine]), self._cuts)

    def _rehearse(self, run: Callable[[], None]) -> None:
        """Keep buffers from what a schedule's first step does, which runs the stages to learn what they exchange."""
        kept = [(buffer, buffer.clone()) for stage in self._stages.values() for buffer in stage.buffers()]
        if not self._mesh.total(torch.tensor(float(bool(kept)), device=self._mesh.ranks.device), "pipeline"):
            return
        with seeded(0, self._mesh.ranks.device):
            run()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for stage in self._stages.values():
            stage.zero_grad()

    @torch.no_grad()
    def outputs(self, inputs: Sequence[Any], precision: Precision) -> list[Any] | None:
        """What the model gives for each micro-batch, on the last stage's rank; None on the others."""
        schedule, last = self._ready(inputs, precision, train=False), self._stages.get(self._count - 1)
        if last is not None:
            last.caught = []
        schedule.step(*[torch.arange(len(inputs))] * self.is_first, return_outputs=False)
        if last is None:
            return None
        caught, last.caught = last.caught or [], None
        return caught[-len(inputs) :]  # an exchange of shapes comes first, with an output of its own

    def _ready(self, inputs: Sequence[Any], precision: Precision, *, train: bool) -> Any:
        shapes = [_shapes(value) for value in inputs]
        if any(shape != shapes[0] for shape in shapes):
            raise OperatorError(
                "the micro-batches of a step differ in shape, which parallel.pipeline cannot take: let the task's "
                "collate(items) pad every batch to one shape, or use parallel.shard"
            )
        for number, stage in self._stages.items():
            stage.precision, stage.device = precision, self._mesh.ranks.device
            stage.feed = inputs if number == 0 else None
        key = (train, len(inputs), precision, shapes[0])
        new = key not in self._made
        if self._mesh.replicas > 1:  # others that share these layers must take part in finding out
            new = not self._mesh.ranks.least(float(not new))
        if new:
            if len(self._made) >= KEPT:
                self._made.clear()
            self._made[key] = self._make(len(inputs), train)
        return self._made[key]

    def _make(self, pieces: int, train: bool) -> Any:
        group = self._mesh.along("pipeline")
        stages = [
            (TimedStage if train else PipelineStage)(stage, number, self._count, self._mesh.ranks.device, group=group)
            for number, stage in self._stages.items()
        ]
        for stage in stages:
            if isinstance(stage, TimedStage):
                stage.watch = self._watch
        kind = SCHEDULES[self._schedule]
        if not train:
            kind = ScheduleInterleaved1F1B if self._schedule in TWO_STAGES else ScheduleGPipe
        loss: Any = (lambda output, number: self._loss(output, int(number[0]))) if train else None
        where: Any = stages if self._schedule in TWO_STAGES else stages[0]
        return kind(where, pieces, loss_fn=loss, scale_grads=False)


def _shapes(value: Any) -> Any:
    leaves, kind = _pytree.tree_flatten(value)
    return str(kind), tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)
