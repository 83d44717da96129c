"""Runs to measure with: a model of so many bytes, a recipe without surprises, an update that fits it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.tensors import Layout, TensorSpec, write_chunks

from .process import Coordinator

PATIENCE_S = 3600.0  # nobody is dropped here: a slow coordinator shows as seconds, not as a smaller cohort
METRICS = {"train_loss": {"sum": 1.0, "count": 1.0}}
_PIECE = 1 << 20  # elements


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured, and where: `folder` is on the file system that the figures are about."""

    folder: Path
    quick: bool
    agents: int  # in the parts that are about many


def layout_of(size: int) -> Layout:
    """A model of `size` bytes of float32 in one tensor."""
    return Layout((TensorSpec("w", "F32", (size // 4,)),))


def write_model(path: Path, size: int) -> None:
    layout = layout_of(size)
    with path.open("wb") as file:
        write_chunks(file, layout, _values(size // 4))


def _values(count: int) -> Iterator[memoryview]:
    piece = np.random.default_rng(0).standard_normal(min(count, _PIECE), np.float32)
    for start in range(0, count, _PIECE):
        yield piece[: min(_PIECE, count - start)].view(np.uint8).data


def recipe(*, clients: int, rounds: int = 1, secure: bool = False) -> Recipe:
    """All of so many clients, each round."""
    values = {"name": "bench", "task": "bench", "rounds": rounds, "metrics": [], "secure": {"on": secure}}
    return parse_recipe(values | {"cohort": {"min": clients, "patience_s": PATIENCE_S, "attempts": 1}})


def start_run(coordinator: Coordinator, model_bytes: int, **about: Any) -> str:
    """Start a run over a new model of so many bytes; returns its id."""
    model = coordinator.data.parent / "model.safetensors"
    write_model(model, model_bytes)
    with coordinator.admin() as admin:
        return admin.start_run(recipe(**about), model)


def update_of(model_bytes: int, value: float) -> tuple[bytes, str]:
    """A plain update of one value everywhere, and its SHA-256."""
    data = layout_of(model_bytes).update().header() + np.full(model_bytes // 4, value, "<f4").tobytes()
    return data, hashlib.sha256(data).hexdigest()


def wait_for_version(coordinator: Coordinator, run: str, n: int, *, until: float) -> bool:
    """True once version `n` of a run can be read from the database, false when it is `until` (monotonic) before."""
    while time.monotonic() < until:
        if coordinator.ask_database("SELECT 1 FROM version WHERE run = ? AND n = ?", run, n):
            return True
        time.sleep(0.05)
    return False
