"""A model that takes a row of examples of every client of a group in one pass, each client with weights of its own.

K = clients of the group, A = those that still train, B = rows of one step, R = A · B, first client's rows first
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from .cohorts import Unsuited
from .fronts import Front, Layer
from .groups import Step
from .lowrank import LowRank

Forward = Callable[[Tensor], Tensor]  # (R, …) to (R, …)


@dataclass(kw_only=True, slots=True)
class Copies:
    """What the layers of a group's model compute with: the step, and the clients' weights by name."""

    active: int = 0
    sizes: tuple[int, ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    low: dict[str, LowRank] = field(default_factory=dict[str, LowRank])
    generators: tuple[torch.Generator, ...] = ()
    rows: dict[str, float] = field(default_factory=dict[str, float])  # that a linear layer is given for each example
    uses: dict[str, int] = field(default_factory=dict[str, int])  # of a linear layer in one pass, as it was tried
    grouped: bool = False  # convolutions as one of many groups, for GPUs; on a CPU one after the other is faster

    def at(self, step: Step) -> None:
        self.active, self.sizes = step.active, step.sizes


def by_layers(module: nn.Module, copies: Copies) -> nn.Module:
    """A copy of the module whose trained layers ask `copies` for their weights.

    Raises Unsuited for a parameter that is trained outside of a plain linear or convolutional layer, or in two places.
    """
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    if len(names) > sum(p.requires_grad for p in module.parameters()):
        raise Unsuited("its layers share parameters")
    try:
        made = copy.deepcopy(module).train()
    except Exception as error:
        raise Unsuited(f"the model cannot be copied: {error}") from None
    for path, layer in [*made.named_modules()]:
        own = [f"{path}.{name}".lstrip(".") for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
        shim = _shim(path, layer, copies) if own or isinstance(layer, nn.Dropout) else None
        if shim is None:
            if own:
                raise Unsuited(f"{own[0]!r} belongs to a {type(layer).__name__}")
            continue
        if len(own) < len([*layer.parameters(recurse=False)]):
            raise Unsuited(f"only a part of {path!r} is trained")
        if not path:
            return shim
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, shim)
    return made if copies.grouped else _fronted(module, made, copies)


def _fronted(module: nn.Module, made: nn.Module, copies: Copies) -> nn.Module:
    """The convolutions that a sequence begins with, and what lies between them, in one `Front`."""
    front, rest = list[tuple[Layer, tuple[str, ...]]](), [layer for _, layer in _chain(made)]
    for (path, _), layer in zip(_chain(module), [*rest], strict=True):
        if isinstance(layer, _Convolution):
            front.append((layer.alone, tuple(f"{path}.{name}" for name in layer.names)))
        elif type(layer) is nn.ReLU and front and front[-1][1]:
            front.append((functional.relu_, ()))  # a convolution's outputs are nobody else's
        elif type(layer) in _BETWEEN:
            front.append((layer, ()))
        else:
            break
        rest = rest[1:]
    if not any(names for _, names in front):
        return made
    return nn.Sequential(Front(front, lambda: (copies.active, copies.values)), *rest)


def by_vmap(module: nn.Module, copies: Copies) -> Forward:
    """The module as it is, mapped over the clients by torch.func.vmap."""

    def one(values: dict[str, Tensor], rows_B: Tensor) -> Any:
        return functional_call(module, values, (rows_B,))

    def forward(rows_R: Tensor) -> Tensor:
        return vmap(one)(dict(copies.values), rows_R.unflatten(0, (copies.active, -1))).flatten(0, 1)

    return forward


def first_linear(module: nn.Module) -> str | None:
    """The name of the linear layer that takes the flattened examples, where a sequence of layers begins with one."""
    for path, layer in _chain(module):
        if type(layer) is nn.Linear:
            return path
        if not isinstance(layer, nn.Identity) and not _flattens(layer):
            return None
    return None


def after(made: nn.Module, name: str) -> nn.Sequential:
    """The layers that follow the one of this name in a sequence."""
    chain = [*_chain(made)]
    begin = next(i for i, (path, _) in enumerate(chain) if path == name) + 1
    return nn.Sequential(*(layer for _, layer in chain[begin:]))


def _chain(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield path, module
        return
    for name, layer in module._modules.items():  # pyright: ignore[reportPrivateUsage]: children() leaves out repetitions
        yield from _chain(layer, f"{path}.{name}".lstrip("."))


def _flattens(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1


def _shim(path: str, layer: nn.Module, copies: Copies) -> nn.Module | None:
    if type(layer) is nn.Linear:
        return _Linear(path, copies)
    if type(layer) in _CONVOLUTIONS and layer.padding_mode == "zeros":
        return _Convolution(path, cast(Any, layer), copies)
    if type(layer) is nn.Dropout:
        return _Dropout(layer.p, copies) if layer.p else nn.Identity()
    return None


class _Shim(nn.Module):
    def __init__(self, path: str, copies: Copies) -> None:
        super().__init__()
        self._path, self._copies = path, copies

    def _value(self, name: str) -> Tensor | None:
        return self._copies.values.get(f"{self._path}.{name}".lstrip("."))


class _Linear(_Shim):
    def forward(self, rows: Tensor) -> Tensor:
        rows_ABI = rows.reshape(self._copies.active, -1, rows.shape[-1])
        low = self._copies.low.get(self._path)
        out_ABO = low(rows_ABI) if low is not None else self._stacked(rows_ABI)
        return out_ABO.reshape(*rows.shape[:-1], out_ABO.shape[-1])

    def _stacked(self, rows_ABI: Tensor) -> Tensor:
        weight_AOI, bias_AO = self._value("weight"), self._value("bias")
        assert weight_AOI is not None
        self._copies.rows[self._path] = rows_ABI.shape[1] / max(self._copies.sizes)
        self._copies.uses[self._path] = self._copies.uses.get(self._path, 0) + 1
        if bias_AO is None:
            return torch.bmm(rows_ABI, weight_AOI.mT)
        return torch.baddbmm(bias_AO.unsqueeze(1), rows_ABI, weight_AOI.mT)


_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
}
_ACTIVATIONS = nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Identity
_POOLS = nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
_BETWEEN = frozenset({*_ACTIVATIONS, *_POOLS, nn.Flatten})


class _Convolution(_Shim):
    def __init__(self, path: str, layer: nn.Conv1d | nn.Conv2d, copies: Copies) -> None:
        super().__init__(path, copies)
        self._convolve, self._groups = _CONVOLUTIONS[type(layer)], layer.groups
        self._how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.names = tuple(name for name, _ in layer.named_parameters())

    def alone(self, rows_B: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """One client's rows with its weights."""
        return self._convolve(rows_B, weight, bias, groups=self._groups, **self._how)

    def forward(self, rows_R: Tensor) -> Tensor:
        active = self._copies.active
        rows_AB, weight_A, bias_A = rows_R.unflatten(0, (active, -1)), self._value("weight"), self._value("bias")
        assert weight_A is not None
        if not self._copies.grouped:
            biases = [None] * active if bias_A is None else bias_A.unbind()
            parts = zip(rows_AB.unbind(), weight_A.unbind(), biases, strict=True)
            return torch.cat([self.alone(*part) for part in parts])
        side_by_side = rows_AB.transpose(0, 1).flatten(1, 2)  # (B, A · channels, …)
        bias = None if bias_A is None else bias_A.flatten()
        found = self._convolve(side_by_side, weight_A.flatten(0, 1), bias, groups=active * self._groups, **self._how)
        return found.unflatten(1, (active, -1)).transpose(0, 1).flatten(0, 1)


class _Dropout(nn.Module):
    """Dropout with each client's own generator: the masks that it draws when it trains alone on a CPU."""

    def __init__(self, p: float, copies: Copies) -> None:
        super().__init__()
        self._p, self._copies = p, copies

    def forward(self, rows_R: Tensor) -> Tensor:
        noise_AB = torch.zeros(rows_R.shape, dtype=rows_R.dtype).unflatten(0, (self._copies.active, -1))
        if self._p < 1:
            for noise_B, size, generator in zip(noise_AB, self._copies.sizes, self._copies.generators, strict=False):
                noise_B[:size] = torch.empty_like(noise_B[:size]).bernoulli_(1 - self._p, generator=generator)
            noise_AB.div_(1 - self._p)
        return rows_R * noise_AB.flatten(0, 1).to(rows_R.device)
