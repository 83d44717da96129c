"""What federation is compared with: each hospital alone, and all rows in one place, with the recipe's own settings.

Both train the same model with the same optimizer, rate and batch size for as many epochs as a hospital trains in the
whole run (rounds times epochs). Neither knows of rounds, of the proximal term or of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from murmur.aggregation.optimizers import build
from murmur.protocol.recipe import Recipe


def local(task: Any, recipe: Recipe, seed: int = 0) -> nn.Module:
    """The model that one hospital trains from its own train rows alone."""
    return _train(task, task.data("train"), recipe, seed)


def pooled(tasks: Sequence[Any], recipe: Recipe, seed: int = 0) -> nn.Module:
    """The model that could be trained if every hospital handed its train rows over."""
    return _train(tasks[0], ConcatDataset([task.data("train") for task in tasks]), recipe, seed)


def evaluate(task: Any, model: nn.Module | Path) -> float:
    """Accuracy of a model, or of a model's file, on a hospital's test rows."""
    module = model if isinstance(model, nn.Module) else load(task, model)
    inputs, targets = task.data("test")[:]
    module.eval()
    with torch.no_grad():
        right, count = task.metrics(module(inputs), targets)["accuracy"]
    return float(right) / count


def load(task: Any, path: Path) -> nn.Module:
    """The task's model with the tensors of a version, as the coordinator keeps and offers it (safetensors)."""
    module: nn.Module = task.model()
    module.load_state_dict(load_file(path))
    return module


def _train(task: Any, rows: Dataset[Any], recipe: Recipe, seed: int) -> nn.Module:
    settings = recipe.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = task.model()
    optimizer = build(settings.optimizer, module.parameters(), settings.lr, settings.optimizer_options)
    order = torch.Generator().manual_seed(seed)
    whole = next(iter(DataLoader(rows, batch_size=len(rows))))  # pyright: ignore[reportArgumentType]  # has a length
    module.train()
    for _ in range(recipe.rounds * settings.epochs):
        for batch in torch.randperm(len(whole[0]), generator=order).split(settings.batch_size):
            optimizer.zero_grad()
            (task.loss(module(whole[0][batch]), whole[1][batch]) / len(batch)).backward()
            optimizer.step()
    return module
