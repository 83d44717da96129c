"""Work for many clients on several threads: every client once, and nothing that goes wrong is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from murmur.simulation.crew import by_clients, for_clients_only


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_each_client_is_done_once_by_threads_that_work_at_the_same_time() -> None:
    done, together = list[tuple[int, int]](), threading.Barrier(3)

    def work(part: range) -> None:
        together.wait(60)  # breaks where they are not at work at the same time
        done.extend((k, torch.get_num_threads()) for k in part)

    by_clients(7, work)
    assert sorted(done) == [(k, 1) for k in range(7)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("wrong", [0, 4])
def test_an_error_is_raised_when_the_others_are_done(wrong: int) -> None:
    done: list[int] = []

    def work(part: range) -> None:
        if wrong in part:
            raise ValueError("wrong")
        done.extend(part)

    with pytest.raises(ValueError, match="wrong"):
        by_clients(6, work)
    assert len(done) == 4
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_torch_leaves_all_threads_to_the_clients() -> None:
    together = threading.Barrier(3)

    def work(_: range) -> None:
        together.wait(60)

    with for_clients_only():
        assert torch.get_num_threads() == 1
        by_clients(7, work)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
