from __future__ import annotations

import random
from collections import namedtuple

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from murmur.clients.engine.batches import Schedule, load, move
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.ranks import Ranks
from murmur.protocol.errors import OperatorError


def ranks(world):
    return [Ranks(rank=r, world=world, device=torch.device("cpu")) for r in range(world)]


class OneByOne(Dataset):
    """Hides that a data set is made of tensors, so that torch's own loader has to fetch its items."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


def rows(n=20):
    return TensorDataset(torch.arange(n * 3.0).view(n, 3), torch.arange(n))


def test_ranks_share_every_epoch_without_overlap(make_job):
    dice = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(50):
        world, n, batch, micro = dice.randint(1, 4), dice.randint(1, 70), dice.randint(1, 20), dice.randint(0, 6)
        job = make_job(batch_size=batch, micro_batch=micro, epochs=2)
        schedules = [Schedule(job, n, r) for r in ranks(world)]
        seen = []
        for number, steps in enumerate(zip(*schedules, strict=True)):
            real = [index for step in steps if not step.stand_in for piece in step.pieces for index in piece.tolist()]
            start = number * batch % (-(-n // batch) * batch)
            epoch = number // -(-n // batch)
            assert sorted(real) == sorted(epoch_order(job, epoch, n)[start : start + batch].tolist())
            assert {step.examples for step in steps} == {len(real)}
            assert all(len(piece) <= (micro or batch) and len(piece) for step in steps for piece in step.pieces)
            seen += real
        assert sorted(seen) == sorted([*range(n)] * 2)
        assert schedules[0].steps == number + 1


def test_steps_are_the_first_of_as_many_epochs_as_it_takes(make_job):
    dice = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(30):
        world, n, batch, steps = dice.randint(1, 3), dice.randint(1, 70), dice.randint(1, 20), dice.randint(1, 12)
        short, long = make_job(batch_size=batch, steps=steps), make_job(batch_size=batch, epochs=13 * batch)
        for r in ranks(world):
            taken = [step.pieces[0].tolist() for step in Schedule(short, n, r)]
            whole = (step.pieces[0].tolist() for step in Schedule(long, n, r))
            assert taken == [next(whole) for _ in range(steps)]
            assert Schedule(short, n, r).steps == steps == short.train.steps_over(n)
            done = dice.randint(0, steps)
            assert [step.pieces[0].tolist() for step in Schedule(short, n, r, done)] == taken[done:]


def test_no_example_is_alone_where_it_cannot_be(make_job):
    dice = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(200):
        world, n, batch = dice.randint(1, 5), dice.randint(2, 70), dice.randint(2, 20)
        micro, steps = dice.choice([0, 2, 3, 7]), dice.choice([0, 0, 9])
        job = make_job(batch_size=batch, micro_batch=micro, steps=steps, epochs=1 if steps else 2)
        schedules = [Schedule(job, n, r, in_company=True) for r in ranks(world)]
        seen = []
        taken = [*zip(*schedules, strict=True)]
        for together in taken:
            pieces = [piece for step in together for piece in step.pieces]
            assert all(2 <= len(piece) <= (micro or batch) + 1 for piece in pieces)
            real = [index for step in together if not step.stand_in for p in step.pieces for index in p.tolist()]
            assert {step.examples for step in together} == {len(real)} and 2 <= len(real) <= batch + 1
            seen += real
        assert schedules[0].steps == len(taken)
        if not steps:
            assert sorted(seen) == sorted([*range(n)] * 2)
        rest = [*Schedule(job, n, ranks(world)[0], len(taken) // 2, in_company=True)]
        assert len(rest) == len(taken) - len(taken) // 2


@pytest.mark.parametrize(("n", "settings"), [(1, {}), (9, {"batch_size": 1}), (9, {"micro_batch": 1})])
def test_one_example_by_itself_is_refused_with_words(n, settings, make_job):
    with pytest.raises(OperatorError, match="needs two examples at a time"):
        Schedule(make_job(**settings), n, ranks(1)[0], in_company=True)


def test_the_order_of_an_epoch_is_a_permutation_that_others_do_not_share(make_job):
    job = make_job()
    orders = {tuple(epoch_order(job, epoch, 40).tolist()) for epoch in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == [*range(40)] for order in orders)
    assert tuple(epoch_order(job, 0, 40).tolist()) in orders


@pytest.mark.parametrize("dataset", [rows(), Subset(rows(), [3, 19, 4, 5, 11])], ids=["tensors", "subset"])
def test_tensors_are_taken_by_rows_as_torch_would_have_collated_them(dataset):
    pieces = [torch.tensor([4, 0]), torch.tensor([2])]
    quick, slow = ([*load(d, pieces)] for d in (dataset, OneByOne(dataset)))
    for (a, b), (c, d) in zip(quick, slow, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
        assert (a.dtype, b.dtype) == (c.dtype, d.dtype)
    assert quick[0][1].tolist() == [dataset[4][1], dataset[0][1]]


def test_loading_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    for dataset in (rows(), OneByOne(rows())):
        assert len([*load(dataset, [torch.arange(4)] * 3)]) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_task_may_collate_for_itself():
    batch = next(load(rows(), [torch.arange(2)], collate=lambda items: (len(items), [int(t) for _, t in items])))
    assert batch == (2, [0, 1])


def test_workers_give_the_same_batches():
    pieces = [torch.arange(4), torch.arange(10, 13)]
    ours, theirs = ([t.tolist() for _, t in load(OneByOne(rows()), pieces, workers=w)] for w in (0, 1))
    assert ours == theirs == [[0, 1, 2, 3], [10, 11, 12]]


def test_data_that_is_no_pair_is_refused():
    with pytest.raises(OperatorError, match=r"a tuple of 1 where a pair \(input, target\) belongs"):
        next(load(TensorDataset(torch.zeros(3)), [torch.arange(2)]))


def test_moving_keeps_the_structure():
    Pair = namedtuple("Pair", "a b")
    value = {"x": [torch.ones(2), ("text", 3)], "y": Pair(torch.zeros(1), None)}
    moved = move(value, torch.device("meta"))
    assert moved["x"][0].is_meta and moved["y"].a.is_meta
    assert (moved["x"][1], moved["y"].b, type(moved["y"])) == (("text", 3), None, Pair)
