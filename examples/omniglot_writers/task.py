"""Handwritten characters by writer: each of 20 people drew every character of eight alphabets once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.simulation.partitioning import by_group

PATH_VARIABLE = "MURMUR_OMNIGLOT"
SIDE, BLOCK = 105, 5  # pixels of a drawing, and of a block that becomes one number
Label = Literal["alphabet", "character"]
Rows = dict[str, list[int]]


class Drawings:
    """A `murmur.Task`: one writer, or several, by the rows of their train and test drawings.

    label: "alphabet", which of eight a character belongs to, or "character", which of all 242 it is.
    start: a version's file whose weights the model begins with; by default it begins with new ones.
    """

    def __init__(self, path: str, label: Label, rows: Rows, start: Path | None = None) -> None:
        self.path, self.rows, self.start = path, rows, start
        self.label: Label = label

    def model(self) -> nn.Module:
        """(N, 1, 21, 21) to logits: two convolutions, each at every second pixel, and a layer."""
        classes = int(drawings_of(self.path, self.label)[0].tensors[1].max()) + 1
        module = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, classes),
        )
        if self.start:
            module.load_state_dict(load_file(self.start))
        return module

    def data(self, split: str) -> Subset[Any] | None:
        return Subset(drawings_of(self.path, self.label)[0], self.rows[split]) if self.rows[split] else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target))}


def federation(data: str = "", label: Label = "alphabet", seed: int = 0) -> dict[str, Drawings]:
    """The 20 writers for a simulation, by name; of each a fifth of the drawings, drawn by the seed, is for tests.

    data: path to omniglot_small.npz, else the environment variable MURMUR_OMNIGLOT says it.
    """
    if label not in ("alphabet", "character"):
        raise OperatorError(f"label = {label!r}: alphabet or character")
    path = find_drawings(data)
    writers = by_group(drawings_of(path, label)[1])
    rng = np.random.default_rng(seed)
    found: dict[str, Drawings] = {}
    for name, part in zip(writers.names, writers.parts, strict=True):
        mixed = rng.permutation(part)
        tests = max(1, len(part) // 5)
        found[f"writer-{int(name):02}"] = Drawings(
            path, label, {"train": sorted(mixed[tests:].tolist()), "test": sorted(mixed[:tests].tolist())}
        )
    return found


def together(writers: Sequence[Drawings]) -> Drawings:
    """All their drawings as one task."""
    rows = {split: [row for w in writers for row in w.rows[split]] for split in ("train", "test")}
    return Drawings(writers[0].path, writers[0].label, rows)


def find_drawings(data: str = "") -> str:
    """The file that was named, or the one that the environment names; raises OperatorError saying what it must hold."""
    named = data or os.environ.get(PATH_VARIABLE, "")
    if named and (path := Path(named).expanduser()).is_file():
        return str(path.resolve())
    found = f"there is no file {named}" if named else "no path was given"
    raise OperatorError(
        f"drawings: {found}. Name omniglot_small.npz by the option data=... or the environment variable "
        f"{PATH_VARIABLE}; README.md of this example says what it holds and how to make it"
    )


@lru_cache(maxsize=2)
def drawings_of(path: str, label: Label) -> tuple[TensorDataset, Any]:
    """(N, 1, 21, 21) float32, how much of each block of 5 × 5 pixels is ink, with (N,) labels; and (N,) writers.

    Raises OperatorError for a file that holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ink, writers, alphabets = file["ink"], file["drawer"], file["alphabet"].astype(np.int64)
            characters = file["character"].astype(np.int64)
        pixels = np.unpackbits(ink, axis=1, count=SIDE * SIDE).reshape(-1, SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"{path} does not hold ink, drawer, alphabet and character: {error!r}") from None
    # characters are counted within an alphabet: one class for each pair
    chosen = alphabets if label == "alphabet" else alphabets * (characters.max() + 1) + characters
    classes = np.unique(chosen, return_inverse=True)[1]
    inputs = torch.from_numpy(pixels.mean((2, 4), dtype=np.float32))[:, None]
    return TensorDataset(inputs, torch.from_numpy(classes.astype(np.int64))), writers
