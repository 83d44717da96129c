from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.exchange import Gossip, exchange
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.state import read_model
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Parallel

from .conftest import tensors

TASKS = Path(__file__).with_name("sample_tasks.py")
HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1}  # 63 examples: the last batch of an epoch has 15


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def size(update):
    return max(float(t.abs().max()) for t in update.values())


@pytest.fixture
def reduced(in_ranks):
    return lambda reduce, *args, every=8, **settings: in_ranks(
        *args, parallel=Parallel(reduce=reduce, sync_every=every), **settings
    )


# Gradients in fewer bytes


@pytest.mark.parametrize(("reduce", "limit"), [("fp16", 1e-3), ("bf16", 1e-2)])
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4, "mu": 0.5}, {"precision": "fp16"}], ids=str)
def test_gradients_in_half_precision_train_nearly_the_same(reduce, limit, settings, alone, reduced):
    exact, _ = alone(**HARD, **settings)
    update, result = reduced(reduce, **HARD, **settings)
    assert 0 < apart(update, exact) <= limit < size(exact)
    assert (result.examples, result.steps) == (63, 8)


LONG = {"batch_size": 16, "epochs": 20, "lr": 0.02, "metrics": ("loss",)}


@pytest.mark.parametrize("reduce", ["fp16", "powersgd"])
def test_compressed_gradients_train_to_the_same_loss(reduce, alone, reduced):
    _, exact = alone("Wide", **LONG)
    _, result = reduced(reduce, "Wide", **LONG)
    total, count = exact.metrics["train_loss"]
    assert result.metrics["train_loss"] == (pytest.approx(total, rel=0.02), count)


def power_iterations(task, job, world=2, rank=4):
    """PowerSGD as the paper writes it, for all workers in one process, one matrix at a time."""
    module = task.model()
    read_model(module, job.model)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    inputs, target = task.data("train").tensors
    errors, left = {}, {}
    generator = None
    for epoch in range(job.train.epochs):
        for batch in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            found = []
            for r in range(world):
                mine = batch[r::world]
                module.zero_grad()
                loss = nn.functional.cross_entropy(module(inputs[mine]), target[mine], reduction="sum")
                (loss * world / len(batch)).backward()
                found.append({n: p.grad.clone() for n, p in module.named_parameters()})
            if generator is None:
                from murmur.clients.engine.randomness import derive_seed

                seed = derive_seed("powersgd", job.seed, job.round, job.client)
                generator = torch.Generator().manual_seed(seed)
            for name, p in module.named_parameters():
                grads = [g[name] for g in found]
                n, m = (p.shape[0], p.shape[1]) if p.ndim == 2 else (0, 0)
                if (n + m) * min(rank, n, m) >= n * m:
                    mean = sum(grads) / world
                else:
                    q = left[name] if name in left else torch.randn(m, min(rank, n, m), generator=generator)
                    deltas = [g + errors.get((name, r), 0) for r, g in enumerate(grads)]
                    p_hat = torch.linalg.qr(sum(d @ q for d in deltas) / world).Q
                    left[name] = q = sum(d.T @ p_hat for d in deltas) / world
                    mean = p_hat @ q.T
                    errors |= {(name, r): d - mean for r, d in enumerate(deltas)}
                with torch.no_grad():
                    p -= job.train.lr * mean
    assert max(float(e.abs().max()) for e in errors.values()) > 1e-3, "nothing was left out"
    return {n: t - before[n] for n, t in module.state_dict().items()}


def test_powersgd_is_the_papers_algorithm(task, make_job, reduced):
    # A matrix of 16 by 8, whose gradient has up to 8 directions: 4 leave something out at every step.
    expected = power_iterations(task(), make_job(**HARD))
    update, _ = reduced("powersgd", **HARD)
    assert size(expected) > 0.01
    assert apart(update, expected) <= 1e-5


def test_powersgd_takes_no_step_with_a_parameter_that_nobody_used(alone, reduced):
    settings = HARD | {"optimizer_options": {"weight_decay": 0.1}}
    update, _ = reduced("powersgd", options={"fault": "unused"}, **settings)
    assert update["0.spare.weight"].abs().max() == 0
    assert update["0.weight"].abs().max() > 0


# Ranks that train apart


def local_sgd(task, job, world=2):
    """The oracle: as many models as ranks, one after the other in one process."""
    replicas = [task.model() for _ in range(world)]
    for module in replicas:
        read_model(module, job.model)
    before = {n: t.clone() for n, t in replicas[0].state_dict().items()}
    kind = getattr(torch.optim, job.train.optimizer)
    optimizers = [kind(m.parameters(), lr=job.train.lr, **job.train.optimizer_options) for m in replicas]
    inputs, target = task.data("train").tensors

    def average():
        with torch.no_grad():
            for together in zip(*(m.parameters() for m in replicas), strict=True):
                mean = sum(together) / world
                for p in together:
                    p.copy_(mean)

    step = 0
    for epoch in range(job.train.epochs):
        for batch in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            step += 1
            for r, (module, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
                mine = batch[r::world]
                loss = nn.functional.cross_entropy(module(inputs[mine]), target[mine], reduction="sum")
                optimizer.zero_grad()
                (loss * world / len(batch)).backward()
                optimizer.step()
            if step % job.parallel.sync_every == 0:
                average()
    average()
    return {n: t - before[n] for n, t in replicas[0].state_dict().items()}


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "AdamW", "lr": 0.01}, {"optimizer_options": {"momentum": 0.9}}], ids=str
)
def test_local_sgd_equals_models_that_are_averaged_by_hand(every, settings, task, make_job, reduced):
    settings = HARD | settings
    job = make_job(**settings, parallel=Parallel(reduce="local-sgd", sync_every=every))
    update, result = reduced("local-sgd", every=every, **settings)
    expected = local_sgd(task(), job)
    assert size(expected) > 0.01
    assert apart(update, expected) <= 1e-6
    assert (result.examples, result.steps, result.metrics["train_loss"][1]) == (63, 8, 126)


def test_weights_that_are_averaged_at_every_step_are_those_of_one_process(alone, reduced):
    # Plain SGD is linear in the gradient: a rank with fewer examples takes a step that is so much smaller.
    settings = HARD | {"optimizer_options": {"weight_decay": 0.01}}
    options = {"n": 17}  # a last batch of one example: the other rank has none
    exact, _ = alone(options=options, **settings)
    for reduce in ("local-sgd", "gossip", "gossip-pairs"):  # two ranks that meet are all that there are
        assert apart(reduced(reduce, options=options, every=1, **settings)[0], exact) <= 1e-6


def test_between_two_averages_nothing_is_exchanged_and_all_ranks_end_in_the_same_bits(make_job, tmp_path):
    job = make_job("Meets", batch_size=4, epochs=1, metrics=("reduced", "spread"))  # 16 steps
    with Trainer(f"{TASKS}:Meets", {}, processes=2, workdir=tmp_path) as trainer:

        def counted(reduce, every=8):
            """All-reduces of weights or gradients in the job, and how far the ranks' models are apart after it."""
            trainer.run(replace(job, parallel=Parallel(reduce=reduce, sync_every=every)))
            told = trainer.run(replace(job, kind="evaluate")).metrics
            return [told[name][0] / told[name][1] for name in ("reduced", "spread")]

        assert counted("local-sgd", 4) == [4, 0]
        assert counted("local-sgd", 5) == [4, 0]  # three and the last
        assert counted("local-sgd", 100) == [1, 0]
        assert counted("gossip", 4) == [1, 0]  # what they tell their neighbours is no all-reduce
        assert counted("gossip-pairs", 4) == [1, 0]
        assert counted("powersgd") == [2 * 16, 0]
        assert counted("bf16") == [16, 0]


class Swarm:
    """Several ranks' gossip in one process: what they send is what the others have."""

    def __init__(self, world, values, **how):
        ranks = [Ranks(rank=r, world=world, device=torch.device("cpu")) for r in range(world)]
        self.members = [Gossip(r, [nn.Parameter(torch.zeros(1))], 1, **how) for r in ranks]
        self.values = values

    def meet(self, step):
        friends = [m.neighbours(step) for m in self.members]
        assert all(r in friends[peer] for r, mine in enumerate(friends) for peer in mine)
        old = list(self.values)
        self.values = [(old[r] + sum(old[p] for p in mine)) / (1 + len(mine)) for r, mine in enumerate(friends)]
        return friends


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("how", [{}, {"pairs": 5}], ids=["ring", "pairs"])
def test_gossip_keeps_the_mean_and_brings_all_together(how, world):
    swarm = Swarm(world, [float(r) for r in range(world)], **how)
    mean, spreads = sum(swarm.values) / world, []
    for step in range(1, 40):
        swarm.meet(step)
        assert sum(swarm.values) / world == pytest.approx(mean)
        spreads.append(max(swarm.values) - min(swarm.values))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.05 * world


def test_a_ring_has_two_neighbours_and_pairs_are_drawn_anew_each_time():
    assert Swarm(5, [0.0] * 5).meet(1) == [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]
    drawn = [Swarm(5, [0.0] * 5, pairs=3).meet(step) for step in range(1, 6)]
    assert all(sorted(len(f) for f in friends) == [0, 1, 1, 1, 1] for friends in drawn)
    assert len({str(friends) for friends in drawn}) > 1
    assert drawn[0] == Swarm(5, [0.0] * 5, pairs=3).meet(1)


@pytest.mark.parametrize("reduce", ["gossip", "gossip-pairs"])
def test_three_ranks_gossip_as_neighbours_do(reduce, task, make_job, tmp_path):
    job = make_job("Meets", batch_size=12, epochs=1, metrics=("reduced", "spread"))  # 6 steps
    job = replace(job, parallel=Parallel(reduce=reduce, sync_every=2))
    with Trainer(f"{TASKS}:Meets", {}, processes=3, workdir=tmp_path) as trainer:
        trainer.run(job)
        update = tensors(job.update)
        told = trainer.run(replace(job, kind="evaluate")).metrics
    assert told["spread"][0] == 0
    if reduce == "gossip":  # in a ring of three all are neighbours
        assert apart(update, local_sgd(task(), job, world=3)) <= 1e-6


def test_a_rank_that_is_apart_counts_its_own_tokens(reduced, alone):
    # Batches of all 63: each rank takes one step with the mean over its own tokens.
    update, result = reduced("local-sgd", "Ragged", batch_size=64, epochs=1)
    exact, other = alone("Ragged", batch_size=64, epochs=1)
    assert 0 < apart(update, exact) < 0.1 * size(exact)
    assert result.metrics["train_loss"][1] == other.metrics["train_loss"][1]


# Killed and gone on


@pytest.mark.parametrize(
    ("reduce", "settings"),
    [
        ("local-sgd", {"optimizer": "Adam", "lr": 0.01}),
        ("gossip", {"optimizer_options": {"momentum": 0.9}}),
        ("powersgd", {"optimizer_options": {"momentum": 0.9}}),
    ],
)
def test_a_killed_rank_ends_in_the_same_bits(reduce, settings, make_job, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("MURMUR_TEST_MARK", str(mark))
    options = {"fault": "killed late"}
    mark.touch()  # undisturbed
    job = make_job("Noisy", options, batch_size=16, epochs=3, **settings)
    job = replace(job, parallel=Parallel(reduce=reduce, sync_every=8 if reduce == "powersgd" else 4))
    with Trainer(f"{TASKS}:Noisy", options, processes=2, workdir=tmp_path) as trainer:
        undisturbed = trainer.run(job)
    wanted = job.update.read_bytes()
    mark.unlink()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    output = tmp_path / "ranks.log"
    with Trainer(f"{TASKS}:Noisy", options, processes=2, workdir=tmp_path, log_file=output) as trainer:
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            trainer.run(job)
        result = trainer.run(job)
    assert job.update.read_bytes() == wanted
    assert (result.metrics, result.steps) == (undisturbed.metrics, undisturbed.steps)
    assert output.read_text().count("training goes on from a checkpoint") == 2


# What does not go together


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dp": Dp(mode="local"), "parallel": Parallel(reduce="bf16")}, "DP-SGD sums bounded gradients itself"),
        ({"precision": "fp16", "parallel": Parallel(reduce="powersgd")}, "hands on what a step left out"),
    ],
    ids=["dp", "powersgd"],
)
def test_what_does_not_go_together_is_refused_with_words(settings, words, make_job):
    two = Ranks(rank=0, world=2, device=torch.device("cpu"))
    with pytest.raises(OperatorError, match=words):
        exchange(make_job(**settings), two, [nn.Parameter(torch.zeros(2, 2))])


def test_one_process_has_nobody_to_exchange_with(alone):
    plain, _ = alone(**HARD)
    for reduce in ("bf16", "powersgd", "gossip"):
        assert apart(alone(**HARD, parallel=Parallel(reduce=reduce))[0], plain) == 0


def test_ranks_change_their_way_from_job_to_job(make_job, tmp_path):
    job = make_job(**HARD)
    with Trainer(f"{TASKS}:Rows", {}, processes=2, workdir=tmp_path) as trainer:

        def trained(reduce):
            trainer.run(replace(job, parallel=Parallel(reduce=reduce)))
            return job.update.read_bytes()

        first = {reduce: trained(reduce) for reduce in ("allreduce", "bf16", "powersgd", "local-sgd", "fp16")}
        again = {reduce: trained(reduce) for reduce in reversed(first)}
    assert again == first and len({*first.values()}) == 5
