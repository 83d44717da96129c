"""How much memory a training needs, part by part: what can be counted is counted, the rest measured by one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...aggregation.optimizers import build
from ...protocol.recipe import Recipe
from .batches import move
from .optimization import autocast, resolve_precision
from .session import Session


def footprint(session: Session, recipe: Recipe, batch: tuple[Any, Any]) -> dict[str, Any]:
    """Bytes of the whole model's parts in one process, and what the recipe's "auto" becomes on this device.

    batch: one micro-batch; its activations are what autograd keeps of it between forward and backward. The model's
    weights are changed.
    """
    module, device = session.module, session.ranks.device
    precision = resolve_precision(recipe.train.precision, device)
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = session.parameters
    module.train()
    inputs, target = move(batch[0], device), move(batch[1], device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(precision, device):
            loss = session.loss(module(inputs), target)
        loss.backward()
    optimizer = build(recipe.train.optimizer, parameters, recipe.train.lr, recipe.train.optimizer_options, foreach=None)
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    module.zero_grad()
    anchors = _bytes(parameters) if recipe.strategy.mu else 0
    return {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "precision": precision,
        "parameters": _bytes([*module.parameters(), *module.buffers()]),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(state),
        "proximal anchors": anchors,
        "activations": sum(kept.values()),
    }


def _bytes(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
