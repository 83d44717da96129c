"""A version as a folder that model hubs take: weights, a card, and a config that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from murmur.aggregation.local import controls
from murmur.clients.engine.own import load_model
from murmur.clients.engine.state import map_tensors, named_tensors
from murmur.clients.task import Task
from murmur.protocol.errors import OperatorError
from murmur.protocol.registry import LineageView
from murmur.protocol.tensors import read_layout

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write_folder(version: Path, lineage: LineageView, card: str, to: Path, *, task: Task | None = None) -> Path:
    """Write the folder, and read the weights back to see that they are the version's; returns it.

    task: with it the folder holds the whole model, with parts that do not travel as the task builds them; without it
    what the version's file holds. Raises OperatorError for a folder that is not empty, and where the version leaves
    parts to the task and none was given.
    """
    if to.exists() and any(to.iterdir()):
        raise OperatorError(f"{to} is not empty: name a folder that is new")
    layout = read_layout(version)
    if task is None and layout.base:
        raise OperatorError("this version goes with a frozen base that the task builds: give --task")
    beside = {t.name for t in controls(layout)}
    tensors = (
        {name: t for name, t in map_tensors(version, layout).items() if name not in beside}
        if task is None
        else named_tensors(load_model(task, version))
    )
    to.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, to / WEIGHTS, metadata={"format": "pt"})
    _check(tensors, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps(_config(lineage), indent=2) + "\n")
    (to / CARD).write_text(card)
    return to


def _check(tensors: dict[str, Tensor], file: Path) -> None:
    found = load_file(file)
    same = found.keys() == tensors.keys() and all(torch.equal(_bits(found[n]), _bits(t)) for n, t in tensors.items())
    if not same:
        raise OperatorError(f"{file} does not hold what was written: is the disk sound?")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _config(lineage: LineageView) -> dict[str, Any]:
    """What a loader may want to know; no library of model hubs builds the model by itself."""
    v, r = lineage.version, lineage.run.recipe
    facts = {"task": r.task, "run": v.run, "version": v.n, "sha256": v.sha256, "recipe_sha256": lineage.recipe}
    return {"model_type": "murmur", "murmur": {"model": lineage.run.name, **facts, "code_sha256": lineage.code or None}}
