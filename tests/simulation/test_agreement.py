"""Clients' own losses in one computation against one after the other, in float64, where 1e-14 is exact."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from murmur.simulation.agreement import compare, one_by_one, together
from murmur.simulation.cohorts import Unsuited

A, B, C = 4, 3, 5
RANGES = [slice(B * k, B * k + B) for k in range(A)]


class Plain:
    factor = 2.0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum")


class Squares:
    """No sum over examples, and a loss like everybody's."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum") ** 2


class Looks(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.factor * functional.cross_entropy(output, target, reduction="sum")


class Asks(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target)


class Encloses(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        factor: Callable[[], float] = lambda: self.factor  # noqa: E731
        return factor() * functional.cross_entropy(output, target, reduction="sum")


class Finds(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return locals()["self"].factor * functional.cross_entropy(output, target, reduction="sum")


class Decides(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum") if target.max() > 0 else output.sum()


class Draws(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output + torch.rand_like(output), target, reduction="sum")


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(A * B, C, generator=generator, dtype=torch.float64)
    return output, torch.randint(C, (A * B,), generator=generator)


def tasks(kind: type[Any]) -> list[Any]:
    return [kind() for _ in range(A)]


@pytest.mark.parametrize("kind", [Plain, Squares])
def test_losses_that_look_at_no_client_come_out_together_as_one_by_one(kind: type[Any]) -> None:
    fast, slow = together(tasks(kind), *rows(), RANGES), one_by_one(tasks(kind), *rows(), RANGES)
    assert fast is not None
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_a_loss_that_all_share_is_taken_together_whatever_it_is() -> None:
    shared = nn.CrossEntropyLoss(reduction="sum")
    clients: list[Any] = [SimpleNamespace(loss=shared) for _ in range(A)]
    assert together(clients, *rows(), RANGES) is not None
    clients[2] = SimpleNamespace(loss=nn.CrossEntropyLoss(reduction="sum"))
    assert together(clients, *rows(), RANGES) is None


@pytest.mark.parametrize("kind", [Looks, Asks, Encloses, Finds, Decides, Draws])
def test_other_losses_are_taken_one_by_one(kind: type[Any]) -> None:
    assert together(tasks(kind), *rows(), RANGES) is None


def test_one_client_with_another_loss_or_a_shorter_batch_is_enough_for_one_by_one() -> None:
    mixed: list[Any] = [*tasks(Plain)[:3], Squares()]
    assert together(mixed, *rows(), RANGES) is None
    assert together(tasks(Plain), *rows(), [*RANGES[:3], slice(9, 11)]) is None


@pytest.mark.parametrize("kind", [Squares, Decides])
def test_a_client_whose_rows_move_otherwise_is_named(kind: type[Any]) -> None:
    output, target = rows()
    loss, gradient = one_by_one(tasks(kind), output, target, RANGES)
    members: list[Any] = [SimpleNamespace(name=f"client-{k}", task=t, agreed=False) for k, t in enumerate(tasks(kind))]
    compare(members, output, target, RANGES, loss, gradient)
    assert all(m.agreed for m in members)
    gradient[4, 0] += 1e-3  # a row of client-1
    with pytest.raises(Unsuited, match="client-1 is not the cohort's"):
        compare(members, output, target, RANGES, loss, gradient)
    with pytest.raises(Unsuited, match="not the sum of the clients'"):
        compare(members, output, target, RANGES, loss * 1.01, one_by_one(tasks(kind), output, target, RANGES)[1])
