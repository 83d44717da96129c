"""Which of a model's tensors travel, which are the frozen base that every site builds, and which stay at the site."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ...protocol.encoding import canonical_json
from ...protocol.errors import OperatorError
from ...protocol.tensors import Layout
from ..task import Task

CHUNK = 1 << 20  # elements that are hashed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Names from a model's state dict; each tensor is in one of the three, tied ones under their first name.

    travels: parameters that train, and persistent buffers of modules that train; `buffers` are these buffers.
    frozen: all else that is not local. The task builds it, the same at every site: `base` is its SHA-256, "" where
    there is none.
    local: what `task.local` names, but for local parameters that do not train, which are nobody's business.
    """

    travels: tuple[str, ...]
    buffers: frozenset[str]
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    base: str = ""

    def fitting(self, version: Layout) -> Parts:
        """These parts as a version's file has them: release 0.1.0 put frozen tensors into it, and named no base."""
        if not self.frozen or version.base or not {t.name for t in version.tensors}.issuperset(self.frozen):
            return self
        return replace(self, travels=self.travels + self.frozen, frozen=(), base="")


def local_of(task: Task) -> tuple[str, ...]:
    """The patterns of the names that the task keeps at its site; none where it says nothing."""
    patterns: object = getattr(task, "local", ())
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise OperatorError(f'the task\'s local is {patterns!r}: write a tuple of name patterns, as ("head.*",)')
    return tuple(patterns)


def divide(module: nn.Module, tensors: Mapping[str, Tensor], local: Iterable[str] = ()) -> Parts:
    """The parts of a model; reads all frozen tensors once, for their digest.

    tensors: the model's, as `named_tensors` gives them. local: patterns as the shell has them. Raises OperatorError for
    a pattern that fits nothing, and for a tensor that is tied to one that stays at the site.
    """
    patterns = tuple(local)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    owners = {name: _owner(module, name) for name, _ in module.named_buffers(remove_duplicate=False)}
    _check_local(module, patterns)
    travels: list[str] = []
    frozen: list[str] = []
    kept: list[str] = []
    for name in tensors:
        trains = parameters[name].requires_grad if name in parameters else True
        if _fits(name, patterns):
            kept += [name] if trains else []
        elif trains and (name not in owners or _trains(owners[name])):
            travels.append(name)
        else:
            frozen.append(name)
    base = digest({name: tensors[name] for name in frozen}) if frozen else ""
    buffers = frozenset(name for name in travels if name in owners)
    return Parts(travels=tuple(travels), buffers=buffers, frozen=tuple(frozen), local=tuple(kept), base=base)


def still(module: nn.Module, parts: Parts) -> list[nn.Module]:
    """The modules whose buffers are frozen, as BatchNorm of a frozen part: they must not train their statistics."""
    frozen = set(parts.frozen)
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in module.named_buffers() if name in frozen)
    return [module.get_submodule(name) for name in owners]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            raise OperatorError(f"the frozen tensor {name!r} of the model has no values: model() must load them")
        found.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        for chunk in tensor.reshape(-1).split(CHUNK) if tensor.numel() else ():
            found.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _owner(module: nn.Module, buffer: str) -> nn.Module:
    """The nearest module around a buffer that has parameters, else the model: BatchNorm may have none of its own."""
    where = buffer.rpartition(".")[0]
    while where and next(module.get_submodule(where).parameters(), None) is None:
        where = where.rpartition(".")[0]
    return module.get_submodule(where)


def _trains(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_local(module: nn.Module, patterns: tuple[str, ...]) -> None:
    if not patterns:
        return
    state = module.state_dict(keep_vars=True)
    if idle := [p for p in patterns if not any(fnmatchcase(name, p) for name in state)]:
        raise OperatorError(f"the task's local names {idle[0]!r}, which fits no tensor of the model")
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            other = first.setdefault((tensor.data_ptr(), tensor.shape), name)
            if _fits(name, patterns) != _fits(other, patterns):
                stays, goes = (name, other) if _fits(name, patterns) else (other, name)
                raise OperatorError(
                    f"{stays!r} of the model stays at the site, and {goes!r}, which is tied to it, does not: name both "
                    "in the task's local, or untie them"
                )
