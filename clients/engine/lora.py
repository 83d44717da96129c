"""Fine-tuning a frozen base: it is mapped from a file that every site has, and only small adapters train and travel.

base.safetensors  ->  load_base(model, path)  ->  lora(model, rank=8)  ->  a run  ->  merge_lora(model)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...protocol.errors import OperatorError
from .randomness import derive_seed


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus (alpha / rank) · up(down(x)): the names and places of its own tensors stay as they were.

    down: (rank, in), drawn by a generator of its own, the same at every site; up: (out, rank), zero, so that training
    begins at the base. Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, freeze_a: bool, dropout: float, seed: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=_has_bias(base), device="meta")
        self.weight, self.bias = base.weight, base.bias
        like: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}  # a bf16 base has fp32 adapters
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank
        # Uniform as nn.Linear's own, which the paper's code takes; on the CPU, where it is the same on every machine.
        drawn = torch.rand(self.down.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.down.weight.copy_((2 * drawn - 1) / math.sqrt(base.in_features))
            self.up.weight.zero_()
        self.down.weight.requires_grad_(not freeze_a)
        # torch's fused nn.TransformerEncoderLayer reads `weight` past this forward(), unless a hook waits here.
        self.register_forward_pre_hook(_called)

    def forward(self, input: Tensor) -> Tensor:
        base = super().forward(input)
        adapter = self.up(self.down(self.dropout(input).to(self.down.weight.dtype)))
        return base + (self.scale * adapter).to(base.dtype)

    def merged(self) -> nn.Linear:
        """An ordinary layer that gives the same output; its sum is taken in float32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=_has_bias(self), device="meta")
        delta = self.scale * (self.up.weight.detach().float() @ self.down.weight.detach().float())
        weight = (self.weight.detach().float() + delta).to(self.weight.dtype)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


def _called(module: nn.Module, inputs: Any) -> None:
    pass


def _has_bias(layer: nn.Linear) -> bool:
    return "bias" in dict(layer.named_parameters(recurse=False))


def lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("*",),
    train: Sequence[str] = (),
    freeze_a: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """The same model, frozen, with adapters at its nn.Linear layers: all that trains, and all that travels.

    targets: name patterns of the layers ("*.query", "blocks.*"); only layers that are exactly nn.Linear are taken, so
    those of nn.MultiheadAttention are not: it reads their weights past forward(), where no adapter is.
    train: name patterns of parameters that train whole, as a new head; they get no adapter.
    freeze_a: train and send `up` alone. Averages of `down` and of `up` are not the average of their products; with
    `down` frozen they are, and an update is half as large. Source: Sun et al. 2024, "Improving LoRA in
    Privacy-preserving Federated Learning" (FFA-LoRA), arXiv:2403.12313.
    seed: of the values that `down` begins with; each layer's are its own.
    Raises OperatorError for settings that cannot be and for patterns that fit nothing.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise OperatorError(f"lora: rank = {rank}, alpha = {alpha:g}, dropout = {dropout:g}: none of them can be so")
    parameters = dict(model.named_parameters())
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and name}
    whole = {name for name in parameters if _fits(name, train)}
    left = {name: layer for name, layer in linear.items() if not whole & {f"{name}.weight", f"{name}.bias"}}
    _check_patterns("train", train, parameters)
    _check_patterns("targets", targets, left)
    chosen = {name: layer for name, layer in left.items() if _fits(name, targets)}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in whole)
    for name, layer in chosen.items():
        adapted = LoRALinear(
            layer, rank=rank, alpha=alpha, freeze_a=freeze_a, dropout=dropout, seed=derive_seed("lora", seed, name)
        )
        _replace(model, name, adapted.train(layer.training))
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers in place of adapted ones, which give the same output: to be exported."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            _replace(model, name, layer.merged().train(layer.training))
    return model


def load_base(model: nn.Module, path: Path | str) -> nn.Module:
    """Put a safetensors file's tensors into the model, frozen, without a copy: they are mapped, and read when touched.

    The file may have fewer tensors than the model (no head), never more or others. Build the model under
    `torch.device("meta")` where it should not be in memory twice; then the file must have all of it.
    Raises OperatorError that says what differs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OperatorError(f"the base {Path(path).name} cannot be read: {error}") from None
    have = model.state_dict()
    for names in _tied(model):
        found |= {name: found[given] for given in names if given in found for name in names}
    for name, tensor in found.items():
        if name not in have:
            raise OperatorError(f"the base {Path(path).name} has a tensor {name!r}, and the model has none")
        if have[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, and {list(have[name].shape)} in the model"
            raise OperatorError(f"{name!r} is {shapes} in the base {Path(path).name}")
    model.load_state_dict(found, strict=False, assign=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found:
            parameter.requires_grad_(False)
    if empty := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise OperatorError(
            f"{len(empty)} tensors of the model have no values and are not in the base {Path(path).name}, the first is "
            f'{empty[0]!r}: build it outside of torch.device("meta")'
        )
    return model


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of one and the same parameter, where it has several; a file has it under one of them."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    where, _, last = name.rpartition(".")
    setattr(model.get_submodule(where), last, layer)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(what: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    if isinstance(patterns, str):
        raise OperatorError(f"lora: {what} = {patterns!r}: write a tuple of name patterns, as ({patterns!r},)")
    if idle := [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]:
        offered = ", ".join([*names][:5]) or "nothing"
        raise OperatorError(f"lora: {what} names {idle[0]!r}, which fits none of what there is: {offered} …")
