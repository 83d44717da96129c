"""Shakespeare's plays by speaking role: a character-level LSTM that predicts each next character."""

from __future__ import annotations

import gzip
import json
import os
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.simulation.partitioning import iid

PATH_VARIABLE = "MURMUR_SHAKESPEARE"
LENGTH = 80  # characters that are unrolled at once
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # what ASCII prints
SYMBOLS = len(CHARACTERS) + 1  # the last is whatever is none of them


class Model(nn.Module):
    """Logits (N, T, SYMBOLS) of each next character from characters (N, T)."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 8)
        self.lstm = nn.LSTM(8, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(inputs))[0])


class Lines:
    """A `murmur.Task`: what one role says, in pieces of 80 characters.

    rows: of all roles' pieces, by split. hidden, layers: of the LSTM; the paper's are 256 and 2.
    """

    def __init__(self, path: str, rows: dict[str, Any], hidden: int, layers: int) -> None:
        self.path, self.rows, self.size = path, rows, (hidden, layers)

    def model(self) -> nn.Module:
        return Model(*self.size)

    def data(self, split: str) -> Subset[Any] | None:
        return Subset(pieces_of(self.path)[0], self.rows[split]) if len(self.rows[split]) else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")

    def count(self, target: Tensor) -> int:
        return target.numel()

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(-1) == target).sum(), target.numel())}


def federation(
    clients: int = 0,
    data: str = "",
    split: Literal["roles", "iid"] = "roles",
    hidden: int = 128,
    layers: int = 1,
    seed: int = 0,
) -> list[Lines]:
    """The clients for a simulation: the `clients` roles that say most, 0 for all; of each the last fifth is for tests.

    split: "iid" deals the same train pieces out in equal parts. data: path to shakespeare.jsonl.gz, else the
    environment variable MURMUR_SHAKESPEARE says it.
    """
    if split not in ("roles", "iid") or clients < 0:
        raise OperatorError(f"split = {split!r}, clients = {clients}: roles or iid, and 0 or more clients")
    path = find_plays(data)
    roles = pieces_of(path)[1][: clients or None]
    if len(roles) < max(1, clients):
        raise OperatorError(f"{len(roles)} roles say {2 * LENGTH} characters or more, {clients or 1} are needed")
    cuts = [(end - begin) * 4 // 5 for begin, end in roles]
    train = [np.arange(begin, begin + cut) for (begin, _), cut in zip(roles, cuts, strict=True)]
    tests = [np.arange(begin + cut, end) for (begin, end), cut in zip(roles, cuts, strict=True)]
    if split == "iid":
        rows = np.concatenate(train)
        train = [rows[part] for part in iid(len(rows), len(roles), seed=seed).parts]
    return [
        Lines(path, {"train": a.tolist(), "test": b.tolist()}, hidden, layers)
        for a, b in zip(train, tests, strict=True)
    ]


def together(clients: list[Lines], split: str) -> Lines:
    """All clients' pieces of one split as one task, with nothing in the other."""
    rows = {"train": [], "test": []} | {split: [row for c in clients for row in c.rows[split]]}
    return Lines(clients[0].path, rows, *clients[0].size)


def find_plays(data: str = "") -> str:
    """The file that was named, or the one that the environment names; raises OperatorError saying what it must hold."""
    named = data or os.environ.get(PATH_VARIABLE, "")
    if named and (path := Path(named).expanduser()).is_file():
        return str(path.resolve())
    found = f"there is no file {named}" if named else "no path was given"
    raise OperatorError(
        f"plays: {found}. Name shakespeare.jsonl.gz by the option data=... or the environment variable "
        f"{PATH_VARIABLE}; README.md of this example says what it holds and how to make it"
    )


@lru_cache(maxsize=1)
def pieces_of(path: str) -> tuple[TensorDataset, list[tuple[int, int]]]:
    """Pieces of all roles, (N, 80) characters and the (N, 80) that follow them, and each role's rows, largest first.

    A role with fewer than two pieces is left out. Raises OperatorError for a file that holds something else.
    """
    said: dict[tuple[str, str], list[str]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                speech = json.loads(line)
                said.setdefault((speech["play"], speech["speaker"]), []).append(speech["text"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"{path} does not hold play, speaker and text in each line: {error!r}") from None
    pieces = [_cut("\n".join(speeches)) for _, speeches in sorted(said.items())]
    pieces = sorted((rows for rows in pieces if len(rows) >= 2), key=len, reverse=True)
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    whole = torch.from_numpy(np.concatenate([np.empty((0, LENGTH + 1), np.int64), *pieces]))
    return TensorDataset(whole[:, :-1], whole[:, 1:]), [*pairwise(ends)]


def _cut(text: str) -> np.ndarray[Any, Any]:
    """(N, 81) symbols: each row's last is the next one's first; what is left at the end is dropped."""
    codes = {character: code for code, character in enumerate(CHARACTERS)}
    coded = np.array([codes.get(character, SYMBOLS - 1) for character in text], np.int64)
    return coded[np.arange((len(coded) - 1) // LENGTH)[:, None] * LENGTH + np.arange(LENGTH + 1)]
