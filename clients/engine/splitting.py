"""How a model is cut where its task does not say: into blocks, into a pipeline's stages, and layer by layer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.utils.flop_counter import FlopCounterMode

from ...protocol.errors import OperatorError
from ..task import Task, optional
from .batches import move

# What acts on each element by itself, so that it may stand between a layer cut by columns and one cut by rows. Dropout
# does, too, but each process would drop the same places of its own part.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity,
)  # fmt: skip


def normalizes_batch(module: nn.Module) -> bool:
    """Whether a layer in it takes statistics over the examples of a batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())  # pyright: ignore[reportPrivateUsage]: all its kinds


def blocks(task: Task, model: nn.Module) -> list[nn.Module]:
    """The parts that are gathered, and computed again, one at a time: the task's, or the longest list of layers."""
    own = optional(task, "blocks")
    if own is not None:
        return _modules(own(model), "blocks(model)")
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    longest = max(lists, key=len, default=None)
    found = list(dict.fromkeys(longest.children())) if longest is not None else []
    containers = (nn.ModuleList, nn.ModuleDict)
    return [b for b in found if any(True for _ in b.parameters()) and not isinstance(b, containers)]


def stages(
    task: Task, model: nn.Module, count: int, inputs: Callable[[], Any], cuts: Sequence[int] = ()
) -> list[nn.Module]:
    """The model as `count` modules, of which each takes what the one before gives; raises OperatorError if it cannot.

    inputs: gives those of a few examples, to measure the layers with. Without the task's stages(model, count) the
    model must be a Sequential; it is cut where the costliest stage is cheapest, a layer's cost being its share of the
    model's operations plus its share of the weights. cuts: all borders, where they are known to be better.
    """
    own = optional(task, "stages")
    if own is not None:
        found = _modules(own(model, count), "stages(model, n)")
        if len(found) != count:
            raise OperatorError(f"the task's stages(model, {count}) gave {len(found)} modules where {count} belong")
        return found
    layers = _chain(model)
    if layers is None:
        raise OperatorError(
            f"parallel.pipeline cuts a chain of layers, and this model is a {type(model).__name__}, not a Sequential: "
            "give the task stages(model, n) -> list of n modules, or use parallel.shard or parallel.tensor"
        )
    if len(layers) < count:
        raise OperatorError(
            f"the model is a chain of {len(layers)} layers, and this plan needs {count} stages: lower parallel.pipeline"
            + (", or set schedule to gpipe or 1f1b, which need half as many" if len(layers) >= count // 2 else "")
        )
    cuts = cuts or balanced(_costs(layers, inputs()), count)
    return [nn.Sequential(*layers[first:last]) for first, last in itertools.pairwise(cuts)]


def _modules(given: Any, what: str) -> list[nn.Module]:
    if not isinstance(given, (list, tuple, nn.ModuleList)) or not all(isinstance(m, nn.Module) for m in given):
        raise OperatorError(f"the task's {what} must be a list of modules")
    return list(given)  # pyright: ignore[reportArgumentType]: just checked


def _chain(module: nn.Module) -> list[nn.Module] | None:
    """The layers of a Sequential, those of Sequentials in it among them; None for another module."""
    if type(module) is not nn.Sequential:
        return None
    return [layer for child in module for layer in (_chain(child) or [child])]


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Where to cut a chain into `count` parts, none empty, so that the costliest is as cheap as can be: all borders."""
    total = [0.0, *itertools.accumulate(costs)]
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for part in range(1, count + 1):
        for end in range(part, len(costs) + 1):
            options = (
                (max(best[part - 1, start][0], total[end] - total[start]), [*best[part - 1, start][1], end])
                for start in range(part - 1, end)
                if (part - 1, start) in best
            )
            best[part, end] = min(options)
    return best[count, len(costs)][1]


def _costs(layers: Sequence[nn.Module], inputs: Any) -> list[float]:
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    operations = [0] * len(layers)
    value = move(inputs, torch.device("meta"))
    try:
        with torch.no_grad():
            for number, layer in enumerate(layers):
                with FlopCounterMode(display=False) as counter:
                    value = copy.deepcopy(layer).to("meta").eval()(value)
                operations[number] = counter.get_total_flops()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # not every layer can do without numbers
        operations = [0] * len(layers)
    shares = ((w / max(1, sum(weights)), o / max(1, sum(operations))) for w, o in zip(weights, operations, strict=True))
    return [weight + operation for weight, operation in shares]


def tensor_plan(task: Task, model: nn.Module, parts: int) -> dict[nn.Module, ParallelStyle]:
    """How layers are cut among processes that compute them together: the task's plan, or one for Linear layers.

    Of two Linear layers of a Sequential with nothing but elementwise functions between them, the first is cut by
    columns and the second by rows: one exchange for both (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053), if
    parts are equal. Any other is cut by columns and its output gathered, which is right wherever it stands.
    """
    own = optional(task, "tensor_plan")
    if own is not None:
        plan: Any = own(model)
        if not isinstance(plan, Mapping) or not all(isinstance(s, ParallelStyle) for s in plan.values()):
            raise OperatorError("the task's tensor_plan(model) must be a dict of torch's ParallelStyle by layer name")
        try:
            layers = {name: model.get_submodule(name) for name in plan}
        except AttributeError as error:
            raise OperatorError(f"the task's tensor_plan(model) names a layer that is not there: {error}") from None
        if tied := [name for name, layer in layers.items() if shared_parameters(layer, model)]:
            raise OperatorError(
                f"the task's tensor_plan(model) cuts {tied[0]!r}, whose weight is another layer's as well"
            )
        return {layer: plan[name] for name, layer in layers.items()}
    linear = [m for m in model.modules() if type(m) is nn.Linear and not shared_parameters(m, model)]
    once = [m for m in linear if sum(m is other for _, other in model.named_modules(remove_duplicate=False)) == 1]
    found: dict[nn.Module, ParallelStyle] = {}
    for chain in (m for m in model.modules() if type(m) is nn.Sequential):
        first: nn.Linear | None = None
        for layer in chain:
            paired = first is not None and first.out_features % parts == 0
            if layer in once and first is not None and paired:
                found[first], found[layer], first = ColwiseParallel(), RowwiseParallel(), None
            elif isinstance(layer, nn.Linear) and layer in once and layer not in found:
                first = layer
            elif not _by_element(layer):
                first = None
    for layer in linear:
        if layer not in found and layer.out_features >= parts:
            found[layer] = ColwiseParallel(output_layouts=Replicate())
    if not found:
        raise OperatorError(
            "parallel.tensor found no layer to cut: give the task tensor_plan(model) -> {layer's name: ParallelStyle}, "
            "or use parallel.shard"
        )
    return found


def _by_element(layer: nn.Module) -> bool:
    return isinstance(layer, ELEMENTWISE) or (isinstance(layer, nn.Dropout) and not layer.p)


def shared_parameters(part: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of this part also stands in a module of the model outside of it."""
    inside, own = set(part.modules()), {id(p) for p in part.parameters()}
    return any(id(p) in own for m in model.modules() if m not in inside for p in m.parameters(recurse=False))


def rows(value: Any, first: int, last: int) -> Any:
    """These examples of a batch: the rows [first, last) of every tensor in it."""
    if isinstance(value, Tensor):
        return value[first:last]
    if isinstance(value, Mapping):
        return {key: rows(v, first, last) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rows(v, first, last) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rows(v, first, last) for v in value)
    return value
