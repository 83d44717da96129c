"""What ranks keep from job to job: the model on its device, wrapped for its ranks, and the data sets."""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ...protocol.sections import Parallel
from ...protocol.tensors import read_layout
from ..job import Job
from ..pieces import Pieces
from ..task import Task, optional
from .batches import Alike, load, move
from .drawing import Drawing, drawing
from .exchange import hook
from .graphs import Graphs
from .mesh import Mesh
from .optimization import Precision, autocast, resolve_precision
from .own import read_local
from .parts import Parts, local_of, still
from .pipeline import Pipeline, Stage
from .placement import Placement, keep_inputs_only
from .randomness import seeded
from .ranks import Ranks
from .sources import classes, read, samples
from .splitting import blocks
from .state import built, named_tensors, parts_of, read_model

log = logging.getLogger(__name__)


class Session:
    """A model that is built once and loaded for every job; tasks may change between jobs, the architecture may not.

    Nothing of a job stays behind for the next: what travels comes from the job's file, what stays at the site from the
    client's own, and all else that training moves goes back to what it was when the model was built. Make one per rank;
    it is not for two threads.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks.alone()
        self.task: Task | None = None
        self.mesh = Mesh.of(Parallel(), self.ranks)
        self.placement: Placement | None = None  # where the model is split over the ranks
        self.pipeline: Pipeline | None = None  # and its forward pass as well
        self.wrapped: nn.Module | None = None
        self._reduce = ""  # how the ranks of `wrapped` exchange their gradients
        self._plan: object = None
        self._cuts: list[int] = []  # of its stages, where a training has shown better ones than those it began with
        self._module: nn.Module | None = None
        self._built: Parts | None = None
        self._parts: Parts | None = None  # as this job's version has them
        self._start: dict[str, Tensor] = {}  # as they were built: local tensors, and buffers that do not travel
        self._data: dict[str, Dataset[Any] | None] = {}
        self._classes: Tensor | None = None  # of the train data, where a recipe asked for them
        self._is_sum = False  # the loss was checked
        self._graphs: Graphs | None = None
        self._company: bool | None = None
        self.pieces = Pieces()
        self.independent = False  # `dpsgd` has found that examples do not mix in the model

    @property
    def module(self) -> nn.Module:
        """The model, or where it is split, the first that this rank has of it."""
        if self.placement is not None:
            return next(iter(self.placement.modules.values()))
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
    def parts(self) -> Parts:
        """What of the model travels in this job, what is frozen and what stays at the site."""
        assert self._parts is not None, "load() finds it"
        return self._parts

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """The parameters that train and travel, by name, or this rank's parts of them; not those that stay here."""
        if self.placement is not None:
            return self.placement.trained
        local = set(self.parts.local)
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad and n not in local}

    @property
    def local(self) -> dict[str, Tensor]:
        """The tensors that stay at the site and are kept for its next round."""
        if self.placement is not None:
            return {}
        tensors = named_tensors(self.module) if self.parts.local else {}
        return {name: tensors[name] for name in self.parts.local}

    @property
    def statistics(self) -> list[Tensor]:
        """Floating-point buffers that training moves, as BatchNorm's: ranks see different examples, so theirs differ.

        Others, as its counter of steps, count the same on every rank.
        """
        if self.placement is not None:
            return self.placement.statistics
        moved = {*self.parts.travels, *self.parts.local}
        return [b for n, b in self.module.named_buffers() if n in moved and b.is_floating_point()]

    def load(self, task: Task, job: Job) -> None:
        """Make this the job's task and put the round's version into the model, with the site's own parts.

        Raises as `read_model` and `read_local` do.
        """
        if self._graphs is not None:
            self._graphs.off()
        if self.task is not None and self.task is not task and (local_of(task) or local_of(self.task)):
            self._module = self.wrapped = self._company = None  # those parts may be others at each site
            self._is_sum = False
        self.hand_on(task)
        self._adopt(job.parallel)
        if self.mesh.splits_model:
            if self.placement is None:
                self.placement = Placement(task, job.parallel, self.mesh, self._examples, self._cuts)
                self.pipeline = self._line(job.parallel)
            self.placement.load(job.model)
            return
        if self._module is None or self._built is None:
            module = self._module = built(task, self.ranks.device).to(self.ranks.device)
            for block in blocks(task, module) if job.parallel.activation_checkpoint else ():
                keep_inputs_only(block)
            self._graphs = Graphs(module)
            parts = self._built = parts_of(module, local_of(task))
            travels, local = set(parts.travels), set(parts.local)
            self._start = {n: b.clone() for n, b in module.named_buffers() if n not in travels}
            self._start |= {n: p.detach().clone() for n, p in module.named_parameters() if n in local}
        with torch.no_grad():
            for name, tensor in (*self.module.named_buffers(), *self.module.named_parameters()):
                if name in self._start and tensor.shape == self._start[name].shape:
                    tensor.copy_(self._start[name])
        self._parts = self._built.fitting(read_layout(job.model)) if self._built.frozen else self._built
        read_model(self.module, job.model, self._parts)
        if job.own is not None and self._parts.local:
            read_local(self.module, job.own, self._parts)

    def hand_on(self, task: Task) -> None:
        """Make this the task of what comes next, with the model as it is: without parts that stay at its site."""
        if self.task is not task:
            self.task, self._data, self._classes, self.independent = task, {}, None, False

    def _adopt(self, plan: Parallel) -> None:
        """Forget a model that was placed by another plan."""
        self.mesh = Mesh.of(plan, self.ranks)
        asked = (self.mesh.sizes, plan.schedule, plan.offload, plan.activation_checkpoint)
        if asked != self._plan:
            first, self._plan, self._module = self._plan is None, asked, None
            self.wrapped, self.independent, self._cuts = None, False, []
            self._lift(collect=not first)

    def _lift(self, *, collect: bool) -> None:
        """Take a split model off the ranks; the next `load` places it anew."""
        self.placement = self.pipeline = None
        if collect:
            gc.collect()  # hooks go in circles around a placed model, and there may not be room for two

    def rebalance(self) -> None:
        """After a training: let the next `load` move layers between stages that turned out to be uneven."""
        cuts = self.pipeline.better_cuts() if self.pipeline is not None else None
        if cuts is not None:
            assert self.placement is not None, "it has the pipeline's stages"
            if self.ranks.rank == 0:
                log.info("pipeline stages move", extra={"cut_before": self.placement.cuts, "cut_after": cuts})
            self._cuts = cuts
            self._lift(collect=True)

    def _line(self, plan: Parallel) -> Pipeline | None:
        if self.placement is None or self.mesh.size("pipeline") == 1:
            return None
        stages = {number: stage for number, stage in self.placement.modules.items() if isinstance(stage, Stage)}
        return Pipeline(stages, self.placement.stages, plan.schedule, self.mesh, self.placement.cuts)

    def _examples(self) -> Any:
        """The inputs of a few examples, on the host."""
        dataset = self.data("train")
        size: int = len(dataset) if dataset is not None else 0  # pyright: ignore[reportArgumentType]: data() has checked it
        if dataset is None or not size:
            raise OperatorError('the task\'s data("train") is empty, and parallel.pipeline measures the layers with it')
        return next(self.batches(dataset, iter([torch.arange(min(2, size))]), 0))[0]

    def trained(self, job: Job) -> Mapping[str, Tensor]:
        """The model's tensors, to be looked up once each in the order of the job's update; all ranks call it.

        Of a model that is split they come to rank 0 as they are looked up there.
        """
        if self.placement is None:
            return named_tensors(self.module)
        return self.placement.gathered(read_layout(job.model).update())

    def data(self, split: str) -> Dataset[Any] | None:
        """The task's data set, made once; None where the site has none of this split."""
        if split not in self._data:
            assert self.task is not None, "load() sets it"
            self._data[split] = read(self.task, split)
        return self._data[split]

    def drawing(self, job: Job, dataset: Dataset[Any]) -> Drawing:
        """How the job draws its batches from the train data; raises as `drawing` and `classes` do."""
        assert self.task is not None, "load() sets it"
        if job.train.balanced and self._classes is None:
            self._classes = classes(self.task, "train", dataset)
        return drawing(job, dataset, self._classes if job.train.balanced else None)

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

    def needs_company(self, dataset: Dataset[Any]) -> bool:
        """Whether a batch of one example cannot be trained on: BatchNorm over examples alone has no variance then."""
        if self._company is None:
            norms = (m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))  # pyright: ignore[reportPrivateUsage]: all its kinds
            self._company = any(norms) and not self._trains_one(dataset)
        return self._company

    def _trains_one(self, dataset: Dataset[Any]) -> bool:
        inputs, _ = next(self.batches(dataset, iter([torch.zeros(1, dtype=torch.int64)]), 0))
        with seeded(0, self.ranks.device), self._rehearsal(), torch.no_grad():
            try:
                self.module(move(inputs, self.ranks.device))
            except ValueError as error:
                return "more than 1 value per channel" not in str(error)
        return True

    def outputs(self, inputs: list[Any], precision: Precision) -> list[Any] | None:
        """What the model gives for each of these; None on a rank that does not have the last layers."""
        if self.pipeline is not None:
            return self.pipeline.outputs(inputs, precision)
        with autocast(precision, self.ranks.device):
            return [self.module(move(value, self.ranks.device)) for value in inputs]

    def train(self, mode: bool = True) -> None:
        """Put all of the model that is here into training or evaluation mode; what is frozen keeps its buffers."""
        for module in self._modules:
            module.train(mode)
        frozen = self.placement.still if self.placement else still(self.module, self.parts)
        for module in frozen if mode else ():
            module.training = False

    @property
    def _modules(self) -> list[nn.Module]:
        return [*self.placement.modules.values()] if self.placement else [self.module]

    def prepare_training(self, dataset: Dataset[Any], job: Job, *, wrap: bool = True) -> nn.Module:
        """The model, wrapped for its ranks unless they sum their gradients themselves; its loss was checked, once.

        Compiled where the job asks for it, until the next `load`. The model's tensors are the same afterwards.
        """
        reduce = job.parallel.reduce
        with seeded(0, self.ranks.device):  # what is drawn here must not move the first job's own choices
            if not self._is_sum:
                self._check_sum(dataset)
                self._is_sum = True
            if self.placement is not None:
                return next(iter(self._modules))
            if wrap and (self.wrapped is None or self._reduce != reduce):
                self.wrapped = None  # before its successor: both would hang on to the same gradients
                self.wrapped = self._wrap(dataset, reduce) if self.ranks.world > 1 else self.module
                self._reduce = reduce
            module = self.wrapped if self.wrapped is not None and wrap else self.module
            assert self._graphs is not None, "load() makes it"
            if job.dp.mode != "local":
                self._graphs.on(job.train.compile, self.ranks, lambda: self._rehearse(module, dataset, job))
            elif job.train.compile:
                log.warning("the model trains as it is", extra={"why": "DP-SGD needs gradients by example"})
        return module

    def _rehearse(self, module: nn.Module, dataset: Dataset[Any], job: Job) -> None:
        """A job's usual piece, forward and backward, without exchange and without a trace."""
        device = self.ranks.device
        share = -(-job.train.batch_size // self.ranks.world)
        size = min(share, job.train.piece, len(dataset))  # pyright: ignore[reportArgumentType]: data() has checked it
        inputs, target = next(self.batches(dataset, iter([torch.arange(size)]), 0))
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
        with self._rehearsal(), quiet:
            with autocast(resolve_precision(job.train.precision, device), device):
                loss = self.loss(module(move(inputs, device)), move(target, device))
            loss.backward()

    @contextmanager
    def _rehearsal(self) -> Generator[None]:
        """The model trains inside; buffers and gradients are afterwards what they were, and none."""
        kept = {name: t.detach().clone() for name, t in self.module.named_buffers()}
        self.train()
        try:
            yield
        finally:
            self.module.zero_grad()
            with torch.no_grad():
                for name, buffer in self.module.named_buffers():
                    if name in kept and buffer.shape == kept[name].shape:
                        buffer.copy_(kept[name])

    def exchange(self, wrapped: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: whether it is the last of its step, after which gradients are summed."""
        if self.placement is not None:
            self.placement.exchange(now)
        elif not now:
            return wrapped.no_sync()  # pyright: ignore[reportCallIssue]: only DDP is ever told to wait
        return nullcontext()

    def _check_sum(self, dataset: Dataset[Any]) -> None:
        """Raise OperatorError when the loss behaves like a mean: the commonest mistake, and silent otherwise."""
        for rows in samples(dataset, 4):
            if len(rows) == 4:
                self._check_sum_of(dataset, rows)

    def _check_sum_of(self, dataset: Dataset[Any], rows: Tensor) -> None:
        pieces = [rows, rows[:2], rows[2:]]
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

    def _wrap(self, dataset: Dataset[Any], reduce: str) -> nn.Module:
        """DDP, told whether it has to look for parameters without gradient: that costs time, and not asking fails."""
        unused = 0
        for inputs, target in self.batches(dataset, iter(samples(dataset, 4)), 0):
            with self._rehearsal():
                self.loss(self.module(move(inputs, self.ranks.device)), move(target, self.ranks.device)).backward()
                unused += sum(p.grad is None for p in self.parameters)
        # Every rank keeps its own statistics; they are averaged at the end. The option was renamed in torch 2.13.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        own_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(
            self.module,
            device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
            **own_buffers,
            gradient_as_bucket_view=True,
            init_sync=not self.parts.frozen,  # all ranks have read the same files; writing would unmap a mapped base
            find_unused_parameters=self.ranks.sum([unused])[0] > 0,
        )
        if (narrowed := hook(reduce)) is not None:
            wrapped.register_comm_hook(None, lambda _, bucket: narrowed(bucket))
        return wrapped


def _described(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
