"""A task's model without memory for its weights, which come from the round's file anyway."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...protocol.errors import OperatorError
from ..task import Task
from .state import built


def unfilled(task: Task) -> nn.Module:
    """The task's model with its parameters on the meta device, and buffers as `built` has them.

    A weight lives until it is registered. Then starting values are not drawn, so a buffer that is drawn and does not
    travel would come out another: such a model is built in full, and so is one that looks at its weights.
    """
    try:
        with _weightless():
            model, other = (built(task, seed=name) for name in ("model", "another"))
    except (NotImplementedError, RuntimeError, OperatorError):  # the last of a base that is to be mapped
        return _emptied(built(task))
    state = model.state_dict(keep_vars=True)
    own = [(name, buffer) for name, buffer in model.named_buffers() if name not in state]
    drawn = any(not torch.equal(buffer, other.get_buffer(name)) for name, buffer in own)
    return _emptied(built(task)) if drawn else model


@contextmanager
def _weightless() -> Generator[None]:
    register, seen = nn.Module.register_parameter, WeakIdKeyDictionary()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in seen:  # one weight in two places stays one
                seen[param] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            param = seen[param]
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _emptied(module: nn.Module) -> nn.Module:
    seen: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in seen:
                seen[id(p)] = p, nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            setattr(part, name, seen[id(p)][1])
    return module
