"""A small transformer that knows half of Fashion-MNIST's classes, tuned among clients to the other half.

python examples/fashion_mnist/lora.py base.safetensors        # trains the base, on the classes 0 to 4
murmur simulate examples/fashion_mnist/lora.py:federation --option base=base.safetensors --option tune=lora
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from task import FashionMNIST
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur import load_base, lora

WIDTH, HEADS, BLOCKS, PATCH = 64, 4, 2, 7
KNOWN = 5  # classes of the base; the others are new

Tune = Literal["lora", "ffa", "head", "full"]


class Block(nn.Module):
    """Attention and a hidden layer, each after a norm; of nn.Linear layers, so that adapters reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        split = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)).relu())


class Trunk(nn.Module):
    """Images (B, 1, 28, 28) as 16 patches of 7 by 7, their mean after all blocks: (B, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.zeros((28 // PATCH) ** 2, WIDTH))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(BLOCKS))), nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        return self.norm(self.blocks(self.patches(patches) + self.place)).mean(1)


class NewClasses(FashionMNIST):
    """A `murmur.Task`: the classes 5 to 9 at client number `part` of `clients`, and a trunk that has never seen them.

    base: the trunk's file. tune: adapters ("lora"), their `up` half alone ("ffa"), the new head alone ("head"), or
    everything ("full"). images: of the split "train", the first so many; 0 for all.
    """

    def __init__(self, base: str, tune: Tune = "lora", rank: int = 4, images: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._base, self._tune, self._rank, self._images = Path(base).expanduser(), tune, rank, images

    def model(self) -> nn.Module:
        trunk = load_base(Trunk(), self._base)
        model = nn.Sequential(trunk, nn.Linear(WIDTH, 10 - KNOWN))
        if self._tune in ("lora", "ffa"):
            targets = ("*.query", "*.value", "*.up", "*.down")
            return lora(model, rank=self._rank, targets=targets, train=("1.*",), freeze_a=self._tune == "ffa")
        return model.requires_grad_() if self._tune == "full" else model

    def data(self, split: str) -> TensorDataset | None:
        held = super().data(split)
        if held is None:
            return None
        images, labels = (t[torch.as_tensor(held.indices)] for t in held.dataset.tensors)  # pyright: ignore[reportAttributeAccessIssue]: a TensorDataset
        rows = (labels >= KNOWN).nonzero()[:, 0]
        rows = rows[: self._images or None] if split == "train" else rows
        return TensorDataset(images[rows], labels[rows] - KNOWN) if len(rows) else None


def federation(clients: int = 10, base: str = "base.safetensors", **options: Any) -> dict[str, Any]:
    """The clients for a simulation; options as of `NewClasses`."""
    return {f"client-{k}": partial(NewClasses, base, part=k, clients=clients, **options) for k in range(clients)}


def pretrain(path: Path, epochs: int, data: str = "") -> float:
    """Train a trunk on the classes 0 to 4, write it, and return its accuracy on their test images."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    task, model = FashionMNIST(data), nn.Sequential(Trunk(), nn.Linear(WIDTH, KNOWN))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = _known(task, "train")
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    save_file(model[0].state_dict(), path)
    with torch.no_grad():
        images, labels = _known(task, "test")
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def _known(task: FashionMNIST, split: str) -> tuple[Tensor, Tensor]:
    held: Any = task.data(split)
    images, labels = held.dataset.tensors
    return images[labels < KNOWN], labels[labels < KNOWN]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=pretrain.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    sys.stdout.write(f"accuracy on the classes it was trained on: {pretrain(asked.path, asked.epochs):.3f}\n")
