"""What the engine is measured with: a small CNN, GPT-2-small and ResNet-50, each as a task with random data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


class SmallCnn:
    """0.42 million parameters on images of 28 by 28, as federated papers train on MNIST and its like."""

    def __init__(self, examples: int = 1024) -> None:
        self.examples = examples

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def data(self, split: str) -> TensorDataset | None:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.examples, 1, 28, 28, generator=generator)
        labels = torch.randint(0, 10, (self.examples,), generator=generator)
        return TensorDataset(images, labels) if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum")


class ResNet50(SmallCnn):
    """He et al. 2015, "Deep Residual Learning", arXiv:1512.03385, table 1, strided in the 3x3 layers: 25.6 million."""

    def model(self) -> nn.Module:
        blocks: list[nn.Module] = []
        width = 64
        for planes, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(count):
                blocks.append(_Bottleneck(width, planes, stride if number == 0 else 1))
                width = 4 * planes
        return nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1), *blocks,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000),
        )  # fmt: skip

    def data(self, split: str) -> TensorDataset | None:
        images = torch.randn(self.examples, 3, 224, 224)
        return TensorDataset(images, torch.randint(0, 1000, (self.examples,))) if split == "train" else None


class _Bottleneck(nn.Module):
    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, planes, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or width != 4 * planes:
            short = nn.Conv2d(width, 4 * planes, 1, stride=stride, bias=False)
            self.around = nn.Sequential(short, nn.BatchNorm2d(4 * planes))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.body(images) + self.around(images))


class Gpt2Small(SmallCnn):
    """12 layers of width 768 over 1,024 tokens of 50,257, the first matrix tied to the last: 124 million parameters.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2. The loss sums over tokens.
    """

    tokens = 1024

    def model(self) -> nn.Module:
        return _Gpt(vocabulary=50_257, width=768, layers=12, heads=12, tokens=self.tokens)

    def data(self, split: str) -> TensorDataset | None:
        text = torch.randint(0, 50_257, (self.examples, self.tokens + 1))
        return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous()) if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")

    def count(self, target: Tensor) -> int:
        return target.numel()


class _Gpt(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.words(text) + self.places.weight[: text.shape[1]]
        return functional.linear(self.norm(self.blocks(hidden)), self.words.weight)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts: Any = self.attend(self.before(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.join(seen.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.narrow(functional.gelu(self.widen(self.after(hidden)), approximate="tanh"))
