"""What smaller models lose on Fashion-MNIST: `python -m benchmarks.compression --data fashion_mnist.npz`.

Rounded after training (PTQ) or trained for it (QAT) with the same steps, by this project's own rounding and by
torchao's, and a student of an eighth of the channels. See docs/decisions/0015.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from murmur.clients.engine import compression
from murmur.clients.engine.compression import Shaping, quantized, read_tensors, rounded
from murmur.clients.engine.distillation import divergence
from murmur.clients.engine.state import write_tensors
from murmur.protocol.sections import Train

from .report import Figure, document, note, print_report

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion_mnist"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--data", required=True, help="fashion_mnist.npz")
    parser.add_argument("--images", type=int, default=8000, help="to train on [%(default)s]")
    parser.add_argument("--base", help="a version's file to begin with and to teach; else two epochs are trained first")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--json", dest="form", action="store_const", const="json")
    parser.add_argument("--markdown", dest="form", action="store_const", const="markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLE))
    bench = Bench(options.data, options.images, options.base)
    figures = [figure for name in options.only or PARTS for figure in PARTS[name](bench)]
    print_report(document(figures, folder=Path(tempfile.gettempdir()), quick=False), options.form)


class Bench:
    """The data, and the networks that all parts begin with: the same for the same number of images."""

    def __init__(self, data: str, images: int, base: str | None = None) -> None:
        from task import images_of  # pyright: ignore[reportMissingImports]: beside the example

        found = images_of(str(Path(data).resolve()))
        self.images, self.classes = (t[:images] for t in found["train"].tensors)
        self.tests, self.test_classes = found["test"].tensors
        self.given = base
        torch.manual_seed(0)

    @cached_property
    def base(self) -> nn.Module:
        model = self.large()
        if self.given is None:
            return self.train(model, epochs=2)
        model.load_state_dict(read_tensors(Path(self.given))[0])
        return model

    @cached_property
    def plain(self) -> nn.Module:
        """The base after another epoch."""
        return self.train(copy.deepcopy(self.base), epochs=1)

    @staticmethod
    def large() -> nn.Module:
        from task import FashionMNIST  # pyright: ignore[reportMissingImports]: as above

        return FashionMNIST.model(None)  # pyright: ignore[reportArgumentType]: it needs no data for it

    @staticmethod
    def small() -> nn.Module:
        from distilled import Student  # pyright: ignore[reportMissingImports]: as above

        return Student.model(None)  # pyright: ignore[reportArgumentType]: as above

    def train(
        self,
        model: nn.Module,
        *,
        epochs: int,
        lr: float = 0.01,
        shaping: Shaping | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """SGD with momentum 0.9; loss: of outputs and the rows they are of, in place of the cross entropy."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
        for epoch in range(epochs):
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
            for rows in order.split(BATCH):
                if shaping:
                    shaping.begin()
                output = model(self.images[rows])
                (loss(output, rows) if loss else cross_entropy(output, self.classes[rows])).backward()
                if shaping:
                    shaping.end()
                optimizer.step()
                optimizer.zero_grad()
        return model

    def measured(self, name: str, model: nn.Module, said: str = "") -> list[Figure]:
        """Its accuracy on the test images, and what a thousand of them cost."""
        began = time.process_time()
        with torch.no_grad():
            right = sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(self.tests.split(500), self.test_classes.split(500), strict=True)
            )
        cost = 1e3 * (time.process_time() - began) / (len(self.tests) / 1000)
        note(f"{name}: {100 * right / len(self.tests):.2f} %, {cost:.0f} ms")
        return [
            Figure(name=name, value=100 * right / len(self.tests), unit="%", note=said),
            Figure(name=f"{name}_cpu", value=cost, unit="ms per 1,000 images"),
        ]


def as_rounded(model: nn.Module) -> nn.Module:
    """A copy with its weights as they come back from a file of so many levels."""
    found = copy.deepcopy(model)
    for p in found.parameters():
        if p.ndim > 1:
            p.data = rounded(p.data)
    return found


def size(tensors: dict[str, Tensor]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return write_tensors(tensors, Path(folder) / "model").file_bytes


def in_bits(bits: int) -> Callable[[Bench], list[Figure]]:
    """The engine's rounding of all weights; fewer than the 8 that it writes, to see where it begins to cost."""

    def measure(bench: Bench) -> list[Figure]:
        plain, trained = bench.plain, copy.deepcopy(bench.base)
        found = bench.measured("original", plain)
        with patch.object(compression, "LEVELS", 2 ** (bits - 1) - 1):
            bench.train(trained, epochs=1, shaping=Shaping(trained, Train(qat=True)))
            found += bench.measured(f"int{bits}_ptq", as_rounded(plain))
            found += bench.measured(f"int{bits}_qat", as_rounded(trained), "the same base and steps, rounded in each")
        if bits == 8:
            weights = dict(plain.state_dict())
            found += [
                Figure(name="original_bytes", value=size(weights) / 1e3, unit="KB"),
                Figure(name="int8_bytes", value=size(quantized(weights, frozenset())) / 1e3, unit="KB"),
            ]
        return found

    return measure


def by_torchao(bench: Bench) -> list[Figure]:
    """The same through torchao, which takes nn.Linear only."""
    import torchao.quantization as ao  # pyright: ignore[reportMissingImports]: not a dependency
    from torchao.quantization.qat import QATConfig, QATStep  # pyright: ignore[reportMissingImports]: as above

    int4 = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerAxis(0))  # pyright: ignore[reportAttributeAccessIssue]: it has no stub
    found: list[Figure] = []
    for name, config in (
        ("ao_int8_weights", ao.Int8WeightOnlyConfig()),
        ("ao_int8_dynamic", ao.Int8DynamicActivationInt8WeightConfig()),
        ("ao_int4_ptq", int4),
    ):
        model: Any = copy.deepcopy(bench.plain)
        ao.quantize_(model, config)
        found += bench.measured(name, model)
    model = copy.deepcopy(bench.base)
    ao.quantize_(model, QATConfig(int4, step=QATStep.PREPARE))
    bench.train(model, epochs=1)
    ao.quantize_(model, QATConfig(int4, step=QATStep.CONVERT))
    return found + bench.measured("ao_int4_qat", model)


def student(bench: Bench) -> list[Figure]:
    """The small network from labels alone, and taught by the large one, over as many epochs."""
    teacher = bench.base
    with torch.no_grad():
        said = torch.cat([teacher(x) for x in bench.images.split(500)])

    def taught(output: Tensor, rows: Tensor) -> Tensor:
        soft = divergence(output, said[rows], 3.0) / len(rows)
        return 0.1 * cross_entropy(output, bench.classes[rows]) + 0.9 * soft

    torch.manual_seed(1)
    start = bench.small()
    alone = bench.train(copy.deepcopy(start), epochs=6, lr=0.02)
    learned = bench.train(copy.deepcopy(start), epochs=6, lr=0.02, loss=taught)
    found = bench.measured("teacher", teacher) + bench.measured("student_alone", alone)
    found += bench.measured("student_taught", learned)
    return [*found, Figure(name="student_bytes", value=size(dict(learned.state_dict())) / 1e3, unit="KB")]


PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    **{f"int{bits}": in_bits(bits) for bits in (8, 4, 3)},
    "torchao": by_torchao,
    "student": student,
}


if __name__ == "__main__":
    main()
