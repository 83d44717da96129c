"""What ranks keep from job to job: the model on its device, wrapped for its ranks, and the data sets."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ...protocol.sections import Parallel
from ...protocol.tensors import read_layout
from ..job import Job
from ..task import Task, optional
from .batches import Alike, load, move
from .mesh import Mesh
from .optimization import Precision, autocast
from .pipeline import Pipeline, Stage
from .placement import Placement, keep_inputs_only
from .randomness import seeded
from .ranks import Ranks
from .splitting import blocks
from .state import named_tensors, read_model, write_update
from .unfilled import build


class Session:
    """A model that is built once and loaded for every job; tasks may change between jobs, the architecture may not.

    Nothing of a job stays behind for the next: tensors come from the job's file, and non-persistent buffers go back
    to what they were when the model was built. Make one per rank; it is not for two threads.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks.alone()
        self.task: Task | None = None
        self.mesh = Mesh.of(Parallel(), self.ranks)
        self.placement: Placement | None = None  # where the model is split over the ranks
        self.pipeline: Pipeline | None = None  # and its forward pass as well
        self.wrapped: nn.Module | None = None
        self._plan: object = None
        self._module: nn.Module | None = None
        self._own_buffers: dict[str, Tensor] = {}
        self._data: dict[str, Dataset[Any] | None] = {}
        self._is_sum = False  # the loss was checked
        self.independent = False  # `dpsgd` has found that examples do not mix in the model

    @property
    def module(self) -> nn.Module:
        """The model; where it is split in a way that keeps its forward pass whole, as this rank calls it."""
        if self.placement is not None:
            return self.placement.modules[0]
        assert self._module is not None, "load() builds it"
        return self._module

    @property
    def held(self) -> nn.Module | Placement:
        """What this rank has of the model, by name."""
        return self.placement or self.module

    def alike(self, size: int) -> Alike | None:
        """How batches are cut for ranks that exchange something in each forward pass. size: examples of a piece."""
        return Alike(self.mesh.size("pipeline"), size) if self.placement is not None else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train, or this rank's parts of them; raises OperatorError where none does."""
        found = (
            self.placement.parameters if self.placement else [p for p in self.module.parameters() if p.requires_grad]
        )
        if not found:
            raise OperatorError("no parameter of the task's model has requires_grad: there is nothing to train")
        return found

    @property
    def statistics(self) -> list[Tensor]:
        """Floating-point buffers that travel, as BatchNorm's: ranks see different examples, so theirs differ.

        Others, as its counter of steps, count the same on every rank.
        """
        if self.placement is not None:
            return self.placement.statistics
        state = self.module.state_dict(keep_vars=True)
        return [b for n, b in self.module.named_buffers() if n in state and b.is_floating_point()]

    def load(self, task: Task, job: Job) -> None:
        """Make this the job's task and put the round's version into the model; raises as `read_model` does."""
        if self.task is not task:
            self.task, self._data, self.independent = task, {}, False
        self._adopt(job.parallel)
        if self.mesh.splits_model:
            if self.placement is None:
                self.placement = Placement(task, job.parallel, self.mesh, self._examples)
                self.pipeline = self._line(job.parallel)
            self.placement.load(job.model)
            return
        if self._module is None:
            self._module = build(task, self.ranks.device).to(self.ranks.device)
            for block in blocks(task, self._module) if job.parallel.activation_checkpoint else ():
                keep_inputs_only(block)
            persistent = self._module.state_dict().keys()
            self._own_buffers = {n: b.clone() for n, b in self._module.named_buffers() if n not in persistent}
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in self._own_buffers and buffer.shape == self._own_buffers[name].shape:
                    buffer.copy_(self._own_buffers[name])
        read_model(self._module, job.model)

    def _adopt(self, plan: Parallel) -> None:
        """Forget a model that was placed by another plan."""
        self.mesh = Mesh.of(plan, self.ranks)
        asked = (self.mesh.sizes, plan.schedule, plan.offload, plan.activation_checkpoint)
        if asked != self._plan:
            first, self._plan, self._module = self._plan is None, asked, None
            self.wrapped, self.independent, self.placement, self.pipeline = None, False, None, None
            if not first:
                gc.collect()  # hooks go in circles around a placed model, and there may not be room for two

    def _line(self, plan: Parallel) -> Pipeline | None:
        if self.placement is None or self.mesh.size("pipeline") == 1:
            return None
        stages = {number: stage for number, stage in self.placement.modules.items() if isinstance(stage, Stage)}
        return Pipeline(stages, self.placement.stages, plan.schedule, self.mesh)

    def _examples(self) -> Any:
        """The inputs of a few examples, on the host."""
        dataset = self.data("train")
        size: int = len(dataset) if dataset is not None else 0  # pyright: ignore[reportArgumentType]: data() has checked it
        if dataset is None or not size:
            raise OperatorError('the task\'s data("train") is empty, and parallel.pipeline measures the layers with it')
        return next(self.batches(dataset, iter([torch.arange(min(2, size))]), 0))[0]

    def write_update(self, model: Path, path: Path) -> None:
        """Write what training has changed, on rank 0, with parts from all: see `state.write_update`."""
        if self.placement is None:
            trained = named_tensors(self.module)
        else:
            trained = self.placement.gathered(read_layout(model).update())
        if self.ranks.rank == 0:
            write_update(trained, model, path)

    def data(self, split: str) -> Dataset[Any] | None:
        """The task's data set, made once; None where the site has none of this split."""
        if split not in self._data:
            assert self.task is not None, "load() sets it"
            dataset = self.task.data(split)
            if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise OperatorError(
                    f"the task's data({split!r}) gave a {type(dataset).__name__} without a length or an index: "
                    "exact epochs need a map-style data set"
                )
            self._data[split] = dataset
        return self._data[split]

    def loss(self, output: Any, target: Any) -> Tensor:
        """The task's loss, a scalar."""
        assert self.task is not None, "load() sets it"
        loss: Any = self.task.loss(output, target)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise OperatorError(f"the task's loss gave {_described(loss)}; it must be the sum over the batch, a scalar")
        return loss

    def count(self, target: Any, examples: int) -> int:
        """What a loss sums over: the task's own count, else examples."""
        assert self.task is not None, "load() sets it"
        own = optional(self.task, "count")
        return int(own(target)) if own else examples

    def batches(self, dataset: Dataset[Any], pieces: Iterator[Tensor], seed: int) -> Iterator[tuple[Any, Any]]:
        """Batches on the host, loaded as the task asks."""
        assert self.task is not None, "load() sets it"
        return load(
            dataset,
            pieces,
            collate=optional(self.task, "collate"),
            workers=int(getattr(self.task, "workers", 0)),
            seed=seed,
            pin=self.ranks.device.type == "cuda",
        )

    def outputs(self, inputs: list[Any], precision: Precision) -> list[Any] | None:
        """What the model gives for each of these; None on a rank that does not have the last layers."""
        if self.pipeline is not None:
            return self.pipeline.outputs(inputs, precision)
        with autocast(precision, self.ranks.device):
            return [self.module(move(value, self.ranks.device)) for value in inputs]

    def train(self, mode: bool = True) -> None:
        """Put all of the model that is here into training or evaluation mode."""
        for module in self._modules:
            module.train(mode)

    @property
    def _modules(self) -> list[nn.Module]:
        return [*self.placement.modules.values()] if self.placement else [self.module]

    def prepare_training(self, dataset: Dataset[Any], *, wrap: bool = True) -> nn.Module:
        """The model, wrapped for its ranks unless they sum their gradients themselves; its loss was checked, once.

        The model's tensors are the same afterwards.
        """
        with seeded(0, self.ranks.device):  # what is drawn here must not move the first job's own choices
            if not self._is_sum:
                self._check_sum(dataset)
                self._is_sum = True
            if self.wrapped is None and wrap:
                plain = self.ranks.world == 1 or self.placement is not None
                self.wrapped = next(iter(self._modules)) if plain else self._wrap(dataset)
        return self.wrapped if self.wrapped is not None and wrap else self.module

    def exchange(self, wrapped: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: whether it is the last of its step, after which gradients are summed."""
        if self.placement is not None:
            self.placement.exchange(now)
        elif not now:
            return wrapped.no_sync()  # pyright: ignore[reportCallIssue]: only DDP is ever told to wait
        return nullcontext()

    def _check_sum(self, dataset: Dataset[Any]) -> None:
        """Raise OperatorError when the loss behaves like a mean: the commonest mistake, and silent otherwise."""
        pieces = [torch.arange(0, 4), torch.arange(0, 2), torch.arange(2, 4)]
        if len(dataset) < 4:  # pyright: ignore[reportArgumentType]: data() has checked that it has a length
            return
        self.train(False)
        losses: list[float] = []
        counts: list[int] = []
        with torch.no_grad():
            for piece, (inputs, target) in zip(pieces, self.batches(dataset, iter(pieces), 0), strict=True):
                counts.append(self.count(target, len(piece)))
                outputs = self.outputs([inputs] * self.mesh.size("pipeline"), "fp32")
                losses += [float(self.loss(output, move(target, self.ranks.device))) for output in (outputs or [])[:1]]
        if not losses:
            return
        whole, first, second = losses
        as_mean = (counts[1] * first + counts[2] * second) / max(1, counts[0])
        if math.isclose(as_mean, whole, rel_tol=1e-4) and not math.isclose(first + second, whole, rel_tol=0.1):
            raise OperatorError(
                f"the task's loss looks like a mean: {whole:.4g} for 4 examples, {first:.4g} and {second:.4g} for "
                'their halves. It must be the sum over the batch: reduction="sum"'
            )

    def _wrap(self, dataset: Dataset[Any]) -> nn.Module:
        """DDP, told whether it has to look for parameters without gradient: that costs time, and not asking fails."""
        kept = {name: t.detach().clone() for name, t in self.module.named_buffers()}
        piece = torch.arange(min(4, len(dataset)))  # pyright: ignore[reportArgumentType]: data() has checked it
        inputs, target = next(self.batches(dataset, iter([piece]), 0))
        self.module.train()
        self.loss(self.module(move(inputs, self.ranks.device)), move(target, self.ranks.device)).backward()
        unused = sum(p.grad is None for p in self.parameters)
        self.module.zero_grad()
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in kept and buffer.shape == kept[name].shape:
                    buffer.copy_(kept[name])
        # Every rank keeps its own statistics; they are averaged at the end. The option was renamed in torch 2.13.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        own_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(
            self.module,
            device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
            **own_buffers,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.ranks.sum([unused])[0] > 0,
        )


def _described(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
