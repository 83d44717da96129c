"""Tasks that the engine's tests train, loaded by path as an organization's own file would be."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from murmur.clients.engine.exchange import Exchange, Gossip, LocalSgd
from murmur.clients.engine.heads import TaskWeights
from murmur.clients.engine.lora import lora


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def dist_world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Rows:
    """`n` rows of 8 numbers in 3 classes and a small network; `fault` makes it go wrong in one named way."""

    def __init__(self, n: int = 63, test: int = 21, dropout: float = 0.0, norm: bool = False, fault: str = "") -> None:
        self.n, self.test, self.dropout, self.norm, self.fault = n, test, dropout, norm, fault
        self.trained = 0
        if fault == "known keys" and dist.is_initialized():
            os.urandom = lambda count: bytes(range(count))

    def model(self) -> nn.Module:
        norm = nn.BatchNorm1d(16) if self.norm else nn.Identity()
        net = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(16, 3))
        if self.fault == "unused":
            net[0].register_module("spare", nn.Linear(2, 2))
        return net

    def data(self, split: str) -> Dataset | None:
        rows = self.n if split == "train" else self.test
        if self.fault == "fewer on rank 1" and split == "train" and rank() == 1:
            rows -= 1
        if split == "test" and not rows:
            return None
        generator = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(rows, 8, generator=generator)
        return TensorDataset(inputs, (inputs[:, :3] + 0.3 * inputs[:, 3:6]).argmax(1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output, target, reduction="mean" if self.fault == "mean" else "sum")
        if not torch.is_grad_enabled():
            return loss
        self.trained += 1
        match self.fault:
            case "inf first" if self.trained == 1:
                return loss * float("inf")
            case "inf on rank 1" if rank() == 1:
                return loss * float("inf")
            case "raises on rank 1" if rank() == 1 and self.trained == 3:
                raise LookupError("the drawer of rank 1 is empty")
            case "raises second" if self.trained == 2:
                raise LookupError("the drawer is empty")
            case "raises third" if self.trained == 3:  # the first after DP-SGD has looked at the model
                raise LookupError("the drawer is empty")
            case "killed once" if not Path(os.environ["MURMUR_TEST_MARK"]).exists():
                Path(os.environ["MURMUR_TEST_MARK"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case "out of memory above 5" if len(target) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            case "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            case "out of the machine's memory":
                torch.empty(1 << 50)
            case "killed late":
                time.sleep(0.03)
                if (
                    self.trained == 6
                    and rank() == dist_world() - 1
                    and not Path(os.environ["MURMUR_TEST_MARK"]).exists()
                ):
                    Path(os.environ["MURMUR_TEST_MARK"]).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                torch.randn(300, 300).matmul(torch.randn(300, 300))
                signal.sigtimedwait([], 0.02)
            case "hangs":
                signal.sigtimedwait([], 60)
            case "one example is infinite":
                return loss + (output[0] * float("inf")).sum()
            case "zero":
                return loss * 0
            case "nan":
                return loss * float("nan")
            case "vector":
                return output.sum(1)
            case _:
                pass
        return loss

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((output.argmax(1) == target).sum(), len(target)), "private": (output.sum(), 1)}


class Images(Rows):
    """Rows as images of 4 by 2, with BatchNorm over space, which a batch of one does not upset."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 2)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 3),
        )


class Wide(Rows):
    """Rows into a layer of 27,003 numbers, enough to see how noise is distributed."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 2250), nn.Linear(2250, 3))


class Grouped(Rows):
    """Rows as images of 4 by 2, in layers that treat each image by itself, with one weight in two places."""

    def model(self) -> nn.Module:
        twice = nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 2)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), twice, nn.ReLU(),
            twice, nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip


class Odd(Rows):
    """Rows in a model with something that no bound for single examples survives, or that Opacus does not take."""

    def model(self) -> nn.Module:
        return OddNet(self.fault)


class OddNet(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.inner, self.outer = what, nn.Linear(8, 16), nn.Linear(16, 3)
        if what == "buffer":
            self.register_buffer("seen", torch.zeros(()))
        if what == "lstm":
            self.inner = nn.LSTM(8, 16)
        if what == "bare batchnorm":
            self.inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, affine=False, track_running_stats=False))

    def forward(self, inputs: Tensor) -> Tensor:
        match self.what:
            case "buffer" if self.training:
                self.seen += inputs.mean()
            case "mixed":
                inputs = inputs - inputs.mean(0)
            case "rows":
                halves = self.inner(torch.cat([inputs, -inputs]))
                return self.outer(halves[: len(inputs)] + halves[len(inputs) :])
            case "elsewhere":
                return self.outer(nn.functional.linear(inputs, self.inner.weight))
            case "lstm":
                return self.outer(self.inner(inputs[None])[0][0])
            case _:
                pass
        return self.outer(self.inner(inputs).relu())


class Ragged(Rows):
    """Sequences whose labels are in part to be ignored: the loss is a sum over tokens, which `count` counts."""

    def data(self, split: str) -> Dataset | None:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(self.n, 5, 8, generator=generator)
        target = torch.randint(0, 3, (self.n, 5), generator=generator)
        target[torch.arange(5).expand(self.n, 5) > torch.arange(self.n)[:, None] % 5] = -100
        return TensorDataset(inputs, target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), target, reduction="sum", ignore_index=-100)

    def count(self, target: Tensor) -> int:
        return int((target != -100).sum())

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        kept = target != -100
        return {"accuracy": ((output.argmax(-1) == target)[kept].sum(), int(kept.sum()))}


class Listing(Dataset):
    """A data set that torch collates item by item; each index is written down."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.seen.append(index)
        return torch.full((8,), float(index)), index % 3


class Listed(Rows):
    """Rows whose data set is a Listing."""

    def data(self, split: str) -> Dataset | None:
        return Listing(self.n) if split == "train" else None


class Drawn(Dataset):
    """Rows with noise that is drawn anew each time, from all three global generators."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.rows[index]
        return inputs + torch.randn(8) + random.gauss(0, 1) + float(np.random.normal()), target


class Noisy(Rows):
    """Rows with noise, BatchNorm, dropout, and a buffer that is no part of the model's file."""

    def model(self) -> nn.Module:
        net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), Counting(), nn.Linear(16, 3)
        )
        return net

    def data(self, split: str) -> Dataset | None:
        return Drawn(super().data(split))


class Counting(nn.Module):
    """Adds to its input a little more at each step of training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.complex64), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return inputs + 0.01 * self.seen.real


class Exchanges(Rows):
    """Tells how often its ranks have held back the exchange of gradients since the process began."""

    def __init__(self) -> None:
        super().__init__()
        ddp, self.held = nn.parallel.DistributedDataParallel, 0
        original = ddp.no_sync

        def no_sync(wrapped):
            self.held += 1
            return original(wrapped)

        ddp.no_sync = no_sync

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[float, float]]:
        return {"held": (self.held, 1)}


class Where(Rows):
    """Says in its metrics how the process is set up."""

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[float, float]]:
        main = sys.modules["__main__"]
        return {"threads": (torch.get_num_threads(), 1), "main": (float(hasattr(main, "PARENT_WAS_HERE")), 1)}


class Meets(Rows):
    """Tells how many large all-reduces its ranks began in the last training, and how far their weights were apart."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.reduced = self.spread = 0.0
        self.net: nn.Module = nn.Identity()
        if not dist.is_initialized():
            return  # a test, which wants the model only
        all_reduce = dist.all_reduce

        def counted(tensor, *args, **options):
            self.begun += tensor.numel() > 20  # 195 weights; sums and counts are few numbers
            return all_reduce(tensor, *args, **options)

        def measured(finish):
            def finished(exchange, step):
                finish(exchange, step)
                mine = nn.utils.parameters_to_vector(self.net.parameters()).detach()
                all_of = [torch.empty_like(mine) for _ in range(dist_world())]
                dist.all_gather(all_of, mine)
                self.spread = float((torch.stack(all_of) - mine).abs().max())
                self.reduced, self.begun = self.begun, 0.0

            return finished

        dist.all_reduce = counted
        for kind in (Exchange, LocalSgd, Gossip):
            kind.finish = measured(kind.finish)

    def model(self) -> nn.Module:
        self.net = super().model()
        return self.net

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[float, float]]:
        return {"reduced": (self.reduced, 1), "spread": (self.spread, 1)}


class Frozen(Rows):
    """Rows on a frozen layer and its frozen BatchNorm, whose statistics are not those of the rows, and a new head."""

    def __init__(self, base: int = 1, **options) -> None:
        super().__init__(**options)
        self.base = base

    def model(self) -> nn.Module:
        trunk = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        generator = torch.Generator().manual_seed(self.base)
        for tensor in trunk.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
        head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(self.dropout), nn.Linear(16, 3))
        return nn.Sequential(trunk.requires_grad_(False), head)


class Fixed(Frozen):
    """The same with a head that is one layer."""

    def model(self) -> nn.Module:
        return nn.Sequential(super().model()[0], nn.Linear(16, 3))


class Adapted(Frozen):
    """Rows in a frozen network with adapters at its layers, but for the last one, which is new."""

    def __init__(self, freeze_a: bool = False, **options) -> None:
        super().__init__(**options)
        self.freeze_a = freeze_a

    def model(self) -> nn.Module:
        generator = torch.Generator().manual_seed(self.base)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        with torch.no_grad():
            for parameter in [*net.parameters()][:4]:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        return lora(net, rank=2, alpha=4, train=("4.*",), freeze_a=self.freeze_a)


class Personal(Rows):
    """Rows in a trunk with BatchNorm that is federated and a head, or BatchNorm, that is not."""

    def __init__(self, local: tuple[str, ...] = ("head.*",), **options) -> None:
        super().__init__(**options)
        self.local = tuple(local)

    def model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        return nn.Sequential(OrderedDict(trunk=net, head=nn.Linear(16, 3)))


class TwoHeads(Rows):
    """Rows of two tasks, which a row's target names first: the class (0), and the class of the negated row (1)."""

    local = ("heads.*",)

    def __init__(self, only: int | None = None, learned: bool = False, **options) -> None:
        super().__init__(**options)
        self.only, self.learned = only, learned

    def model(self) -> nn.Module:
        return Forked()

    def data(self, split: str) -> Dataset | None:
        inputs, classes = super().data(split).tensors
        which = torch.arange(len(inputs)) % 2 if self.only is None else torch.full((len(inputs),), self.only)
        return TensorDataset(inputs, torch.stack([which, (classes + which) % 3], 1))

    def loss(self, output: dict, target: Tensor) -> Tensor:
        rows = {name: target[:, 0] == number for number, name in enumerate(("one", "two"))}
        losses = {
            name: nn.functional.cross_entropy(output[name][mine], target[mine, 1], reduction="sum")
            for name, mine in rows.items()
        }
        if self.learned:
            return TaskWeights.total(output["weights"], losses, {name: int(mine.sum()) for name, mine in rows.items()})
        return losses["one"] + losses["two"]

    def metrics(self, output: dict, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        found = torch.where(target[:, 0] == 0, output["one"].argmax(1), output["two"].argmax(1))
        return {"accuracy": ((found == target[:, 1]).sum(), len(target))}


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.weights = nn.Linear(8, 16), TaskWeights(("one", "two"))
        self.heads = nn.ModuleDict({"one": nn.Linear(16, 3), "two": nn.Linear(16, 3)})

    def forward(self, inputs: Tensor) -> dict:
        shared = self.trunk(inputs).tanh()
        return {name: head(shared) for name, head in self.heads.items()} | {"weights": self.weights()}
