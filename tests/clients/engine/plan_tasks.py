"""Models for plans that split them, with sizes that two processes cannot share evenly."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from murmur.clients.engine.lora import load_base, lora


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.inner(self.norm(inputs))


class Attention(nn.Module):
    """Two heads; each process computes as many of them as its part of the projections has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = width // 2

    def forward(self, inputs: Tensor) -> Tensor:
        normed = self.norm(inputs)
        q, k, v = (layer(normed).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return inputs + self.o(mixed.transpose(1, 2).flatten(2))


class Counting(nn.Module):
    """Adds a little more to its input at each step of training; one count travels and one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("table", torch.linspace(0, 1, 10), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return inputs + 0.01 * self.table


class Deep:
    """63 rows of 8 numbers in 3 classes."""

    def __init__(self, n: int = 63, dropout: float = 0.0, fault: str = "") -> None:
        self.n, self.dropout, self.fault, self.trained = n, dropout, fault, 0

    def model(self) -> nn.Module:
        middle = [Block(10, 15, self.dropout), Block(10, 14)]
        return nn.Sequential(nn.Linear(8, 10), *middle, Counting(), Block(10, 15), nn.Linear(10, 3))

    def data(self, split: str) -> Dataset | None:
        rows = self.n if split == "train" else 21
        generator = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(rows, 8, generator=generator)
        return TensorDataset(inputs, (inputs[:, :3] + 0.3 * inputs[:, 3:6]).argmax(1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.trained += 1
            last = dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1
            mark = Path(os.environ.get("MURMUR_TEST_MARK", "/nonexistent"))
            if self.fault == "killed late" and last and self.trained == 20 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "inf on rank 1" and last:
                return nn.functional.cross_entropy(output, target, reduction="sum") * float("inf")
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target))}


class Tokens(Deep):
    """Sequences whose labels are in part to be ignored; embedding and head are one weight."""

    def model(self) -> nn.Module:
        return Language(self.fault != "untied")

    def data(self, split: str) -> Dataset | None:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randint(0, 11, (self.n, 5), generator=generator)
        target = torch.randint(0, 11, (self.n, 5), generator=generator)
        target[torch.arange(5).expand(self.n, 5) > torch.arange(self.n)[:, None] % 5] = -100
        return TensorDataset(inputs, target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), target, reduction="sum", ignore_index=-100)

    def count(self, target: Tensor) -> int:
        return int((target != -100).sum())

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        kept = target != -100
        return {"accuracy": ((output.argmax(-1) == target)[kept].sum(), int(kept.sum()))}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [*model.blocks]

    def tensor_plan(self, model: nn.Module) -> dict[str, ColwiseParallel | RowwiseParallel]:
        columns = [f"blocks.{b}.{layer}" for b in (0, 2) for layer in "qkv"] + [f"blocks.{b}.inner.0" for b in (1, 3)]
        found = {name: ColwiseParallel() for name in columns}
        return found | {
            n: RowwiseParallel() for n in ("blocks.0.o", "blocks.2.o", "blocks.1.inner.2", "blocks.3.inner.2")
        }

    def stages(self, model: nn.Module, n: int) -> list[nn.Module]:
        parts = [model.embed, *model.blocks, model.head]
        at = [round(i * len(parts) / n) for i in range(n + 1)]
        return [nn.Sequential(*parts[a:b]) for a, b in itertools.pairwise(at)]


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Attention(8), Block(8, 12), Attention(8), Block(8, 12)])
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Normed(Deep):
    """BatchNorm in the middle."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3))


class Shaped(Deep):
    """No Sequential at all, and nothing that says how to cut it."""

    def model(self) -> nn.Module:
        return Attentive()


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).relu())


class Held(Deep):
    """Tells how many numbers of the model each process has, as this engine sees them and as torch does."""

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // 4 for p in plain_parameters()}
        return {"accuracy": (torch.tensor(float(sum(held.values()))), 1)}


def plain_parameters() -> list[nn.Parameter]:
    found = (o for o in gc.get_objects() if isinstance(o, nn.Parameter))
    return [p for p in found if type(p.data) is Tensor and not p.is_meta]


class Same(Dataset):
    """Input and target are the same number, drawn anew each time."""

    def __len__(self) -> int:
        return 63

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(1)
        return drawn, drawn


class Through(nn.Module):
    """Gives its input, and draws as many numbers as it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.weight * nn.functional.dropout(inputs, 0.5, self.training)


class Drawn(Deep):
    """A model that is right when the last stage has the target of the first one's input."""

    def model(self) -> nn.Module:
        return nn.Sequential(Through(), Through())

    def data(self, split: str) -> Dataset | None:
        return Same() if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()


class Slow(nn.Module):
    """Has no weights, does nothing, and takes 3 ms for it."""

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(0.003)
        return inputs + 0.0


class Lopsided(Deep):
    """By its weights it is cut behind the first layer; all the time goes into what comes later."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 10), Slow(), Slow(), Slow(), nn.Linear(10, 3))


class PartlyFrozen(Deep):
    """A frozen layer, which is the same wherever it is built, and one that trains."""

    def model(self) -> nn.Module:
        frozen = nn.Linear(8, 16).requires_grad_(False)
        frozen.weight.fill_(0.1)
        frozen.bias.fill_(0.0)
        return nn.Sequential(frozen, nn.Linear(16, 3))


class AtHome(Deep):
    """A last layer that stays at the site."""

    local = ("5.*",)


class Tuned(Deep):
    """Deep, frozen, its base from a file where there is one, with adapters and a last layer that train."""

    def __init__(self, base: str = "", **options) -> None:
        super().__init__(**options)
        self.base = base

    def model(self) -> nn.Module:
        net = super().model()
        if self.base:
            load_base(net, self.base)
        else:
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return lora(net, rank=2, targets=("*.inner.*",), train=("5.*",))


class TwoSets(Deep):
    """Rows as two data sets."""

    def data(self, split: str):
        rows = super().data(split)
        return {"one": Subset(rows, range(20)), "two": rows}


class Forked(TwoSets):
    """A head for each of two data sets; a piece goes through one of them."""

    mixed = True

    def model(self) -> nn.Module:
        return Fork()

    def loss(self, output: Tensor, target: tuple[str, Tensor]) -> Tensor:
        return super().loss(output, target[1])

    def metrics(self, output: Tensor, target: tuple[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        return super().metrics(output, target[1])


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 10), Block(10, 15))
        self.heads = nn.ModuleDict({name: nn.Linear(10, 3) for name in ("one", "two")})

    def forward(self, told: tuple[str, Tensor]) -> Tensor:
        name, inputs = told
        return self.heads[name](self.trunk(inputs))


class Lines(IterableDataset):
    """Rows one after the other; going back within an epoch, which means reading anew, is an error."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.begun = rows, 0

    def __iter__(self):
        self.begun += 1
        # Two epochs, two looks at the loss, one for a pipeline's costs; ranks that stay for three plans come to 9.
        assert self.begun <= 9, "an epoch was read anew"
        return iter(self.rows)


class Streamed(Deep):
    """Rows as a stream."""

    def data(self, split: str):
        return Lines(super().data(split)) if split == "train" else super().data(split)

    def examples(self, split: str) -> int:
        return self.n
