from __future__ import annotations

import pytest
import torch

from murmur.clients.engine import ranks as module
from murmur.clients.engine.ranks import Ranks, Wish
from murmur.protocol.errors import OperatorError


def rank(number: int, world: int = 2) -> Ranks:
    return Ranks(rank=number, world=world, device=torch.device("cpu"))


def test_a_rank_alone_sums_to_itself_and_stops_at_its_own_word():
    assert rank(0, 1).sum([1, 2.5]) == [1.0, 2.5]
    wishes = iter([False, True])
    stop = Wish(rank(0, 1), lambda: next(wishes))
    assert [stop.agreed(1), stop.agreed(2)] == [False, True]


def test_rank_0_decides_and_the_others_follow_at_the_same_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    words: list[torch.Tensor] = []
    follow: list[torch.Tensor] = []

    def broadcast(word, src):
        assert src == 0
        if speaking == 0:
            words.append(word.clone())
        else:
            word.copy_(follow.pop(0))

    monkeypatch.setattr(module.dist, "broadcast", broadcast)
    speaking = 0
    leader = Wish(rank(0), lambda: clock[0] > 1.0)
    agreed: list[int] = []
    for step in range(1, 10_000):
        clock[0] += 0.001  # 250 steps between two questions, once the pace is known
        if leader.agreed(step):
            agreed.append(step)
            break
    assert 1000 < agreed[0] <= 1000 + 260
    assert len(words) < 20  # a question at every step would be a thousand

    speaking, follow = 1, [*words]
    follower = Wish(rank(1), lambda: False)
    stopped = next(step for step in range(1, 10_000) if follower.agreed(step))
    assert (stopped, follow) == (agreed[0], [])


def test_two_ranks_do_not_share_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OperatorError, match="2 processes on 1 GPUs"):
        Ranks.join(0, 2, tmp_path / "rendezvous")
