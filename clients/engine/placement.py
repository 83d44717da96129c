"""A model of which each rank holds a part: how it is built, filled, trained on and brought together again.

Built in torchtitan's order: model without memory -> pipeline's stages -> tensor parallel -> activation checkpoint ->
sharding. Weights lie in `parameters`, plain tensors that are this rank's parts, so that optimizer, proximal term,
checkpoints and all that works element by element need to know nothing of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from ...protocol.errors import OperatorError
from ...protocol.sections import Parallel
from ...protocol.tensors import Layout
from ..task import Task, optional
from .allocation import return_large_blocks
from .mesh import Mesh
from .parts import local_of, still
from .pipeline import Stage
from .splitting import blocks, normalizes_batch, shared_parameters, stages, tensor_plan
from .state import TYPES, built, check_model, layout_of, map_tensors, named_tensors, parts_of
from .unfilled import unfilled


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Who has which part of a tensor that travels.

    stage: the place on the axis `pipeline` of those that have it. cut: the dimension that is cut along `tensor`, if
    any. sharded: whether it is cut along `shard` as well, in the first dimension of what is left.
    """

    stage: int
    cut: int | None
    sharded: bool


class Placement:
    """This rank's part of a task's model; made, loaded and gathered by all ranks of the mesh together.

    modules: what this rank computes, by the number of its stage; without a pipeline the one forward pass there is.
    parameters: its parts of those that train, plain tensors over the same memory as the modules' own.
    stages: of all ranks. inputs: gives those of a few examples, to measure layers with. cuts: borders of the stages of
    a chain of layers; none where the task says its stages.
    Raises OperatorError where the model cannot be cut as the plan says.
    """

    def __init__(
        self, task: Task, plan: Parallel, mesh: Mesh, inputs: Callable[[], Any], cuts: Sequence[int] = ()
    ) -> None:
        return_large_blocks()
        self.mesh, self._plan = mesh, plan
        model = unfilled(task)
        self._check(model, task)
        frozen = any(not p.requires_grad for p in model.parameters())
        whole = built(task) if frozen else model  # what is frozen comes from the task, and from nowhere else
        found, values = parts_of(whole), named_tensors(whole)
        values = {name: values[name] for name in found.frozen}
        self._model, self._layout = model, layout_of(model, found)
        self.still = still(model, found)
        self._specs = {tensor.name: tensor for tensor in self._layout.tensors}
        state = model.state_dict(keep_vars=True)
        names = {id(state[name]): name for name in named_tensors(model)}
        slots = {
            (path, key): (module, key, names.get(id(tensor)))
            for path, module in model.named_modules()
            for held in (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]: both places of a tied one
            for key, tensor in held.items()
            if tensor is not None
        }
        parts = self._stages(task, inputs, cuts)
        self.stages = len(parts)
        chain = mesh.size("pipeline") > 1 and optional(task, "stages") is None
        lengths = [len(part) for part in parts if isinstance(part, nn.Sequential)] if chain else []
        self.cuts = [*itertools.accumulate(lengths, initial=0)] if chain else []
        stage_of = self._stage_of(parts, names)
        units = [b for b in blocks(task, model) if not shared_parameters(b, model)]
        if mesh.size("tensor") > 1:
            self._cut_layers(task)
        sharded, buffers = mesh.size("shard") > 1, {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.parts = {
            name: Part(stage=stage_of[name], cut=_cut(getattr(m, key)), sharded=sharded and name not in buffers)
            for m, key, name in slots.values()
            if name is not None
        }
        first, step = mesh.at("pipeline"), mesh.size("pipeline")
        mine = {number: parts[number] for number in range(first, len(parts), step)}
        inside = {module for part in mine.values() for module in part.modules()}
        self.modules = {number: self._settle(part, units) for number, part in mine.items()}
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        self._placed: dict[str, nn.Parameter] = {}
        for (path, key), (module, _, name) in reversed(slots.items()):  # of tied ones the first counts
            if module in inside and key in module._buffers:  # pyright: ignore[reportPrivateUsage]: as above
                self._buffers[name or f"{path}.{key}"] = module, key
            elif module in inside and name is not None:
                self._placed[name] = getattr(module, key)
        self._placed = {name: self._placed[name] for name in self.parts if name in self._placed}
        self._own = {n: b.clone() for n, b in self.named_buffers() if n not in self.parts}
        self._local = {name: _local(p) for name, p in self._placed.items()}
        self._pairs = [
            (name, p, p if _local(p) is p else nn.Parameter(self._local[name]))
            for name, p in self._placed.items()
            if p.requires_grad
        ]
        self.trained = {name: local for name, _, local in self._pairs}
        self.parameters = [*self.trained.values()]
        if not self.parameters and any(p.requires_grad for p in model.parameters()):
            raise OperatorError(f"stage {first} of the pipeline has nothing to train: lower parallel.pipeline")
        self._fill(values)

    # Building

    def _check(self, model: nn.Module, task: Task) -> None:
        if local_of(task):
            raise OperatorError(
                "parallel.shard, tensor and pipeline are for models of which nothing stays at the site, and this task "
                "has a local: spread the data only (parallel.data)"
            )
        if self.mesh.size("pipeline") > 1 and normalizes_batch(model):
            raise OperatorError(
                "parallel.pipeline fills the last batch of an epoch up with examples that do not count, and BatchNorm "
                "would count them: use GroupNorm or LayerNorm, or parallel.shard"
            )
        scalar = next((n for n, p in model.named_parameters() if not p.ndim), None)
        if self.mesh.replicas > 1 and scalar is not None:
            raise OperatorError(
                f"the parameter {scalar!r} is a single number, which cannot be sharded: give it shape (1,)"
            )

    def _stages(self, task: Task, inputs: Callable[[], Any], cuts: Sequence[int]) -> list[nn.Module]:
        count = self.mesh.size("pipeline")
        if count == 1:
            return [self._model]
        twice = self._plan.schedule in ("interleaved", "zero-bubble")
        return stages(task, self._model, 2 * count if twice else count, inputs, cuts)

    def _stage_of(self, parts: list[nn.Module], names: Mapping[int, str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for number, part in enumerate(parts):
            place = number % self.mesh.size("pipeline")
            for tensor in (*part.parameters(), *part.buffers()):
                name = names.get(id(tensor))
                if name is not None and found.setdefault(name, place) != place:
                    raise OperatorError(
                        f"{name!r} of the model is needed in two stages of the pipeline, which lie on different "
                        "processes: do not tie these weights, or use parallel.shard"
                    )
        if missing := [name for name in names.values() if name not in found]:
            raise OperatorError(f"the task's stages(model, n) leave out {', '.join(missing)}")
        return found

    def _cut_layers(self, task: Task) -> None:
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights behind the layers' backs
        devices = self.mesh.devices["tensor"]
        for layer, style in tensor_plan(task, self._model, self.mesh.size("tensor")).items():
            parallelize_module(layer, devices, style, src_data_rank=None)

    def _settle(self, part: nn.Module, units: list[nn.Module]) -> nn.Module:
        """Give a part its memory, its blocks first, so that no more than a block lies here that is not to stay."""
        own = set(part.modules())
        root = Stage(part) if self.mesh.size("pipeline") > 1 else part
        for block in units:
            if block in own and block is not root:
                self._place(block)
                if self._plan.activation_checkpoint:
                    keep_inputs_only(block)
        self._place(root)
        return root

    def _place(self, module: nn.Module) -> None:
        _materialize(module, self.mesh.ranks.device)
        if self.mesh.replicas > 1:
            axes = ("data", "shard") if self.mesh.size("data") > 1 else "shard"
            policy = CPUOffloadPolicy() if self._plan.offload else OffloadPolicy()
            fully_shard(module, mesh=self.mesh.devices[axes], reshard_after_forward=True, offload_policy=policy)

    # Into the ranks and out of them

    def load(self, path: Path) -> None:
        """Copy this rank's part of a file's tensors, no more of it being read; raises as `read_model` does."""
        check_model(self._layout, path)
        for module in self._sharded():
            module.reshard()
        self._fill(map_tensors(path, self._layout))
        with torch.no_grad():
            for name, mine in self.named_buffers():
                if name in self._own and mine.shape == self._own[name].shape:
                    mine.copy_(self._own[name])

    @torch.no_grad()
    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's parts of whole tensors."""
        place = self.mesh.at("shard"), self.mesh.at("tensor")
        for name, mine in (*self._local.items(), *self.named_buffers()):
            if name in tensors:
                mine.copy_(self._piece(name, tensors[name], *place))

    def gathered(self, order: Layout) -> Mapping[str, Tensor]:
        """The whole model by name, on rank 0, to be looked up once each in this order: each comes when it is asked for.

        The others send theirs, and get nothing.
        """
        if self.mesh.ranks.rank == 0:
            return _Gathered(self)
        for tensor in order.tensors:
            self.bring(tensor.name)
        return {}

    def bring(self, name: str) -> Tensor:
        """A tensor on the CPU of rank 0, put together from its parts; elsewhere it is empty."""
        part, spec, me = self.parts[name], self._specs[name], self.mesh.ranks.rank
        whole = torch.empty(spec.shape if me == 0 else (), dtype=TYPES[spec.dtype])
        shards = self.mesh.size("shard") if part.sharded else 1
        tensors = self.mesh.size("tensor") if part.cut is not None else 1
        for shard, tensor in itertools.product(range(shards), range(tensors)):
            holder = self.mesh.rank_at(part.stage, 0, shard, tensor)
            if me == holder:
                mine = self._held(name).detach().cpu().contiguous()
                if me == 0:
                    self._piece(name, whole, shard, tensor).copy_(mine)
                elif mine.numel():
                    dist.send(mine, dst=0)
            elif me == 0 and (view := self._piece(name, whole, shard, tensor)).numel():
                received = torch.empty(view.shape, dtype=view.dtype)
                dist.recv(received, src=holder)
                view.copy_(received)
        return whole

    def _piece(self, name: str, whole: Tensor, shard: int, tensor: int) -> Tensor:
        part = self.parts[name]
        return piece(
            whole,
            None if part.cut is None else (part.cut, tensor, self.mesh.size("tensor")),
            (shard, self.mesh.size("shard")) if part.sharded else None,
        )

    def _held(self, name: str) -> Tensor:
        if name in self._local:
            return self._local[name]
        module, key = self._buffers[name]
        return getattr(module, key)

    # Training

    def exchange(self, now: bool) -> None:
        """Whether the next backward pass is the last of its step, after which gradients are summed over replicas."""
        for module in self.modules.values():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(now)

    def collect(self) -> None:
        """Hand the gradients of a step to `parameters`; no collective."""
        for _, placed, local in self._pairs:
            if placed is not local:
                grad, placed.grad = placed.grad, None
                if isinstance(grad, DTensor) and isinstance(placed, DTensor):
                    grad = grad.redistribute(placements=placed.placements).to_local()
                local.grad = grad

    def spread_overflow(self) -> None:
        """Make an infinite gradient of one rank one of every rank, so that all leave the step out."""
        finite = [p.grad.isfinite().all() for p in self.parameters if p.grad is not None]
        if not self.mesh.ranks.least(float(not finite or bool(torch.stack(finite).all()))):
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)

    def clip(self, limit: float) -> None:
        """Scale the gradients to a norm of at most `limit`, over all parts of all parameters, each counted once."""
        found = [(p.grad, self._copies(name)) for name, _, p in self._pairs if p.grad is not None]
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() / copies for g, copies in found]
        (total,) = self.mesh.ranks.sum([float(torch.stack(squares).sum()) if squares else 0.0])
        for grad, _ in found:
            grad.mul_(min(1.0, limit / (math.sqrt(total) + 1e-6)))

    def _copies(self, name: str) -> int:
        """How many ranks have the same part."""
        part, (_, data, shard, tensor) = self.parts[name], self.mesh.sizes
        return data * (1 if part.sharded else shard) * (1 if part.cut is not None else tensor)

    def zero_grad(self) -> None:
        for module in self.modules.values():
            module.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None

    # For checkpoints and statistics, this rank's parts of what travels by name; no collectives

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, local) for name, local in self._local.items() if name in self._specs)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, getattr(module, key)) for name, (module, key) in self._buffers.items())

    @property
    def statistics(self) -> list[Tensor]:
        return [b for n, b in self.named_buffers() if n in self._specs and b.is_floating_point()]

    def _sharded(self) -> Iterator[FSDPModule]:
        return (m for root in self.modules.values() for m in root.modules() if isinstance(m, FSDPModule))


class _Gathered(Mapping[str, Tensor]):
    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __getitem__(self, name: str) -> Tensor:
        return self._placement.bring(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._placement.parts)

    def __len__(self) -> int:
        return len(self._placement.parts)


def keep_inputs_only(block: nn.Module) -> None:
    """Let a block forget what it computes in between, and compute it again when its gradient is needed."""
    if normalizes_batch(block):
        raise OperatorError(
            "parallel.activation_checkpoint computes a block twice, and BatchNorm would count both: use GroupNorm or "
            "LayerNorm, or give the task blocks(model) without it"
        )
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = again


def piece(whole: Tensor, cut: tuple[int, int, int] | None, shard: tuple[int, int] | None) -> Tensor:
    """The view of a tensor that lies at one place; it may be empty.

    cut: dimension, index and number of the parts along `tensor`. shard: index and number of the parts of that, in its
    first dimension. Parts are as large as torch.chunk makes them, for that is how torch cuts.
    """
    if cut is not None:
        whole = _chunk(whole, *cut)
    return whole if shard is None else _chunk(whole, 0, *shard)


def _chunk(whole: Tensor, dim: int, index: int, count: int) -> Tensor:
    size = -(-whole.shape[dim] // count)
    first = min(index * size, whole.shape[dim])
    return whole.narrow(dim, first, min(size, whole.shape[dim] - first))


def _cut(tensor: Tensor) -> int | None:
    if not isinstance(tensor, DTensor):
        return None
    (placement,) = tensor.placements
    return placement.dim if isinstance(placement, Shard) else None


def _local(parameter: nn.Parameter) -> Tensor:
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else parameter


def _materialize(module: nn.Module, device: torch.device) -> None:
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, p in part._parameters.items():  # pyright: ignore[reportPrivateUsage]: both places of a tied one
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
                part._parameters[key] = made[id(p)]  # pyright: ignore[reportPrivateUsage]: as above
        for key, buffer in part._buffers.items():  # pyright: ignore[reportPrivateUsage]: as above
            if buffer is not None:
                part._buffers[key] = buffer.to(device)  # pyright: ignore[reportPrivateUsage]: as above
