"""Tasks with several data sets, with rare classes and with streams."""

from __future__ import annotations

import os
from typing import Any

import torch
from sample_tasks import Rows
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset


class Wards(Rows):
    """The same rows in two data sets, `ct` with three quarters of them and `mri` with the others, or in one."""

    def __init__(self, joined: bool = False, **options) -> None:
        super().__init__(**options)
        self.joined = joined

    def data(self, split: str) -> Dataset | dict[str, Dataset] | None:
        whole = super().data(split)
        cut = len(whole) * 3 // 4
        ct, mri = (TensorDataset(*(t[part] for t in whole.tensors)) for part in (slice(cut), slice(cut, None)))
        return ConcatDataset([ct, mri]) if self.joined else {"ct": ct, "mri": mri}


class Heads(Wards):
    """A trunk, and a head for each data set: `ct` tells 3 classes, `mri`, whose rows are shorter, a number."""

    mixed = True

    def model(self) -> nn.Module:
        return Forked()

    def data(self, split: str) -> dict[str, Dataset]:
        both = super().data(split)
        inputs, _ = both["mri"].tensors
        mri = TensorDataset(inputs[:, :5], inputs[:, 5:].sum(1))
        return {"ct": both["ct"], "mri": OneByOne(mri) if self.fault == "one by one" else mri}

    def loss(self, output: Tensor, target: tuple[str, Tensor]) -> Tensor:
        name, wanted = target
        if name == "ct":
            return nn.functional.cross_entropy(output, wanted, reduction="sum")
        return nn.functional.mse_loss(output[:, 0], wanted, reduction="sum")

    def metrics(self, output: Tensor, target: tuple[str, Tensor]) -> dict[str, tuple[float, int]]:
        return {target[0]: (float(len(output)), 1), "accuracy": (0.0, len(target[1]))}


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.ModuleDict({"ct": nn.Linear(8, 16), "mri": nn.Linear(5, 16)})
        self.trunk = nn.Linear(16, 16)
        self.heads = nn.ModuleDict({"ct": nn.Linear(16, 3), "mri": nn.Linear(16, 1)})

    def forward(self, given: tuple[str, Tensor]) -> Tensor:
        name, inputs = given
        return self.heads[name](self.trunk(self.lift[name](inputs).relu()).relu())


class OneByOne(Dataset):
    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inner[index]


class Rare(Rows):
    """Rows of which the class 2 has only four; the classes are told in one of several ways."""

    def __init__(self, told: str = "targets", **options) -> None:
        super().__init__(**options)
        self.told = told

    def data(self, split: str) -> Dataset:
        inputs = super().data(split).tensors[0]
        target = torch.arange(len(inputs)) % 2
        target[:4] = 2
        made = TensorDataset(inputs, target)
        return made if self.told == "targets" else OneByOne(made)

    def __getattr__(self, name: str):
        if name == "labels" and self.told == "labels":
            return lambda split: [int(target) for _, target in self.data(split)]
        raise AttributeError(name)


class Lines(IterableDataset):
    """Rows one after the other; says how far it was read, how often, and which readings it was told."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows, self.read, self.readings, self.told = rows, 0, 0, []

    def set_epoch(self, number: int) -> None:
        self.told.append(number)

    def __iter__(self):
        self.readings += 1
        self.read = 0
        for row in zip(*self.rows.tensors, strict=True):
            self.read += 1
            yield row


class Streamed(Rows):
    """Rows as a stream; `promised` examples of it, or none told."""

    def __init__(self, promised: int = 63, workers: int = 0, both: bool = False, **options) -> None:
        super().__init__(**options)
        self.promised, self.workers, self.both, self.made = promised, workers, both, {}

    def data(self, split: str) -> Dataset | dict[str, Dataset]:
        self.made[split] = Lines(super().data(split))
        return {"a": self.made[split]} if self.both else self.made[split]

    def __getattr__(self, name: str):
        if name == "examples" and self.promised:
            return lambda split: self.promised if split == "train" else self.test
        raise AttributeError(name)


class Kept(Lines):
    """Lines that say where they are; every row that is read is noted in a file, by process."""

    def __init__(self, rows: TensorDataset, note: str) -> None:
        super().__init__(rows)
        self.note, self.at, self.first = note, 0, 0

    def state_dict(self) -> dict:
        return {"at": self.at, "drawn": torch.arange(3), "odd": {1: (b"\x00\xff", None)}}

    def load_state_dict(self, state: dict) -> None:
        assert state["odd"] == {1: (b"\x00\xff", None)} and state["drawn"].tolist() == [0, 1, 2]
        self.first = state["at"]

    def __iter__(self):
        self.at, self.first = self.first, 0
        while self.at < len(self.rows):
            with open(self.note, "a") as file:
                file.write(f"{os.getpid()} {self.at}\n")
            self.at += 1
            yield self.rows[self.at - 1]


class Stateful(Rows):
    """Rows from a stream that says where it is, or from torchdata's loader over them."""

    def __init__(self, note: str, by: str = "", **options) -> None:
        super().__init__(**options)
        self.note, self.by = note, by

    def data(self, split: str) -> Any:
        rows = super().data(split)
        return Kept(rows, self.note) if split == "train" else rows

    def examples(self, split: str) -> int:
        return self.n
