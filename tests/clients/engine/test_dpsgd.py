"""DP-SGD against a loop over single examples, its noise and batches as distributions, and what it refuses."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from murmur.clients.engine.batches import PoissonSchedule
from murmur.clients.engine.checkpoint import Checkpoints
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import map_tensors, read_model
from murmur.clients.job import Cancelled, Job
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Train
from murmur.protocol.tensors import read_layout

ALL = {"batch_size": 64, "epochs": 3, "lr": 0.1}  # of 63 examples: each is in every batch, with probability 1


def local(clip_norm=0.5, noise_multiplier=0.0):
    return Dp(mode="local", clip_norm=clip_norm, noise_multiplier=noise_multiplier)


def by_hand(task, job):
    """The oracle: one backward pass per example, its gradient clipped, their sum over the *expected* batch."""
    module = task.model()
    read_model(module, job.model)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = getattr(torch.optim, job.train.optimizer)(
        module.parameters(), lr=job.train.lr, **job.train.optimizer_options
    )
    inputs, target = task.data("train").tensors
    clipped = 0
    for _ in range(job.train.epochs):
        sums = [torch.zeros_like(p) for p in module.parameters()]
        for row in range(len(inputs)):
            module.zero_grad()
            task.loss(module(inputs[row : row + 1]), target[row : row + 1]).backward()
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in module.parameters()))
            clipped += norm > job.dp.clip_norm
            for total, p in zip(sums, module.parameters(), strict=True):
                total += p.grad * min(1.0, job.dp.clip_norm / norm)
        for total, p, a in zip(sums, module.parameters(), start, strict=True):
            p.grad = total / job.train.batch_size + job.mu * (p.detach() - a)
        if job.train.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), job.train.clip_norm)
        optimizer.step()
    return {name: tensor - before[name] for name, tensor in module.state_dict().items()}, clipped


def tensors(path):
    return {name: tensor.clone() for name, tensor in map_tensors(path, read_layout(path)).items()}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def flat(update):
    return torch.cat([t.reshape(-1) for t in update.values()]).double()


# Gradients


HARD = {"mu": 0.5, "clip_norm": 0.1, "micro_batch": 16}


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("alone", {}),
        ("alone", {"micro_batch": 5}),
        ("alone", {"mu": 0.5}),
        ("alone", {"optimizer": "Adam", "lr": 0.01}),
        ("alone", HARD),
        ("in_ranks", HARD),
    ],
    ids=str,
)
def test_each_examples_gradient_is_clipped_as_in_a_loop_over_examples(where, settings, request, task, make_job):
    settings = ALL | {"dp": local(clip_norm=1.5)} | settings
    expected, clipped = by_hand(task(), make_job(**settings))
    assert 20 < clipped < 3 * 63 - 20  # some are, some are not
    update, result = request.getfixturevalue(where)(**settings)
    assert flat(expected).abs().max() > 0.005
    assert apart(update, expected) <= 1e-6
    assert (result.examples, result.steps) == (63, 3)


def test_ranks_that_draw_what_one_process_draws_give_its_update(alone, in_ranks, monkeypatch):
    # Batches by lot and noise: both follow from keys of the operating system, which are known here on both sides.
    settings = {"batch_size": 16, "epochs": 3, "micro_batch": 5, "lr": 0.1, "dp": local(1.0, noise_multiplier=0.7)}
    ours, result = in_ranks(options={"fault": "known keys"}, **settings)
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    theirs, expected = alone(**settings)
    assert flat(theirs).abs().max() > 0.01
    assert apart(ours, theirs) <= 1e-6
    assert (result.examples, result.steps) == (expected.examples, expected.steps) == (63, 12)


@pytest.mark.parametrize("name", ["Grouped", "Ragged"])
def test_convolutions_norms_tied_weights_and_sequences_count_as_one_example(name, task, make_job, alone):
    settings = ALL | {"dp": local(clip_norm=0.2)}
    expected, clipped = by_hand(task(name), make_job(name, **settings))
    assert clipped > 60
    update, _ = alone(name, **settings)
    assert apart(update, {n: expected[n] for n in update}) <= 1e-6  # a tied weight travels once


def test_bf16_clips_by_norms_in_full_precision(alone):
    whole, half = (alone(precision=p, **ALL | {"dp": local(clip_norm=0.05)})[0] for p in ("fp32", "bf16"))
    assert 0 < apart(whole, half) <= 1e-3
    one_step, _ = alone(options={"n": 1}, precision="bf16", batch_size=1, epochs=1, lr=1.0, dp=local(clip_norm=0.05))
    assert flat(one_step).norm() <= 0.05  # a single example moves the model by the bound and no further


def test_an_example_whose_gradient_is_not_finite_counts_as_zero(task, make_job, alone):
    # Pieces of one example: the loss of the first row of each piece is infinite, so that nothing is left.
    broken, result = alone(options={"fault": "one example is infinite"}, micro_batch=1, **ALL, dp=local())
    assert flat(broken).abs().max() == 0 and result.steps == 3
    some, _ = alone(options={"fault": "one example is infinite"}, micro_batch=32, **ALL, dp=local())
    assert 0 < flat(some).abs().max() < 1


def test_ragged_counts_do_not_change_the_denominator(alone):
    # 63 examples of up to 25 tokens: with noise 0 and a bound that all exceed, a step is at most C n / batch long.
    update, _ = alone("Ragged", batch_size=63, epochs=1, lr=1.0, dp=local(clip_norm=1e-3))
    assert flat(update).norm() <= 1e-3


# Noise


@pytest.mark.parametrize("where", ["alone", "in_ranks"])
def test_noise_has_the_accounted_variance_whatever_the_ranks(where, request):
    # A loss of zero leaves the noise alone: 4 steps of N(0, (1.5 * 2 / 64)^2) each, so a deviation of 0.09375.
    run = request.getfixturevalue(where)
    settings = {"batch_size": 64, "epochs": 4, "lr": 1.0, "dp": local(clip_norm=2.0, noise_multiplier=1.5)}
    update, result = run("Wide", {"fault": "zero"}, **settings)
    values = flat(update)
    count = len(values)
    assert (result.steps, count) == (4, 27_003)
    deviation = 2 * 1.5 * 2 / 64
    assert abs(float(values.std()) / deviation - 1) < 5 / math.sqrt(2 * count)  # 5 of its own standard deviations
    assert abs(float(values.mean())) < 5 * deviation / math.sqrt(count)
    ordered = (values / deviation).sort().values
    normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    apart_by = (normal - torch.arange(count) / count).abs().max()
    assert apart_by < 2.6 / math.sqrt(count)  # Kolmogorov and Smirnov: chance exceeds this once in 400,000


def test_a_batch_without_examples_does_not_ask_the_model(alone, monkeypatch):
    monkeypatch.setattr(PoissonSchedule, "_batch", lambda self, number: torch.arange(0))
    update, result = alone(options={"fault": "raises third"}, **ALL, dp=local(noise_multiplier=1.0))
    assert (result.steps, result.metrics["train_loss"]) == (3, (0.0, 0.0))
    assert flat(update).abs().min() > 0


def test_the_same_job_never_has_the_same_noise_or_the_same_batches(alone):
    settings = {"batch_size": 64, "epochs": 1, "lr": 1.0}
    noisy = [flat(alone("Wide", {"fault": "zero"}, **settings, dp=local(noise_multiplier=1.0))[0]) for _ in range(2)]
    assert abs(float(torch.corrcoef(torch.stack(noisy))[0, 1])) < 5 / math.sqrt(len(noisy[0]))
    drawn = [flat(alone(batch_size=16, epochs=1, dp=local())[0]) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_an_empty_batch_makes_a_step_of_noise_alone(in_ranks):
    # One of 63 examples a step on average: (62/63)^63 = 36 % of the 63 batches are empty, and the loss is zero in all.
    settings = {"batch_size": 1, "epochs": 1, "lr": 0.1, "dp": local(noise_multiplier=2.0)}
    update, result = in_ranks("Wide", {"fault": "zero"}, **settings)
    assert result.steps == 63
    deviation = math.sqrt(63) * 0.1 * 2.0 * 0.5
    assert abs(float(flat(update).std()) / deviation - 1) < 5 / math.sqrt(2 * 27_003)


# Batches

KEY = bytes(range(32))  # tests draw the same batches each time


def schedule(n, batch, *, epochs=1, rank=0, world=1, key=KEY, micro=0, done=0):
    ranks = Ranks(rank=rank, world=world, device=torch.device("cpu"))
    train = Train(batch_size=batch, epochs=epochs, micro_batch=micro)
    job = Job(
        id="x", kind="train", model=Path(), update=Path(), train=train, mu=0, metrics=(), seed=0, round=1, client="c"
    )
    return PoissonSchedule(job, n, ranks, key, done)


def drawn(steps):
    return [sorted(i for piece in step.pieces for i in piece.tolist()) for step in steps]


def test_every_example_is_in_a_batch_with_the_same_probability_and_by_itself():
    n, batch, steps = 50, 5, 4000
    batches = drawn(schedule(n, batch, epochs=steps // 10))
    assert len(batches) == steps
    taken = np.zeros((steps, n))
    for row, chosen in enumerate(batches):
        taken[row, chosen] = 1
    rate = 0.1
    error = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(taken.mean(0) - rate).max() < 4.5 * error  # 50 examples
    sizes = taken.sum(1)
    assert abs(sizes.mean() - 5) < 4.5 * math.sqrt(4.5 / steps)
    assert abs(sizes.var() / 4.5 - 1) < 0.15  # binomial: n q (1 - q); a fixed size would have no variance
    assert abs((sizes == 0).mean() - 0.9**50) < 0.003  # 0.00515: batches are empty now and then
    correlation = np.corrcoef(taken.T) - np.eye(n)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(steps)  # 1225 pairs


def test_ranks_share_a_batch_and_pieces_are_cut_from_their_parts():
    whole = drawn(schedule(200, 20, epochs=3))
    parts = [drawn(schedule(200, 20, epochs=3, rank=r, world=3)) for r in range(3)]
    assert whole == [sorted(i for part in step for i in part) for step in zip(*parts, strict=True)]
    assert all(len(p) <= 6 for p in schedule(200, 20, micro=6).pieces())
    assert all(len(p) <= 20 for p in schedule(200, 20).pieces())
    assert [s.examples for s in schedule(200, 20, epochs=3, rank=1, world=3)] == [len(b) for b in whole]


def test_batches_are_the_keys_and_a_schedule_goes_on_behind_what_was_done():
    assert drawn(schedule(100, 10)) == drawn(schedule(100, 10)) != drawn(schedule(100, 10, key=bytes(32)))
    assert drawn(schedule(100, 10, done=4)) == drawn(schedule(100, 10))[4:]
    assert drawn(schedule(7, 9, epochs=2)) == [list(range(7))] * 2  # a rate of 1


# What is refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Rows", {"norm": True}, r"layer '1' \(BatchNorm1d\) .* use GroupNorm"),
        ("Odd", {"fault": "bare batchnorm"}, r"layer 'inner.1' \(BatchNorm1d\) .* use GroupNorm"),
        ("Odd", {"fault": "lstm"}, r"layer 'inner' \(LSTM\) .* DPLSTM"),
        ("Odd", {"fault": "mixed"}, "layer 'inner' .* changes with the others of its batch"),
        ("Odd", {"fault": "rows"}, "layer 'inner' .* saw 4 rows for 2 examples"),
        ("Odd", {"fault": "elsewhere"}, "layer 'inner' .* parameter 'inner.weight' is used outside"),
        ("Odd", {"fault": "buffer"}, "buffer 'seen' .* would leave without noise"),
    ],
)
def test_a_model_for_which_no_bound_holds_is_refused_by_its_layers_name(name, options, said, alone):
    with pytest.raises(OperatorError, match=said):
        alone(name, options, **ALL, dp=local())


def test_fp16_is_refused_and_so_is_a_missing_opacus(alone, monkeypatch):
    with pytest.raises(OperatorError, match="fp32 or bf16"):
        alone(precision="fp16", **ALL, dp=local())
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(OperatorError, match=r"pip install 'murmur\[dp\]'"):
        alone(**ALL, dp=local())


def test_data_that_changed_since_it_was_charged_is_refused(alone, task, make_job):
    settings = ALL | {"dp": local()}
    inspected = run_job(task(), make_job(kind="inspect"))
    assert (inspected.examples, inspected.metrics, inspected.update) == (63, {}, None)
    alone(expected=63, **settings)
    with pytest.raises(OperatorError, match="63 examples, and this site's ledger was charged for 60"):
        alone(expected=60, **settings)


# Jobs before and after


def test_a_plain_training_after_a_local_one_is_what_it_always_was(task, make_job):
    rows, session = task(), Session()
    for dp in (Dp(), local(), Dp()):
        run_job(rows, make_job(**ALL | {"batch_size": 16, "dp": dp}), session=session)
    again = tensors(make_job().update)
    run_job(task(), make_job(**ALL | {"batch_size": 16}))
    assert apart(again, tensors(make_job().update)) == 0
    assert not [p for p in session.module.parameters() if hasattr(p, "grad_sample")]


def test_a_local_training_goes_on_from_a_checkpoint_with_new_noise(task, make_job, tmp_path, monkeypatch):
    job = make_job(
        "Wide", {"fault": "zero"}, batch_size=64, epochs=6, lr=1.0, dp=local(clip_norm=1.0, noise_multiplier=1.0),
        checkpoint=tmp_path / "checkpoint", checkpoint_s=1e-6,
    )  # fmt: skip
    kept, write = {}, Checkpoints.write

    def and_wait(self, tally, module, stepper):
        write(self, tally, module, stepper)
        self.close()
        kept[tally.step] = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])

    monkeypatch.setattr(Checkpoints, "write", and_wait)
    stops = iter([False] * 5 + [True])  # one batch of evaluation, four of training
    with pytest.raises(Cancelled):
        run_job(task("Wide", fault="zero"), job, stop=lambda: next(stops))
    before = dict(kept)
    kept.clear()
    result = run_job(task("Wide", fault="zero"), job)
    at = max(before)
    assert result.steps == 6 and at >= 2 and min(kept) == at and torch.equal(kept[at], before[at])
    steps = [one - other for one, other in ((before[at], before[at - 1]), (kept[5], kept[4]))]
    assert abs(float(torch.corrcoef(torch.stack(steps))[0, 1])) < 5 / math.sqrt(len(steps[0]))
    values = flat(tensors(job.update))
    assert abs(float(values.std()) / (math.sqrt(6) / 64) - 1) < 5 / math.sqrt(
        2 * len(values)
    )  # of six steps, once each
