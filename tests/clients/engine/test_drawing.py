from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from murmur.clients.engine.batches import Schedule
from murmur.clients.engine.drawing import Mixed, Once, apportion, drawing
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.sources import Sets, classes
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.sections import Mixture


def rows(n):
    return TensorDataset(torch.arange(n), torch.arange(n) % 3)


def sets(**sizes):
    return Sets({name: rows(n) for name, n in sizes.items()})


def drawn(how, epochs):
    return torch.cat([batch for epoch in range(epochs) for batch in how.batches(epoch)]).tolist()


def test_shares_become_whole_numbers_that_add_up():
    assert apportion([3, 1], 400) == [300, 100]
    assert apportion([1, 1, 1], 10) == [3, 4, 3]
    assert apportion([1e-9, 1], 10) == [0, 10]
    dice = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(200):
        shares, total = [dice.random() + 1e-6 for _ in range(dice.randint(1, 9))], dice.randint(0, 1000)
        numbers = apportion(shares, total)
        assert sum(numbers) == total
        assert all(abs(n - total * s / sum(shares)) < 1 for n, s in zip(numbers, shares, strict=True))


@pytest.mark.parametrize("mode", ["mixed", "round-robin"])
def test_weights_of_3_to_1_are_drawn_as_3_to_1(mode, make_job):
    job = make_job(mixture=Mixture(mode=mode, weights={"ct": 3, "mri": 1}), batch_size=16)
    how = drawing(job, sets(ct=250, mri=750), None)
    for epoch in range(3):
        counts = Counter("ct" if row < 250 else "mri" for batch in how.batches(epoch) for row in batch.tolist())
        assert counts == {"ct": 750, "mri": 250}


def test_without_weights_every_row_comes_once(make_job):
    job, data = make_job(), sets(ct=30, none=0, mri=11)
    assert isinstance(drawing(job, data, None), Once)
    turns = drawing(make_job(mixture=Mixture(mode="round-robin")), data, None)
    for how in (drawing(job, data, None), turns):
        assert sorted(drawn(how, 1)) == list(range(41))


def test_a_temperature_makes_shares_equal_by_and_by(make_job):
    shares = []
    for temperature in (1, 2, 1e6):
        job = make_job(mixture=Mixture(mode="round-robin", temperature=temperature))
        counts = Counter(row < 900 for row in drawn(drawing(job, sets(ct=900, mri=100), None), 1))
        shares.append(counts[True])
    assert shares == [900, 750, 500]  # 30 : 10 is the proportion of the square roots


def test_rows_of_a_set_come_again_only_when_all_were_there(make_job):
    how = drawing(make_job(mixture=Mixture(weights={"ct": 1, "mri": 1})), sets(ct=7, mri=50), None)
    seen = Counter(drawn(how, 5))
    of_ct, of_mri = [seen[row] for row in range(7)], [seen[row] for row in range(7, 57)]
    assert max(of_ct) - min(of_ct) <= 1 and max(of_mri) - min(of_mri) <= 1
    assert sum(of_ct) + sum(of_mri) == 5 * 57
    orders = {tuple(row for row in drawn(how, 5)[start : start + 57] if row < 7) for start in range(0, 285, 57)}
    assert len(orders) == 5  # and in another order each time


def test_sets_that_take_turns_have_batches_of_their_own_sizes(make_job):
    mixture = Mixture(mode="round-robin", weights={"ct": 1, "mri": 1}, batch_sizes={"ct": 4, "mri": 10})
    how = drawing(make_job(mixture=mixture), sets(ct=20, mri=20), None)
    batches = [[("ct" if row < 20 else "mri") for row in batch.tolist()] for batch in how.batches(0)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert [(b[0], len(b)) for b in batches] == [
        ("ct", 4), ("mri", 10), ("ct", 4), ("ct", 4), ("ct", 4), ("mri", 10), ("ct", 4),
    ]  # fmt: skip
    assert how.steps == 7
    equal = drawing(make_job(mixture=Mixture(mode="round-robin"), batch_size=5), sets(ct=20, mri=20), None)
    assert [int(batch[0]) < 20 for batch in equal.batches(0)] == [True, False] * 4


def test_every_class_is_drawn_as_often(make_job):
    data = TensorDataset(torch.arange(100), torch.tensor([0] * 90 + [1] * 7 + [5] * 3))
    how = drawing(make_job(balanced=True), data, data.tensors[1])
    for epoch in range(4):
        counts = Counter(data.tensors[1][torch.cat([*how.batches(epoch)])].tolist())
        assert sorted(counts.values()) == [33, 33, 34]
    seen = Counter(drawn(how, 4))
    assert len([row for row in seen if row < 90]) == 90  # 4 times 33 of the common class: nobody is left out
    assert {seen[row] for row in range(97, 100)} == {44}  # 4 times 33 among three


def test_classes_of_each_set_are_balanced_within_its_share(make_job):
    data = Sets({
        "ct": TensorDataset(torch.zeros(40), torch.tensor([0] * 30 + [1] * 10)),
        "mri": TensorDataset(torch.zeros(10), torch.tensor([0] * 8 + [2] * 2)),
    })  # fmt: skip
    kinds = classes(object(), "train", data)
    how = drawing(make_job(balanced=True, mixture=Mixture(weights={"ct": 3, "mri": 2})), data, kinds)
    counts = Counter((row < 40, int(kinds[row])) for row in drawn(how, 1))
    assert counts == {(True, 0): 15, (True, 1): 15, (False, 0): 10, (False, 2): 10}


def everything(make_job, dice):
    n = {"ct": dice.randint(1, 40), "mri": dice.randint(1, 40)}
    labels = torch.randint(0, 3, (sum(n.values()),)) if dice.random() < 0.5 else None
    mode = dice.choice(["mixed", "round-robin"])
    own = {"ct": dice.randint(1, 9), "mri": dice.randint(1, 9)}
    mixture = Mixture(mode=mode, weights={"ct": 2, "mri": 3}, batch_sizes=own if mode == "round-robin" else {})
    job = make_job(mixture=mixture, balanced=labels is not None, batch_size=dice.randint(1, 20), epochs=2)
    return job, sets(**n), labels


def test_ranks_share_what_is_drawn_and_a_resumed_one_goes_on_at_its_step(make_job):
    dice = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(30):
        job, data, labels = everything(make_job, dice)
        how, world = drawing(job, data, labels), dice.randint(1, 3)
        ranks = [Ranks(rank=r, world=world, device=torch.device("cpu")) for r in range(world)]
        schedules = [Schedule(job, len(data), r, drawing=how, sets=data) for r in ranks]
        batches = [*itertools.chain(how.batches(0), how.batches(1))]
        assert len(batches) == schedules[0].steps == 2 * how.steps
        for batch, steps in zip(batches, zip(*schedules, strict=True), strict=True):
            real = [row for step in steps if not step.stand_in for piece in step.pieces for row in piece.tolist()]
            assert sorted(real) == sorted(batch.tolist())
            for step in steps:
                assert all(len({data.set_of(row) for row in piece.tolist()}) == 1 for piece in step.pieces)
        done = dice.randrange(len(batches) + 1)
        late = Schedule(job, len(data), ranks[0], done, how, data)
        pairs = zip(late, [*schedules[0]][done:], strict=True)
        assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one.pieces, other.pieces, strict=True))


def test_another_seed_round_or_client_draws_otherwise(make_job):
    mixture, data = Mixture(weights={"ct": 1, "mri": 1}), sets(ct=30, mri=60)
    base = drawn(drawing(make_job(mixture=mixture), data, None), 1)
    assert base == drawn(drawing(make_job(mixture=mixture), data, None), 1)
    for other in ({"seed": 4}, {"round": 2}, {"client": "south"}):
        assert drawn(drawing(make_job(mixture=mixture, **other), data, None), 1) != base


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        ({"mixture": Mixture(weights={"ct": 1})}, sets(ct=3, mri=3), "weights leaves out 'mri'"),
        (
            {"mixture": Mixture(mode="round-robin", batch_sizes={"mri": 1})},
            sets(ct=3, mri=3),
            "batch_sizes leaves out 'ct'",
        ),
        ({"mixture": Mixture(mode="round-robin")}, rows(3), "gives one, not a dict"),
    ],
)
def test_a_mixture_that_does_not_fit_the_data_is_refused(settings, data, words, make_job):
    with pytest.raises(OperatorError, match=words):
        drawing(make_job(**settings), data, None)


def test_a_weight_for_a_set_that_a_site_lacks_is_no_mistake(make_job):
    how = drawing(make_job(mixture=Mixture(weights={"ct": 1, "pet": 5})), sets(ct=3), None)
    assert isinstance(how, Mixed) and sorted(drawn(how, 1)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"mixture": {"weights": {"a": 1}, "temperature": 2}}}, "set one of them"),
        ({"train": {"mixture": {"batch_sizes": {"a": 1}}}}, "take turns"),
        ({"train": {"mixture": {"weights": {"a": 0}}}}, "greater than 0"),
        ({"train": {"balanced": True}, "dp": {"mode": "local"}}, "same chance, which train.balanced would break"),
        ({"train": {"mixture": {"mode": "round-robin"}}, "dp": {"mode": "local"}}, "train.mixture would break"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(values, words):
    with pytest.raises(OperatorError, match=words):
        parse_recipe({"name": "a", "task": "b"} | values)


def test_what_is_left_at_its_default_is_not_written():
    assert {"balanced", "mixture"}.isdisjoint(parse_recipe({"name": "a", "task": "b"}).model_dump()["train"])
    told = parse_recipe({"name": "a", "task": "b", "train": {"mixture": {"weights": {"ct": 3}}}}).model_dump()["train"]
    assert told["mixture"]["weights"] == {"ct": 3.0}
