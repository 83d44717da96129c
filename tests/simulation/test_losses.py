"""cross_entropy by columns against torch's own, in float64, where 1e-14 is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from murmur.simulation import losses
from murmur.simulation.losses import ByColumns

Loss = Callable[[Tensor, Tensor], Tensor]


def summed(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="sum")


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    output = 3 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    return output, torch.randint(7, (50,), generator=generator)


def both(loss: Loss, output: Tensor, target: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The loss and its gradient by columns, and as torch has them."""
    one, two = (output.clone().requires_grad_() for _ in range(2))
    with ByColumns() as columns:
        fast = loss(one, target)
    slow = loss(two, target)
    return (fast.detach(), columns.gradient(fast, one)), (slow.detach(), torch.autograd.grad(slow, two)[0])


def in_place(output: Tensor, target: Tensor) -> Tensor:
    return summed(output, target).mul_(2)


TAKEN: dict[str, Loss] = {
    "sum": summed,
    "module": torch.nn.CrossEntropyLoss(reduction="sum"),
    "mean": functional.cross_entropy,
    "each": lambda output, target: functional.cross_entropy(output, target, reduction="none").square().sum(),
    "scaled": lambda output, target: 3 * summed(output, target),
    "in place": in_place,
    "of something else": lambda output, target: summed(output * 2, target),
    "twice": lambda output, target: summed(output, target) + summed(output.flip(1), target),
}


@pytest.mark.parametrize("case", TAKEN)
def test_by_columns_is_torchs_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    log_softmax = functional.log_softmax
    monkeypatch.setattr(functional, "log_softmax", lambda *a: taken.append(a[0]) or log_softmax(*a))
    output, target = rows()
    fast, slow = both(TAKEN[case], output, target)
    assert taken  # by columns it was
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


LEFT: dict[str, Loss] = {
    "weights": lambda o, t: functional.cross_entropy(o, t, torch.arange(1.0, 8, dtype=o.dtype), reduction="sum"),
    "smooth": lambda o, t: functional.cross_entropy(o, t, reduction="sum", label_smoothing=0.1),
    "one left out": lambda o, t: functional.cross_entropy(o, t, ignore_index=2, reduction="sum"),
    "some left out": lambda o, t: functional.cross_entropy(o, torch.where(t == 1, -100, t), reduction="sum"),
    "chances": lambda o, t: functional.cross_entropy(o, functional.one_hot(t, 7).to(o.dtype), reduction="sum"),
    "images": lambda o, t: functional.cross_entropy(o.view(5, 7, 10), t.view(5, 10), reduction="sum"),
    "no gradient": lambda o, t: summed(o.detach(), t) * o.sum(),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_calls_are_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CrossEntropy", None)
    fast, slow = both(LEFT[case], *rows())
    for found, expected in zip(fast, slow, strict=True):
        assert torch.equal(found, expected)


def test_a_class_that_is_none_is_told_as_torch_tells_it() -> None:
    output, target = rows()
    with ByColumns(), pytest.raises(IndexError, match="Target 7 is out of bounds"):
        summed(output.requires_grad_(), target + 1)
