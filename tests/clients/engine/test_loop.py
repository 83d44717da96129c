from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import read_model
from murmur.clients.job import Cancelled
from murmur.clients.trainer import Trainer
from murmur.protocol.errors import OperatorError

TASKS = Path(__file__).with_name("sample_tasks.py")


def by_hand(task, job, *, mu=0.0, precision="fp32"):
    """The oracle: an ordinary training loop in one process, with FedProx as a term of the loss."""
    module = task.model()
    read_model(module, job.model)
    anchor = {n: t.clone() for n, t in module.state_dict().items()}
    start = [p.detach().clone() for p in module.parameters()]
    kind, options = getattr(torch.optim, job.train.optimizer), job.train.optimizer_options
    optimizer = kind(module.parameters(), lr=job.train.lr, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    inputs, target = task.data("train").tensors
    for epoch in range(job.train.epochs):
        for index in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            half = torch.float16 if precision == "fp16" else torch.bfloat16
            with torch.autocast("cpu", dtype=half, enabled=precision != "fp32"):
                loss = nn.functional.cross_entropy(module(inputs[index]), target[index])
            pull = sum(((p - a) ** 2).sum() for p, a in zip(module.parameters(), start, strict=True))
            scaler.scale(loss + mu / 2 * pull).backward()
            scaler.unscale_(optimizer)
            if job.train.clip_norm:
                nn.utils.clip_grad_norm_(module.parameters(), job.train.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {name: tensor - anchor[name] for name, tensor in module.state_dict().items()}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def size(update):
    return max(float(t.abs().max()) for t in update.values())


HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1}  # 63 examples: the last batch of an epoch has 15


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch": 4},
        {"micro_batch": 5},
        {"optimizer_options": {"momentum": 0.9, "weight_decay": 0.01}},
        {"optimizer": "AdamW", "lr": 0.01},
        {"clip_norm": 0.3},
        {"mu": 0.5},
        {"mu": 0.5, "micro_batch": 4},
        {"mu": 0.5, "clip_norm": 0.3},
        {"mu": 0.5, "precision": "fp16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["alone", "in_ranks"])
def test_training_equals_an_ordinary_loop_in_one_process(where, settings, request, task, make_job):
    settings = HARD | settings
    job = make_job(**settings)
    expected = by_hand(task(), job, mu=job.mu, precision=job.train.precision)
    update, result = request.getfixturevalue(where)(**settings)
    # Halves that are summed in another order round to another half: fp16 on two ranks is only as exact as that.
    limit = 1e-4 if (job.train.precision, where) == ("fp16", "in_ranks") else 1e-6
    assert size(expected) > 0.01
    assert apart(update, expected) <= limit
    assert (result.examples, result.steps) == (63, 8)


def test_the_clipped_and_the_pulled_updates_differ_from_plain_ones(alone):
    plain, _ = alone(**HARD)
    for settings in ({"clip_norm": 0.3}, {"mu": 0.5}):
        assert apart(plain, alone(**HARD, **settings)[0]) > 1e-3


@pytest.mark.parametrize("examples", [17, 33, 1])
def test_a_rank_without_examples_changes_nothing(examples, alone, in_ranks):
    # batches of 16: the last one has a single example, which rank 0 takes
    options = {"n": examples}
    assert apart(alone(options=options, **HARD)[0], in_ranks(options=options, **HARD)[0]) <= 1e-6


def test_a_mean_over_tokens_is_exact_with_ragged_targets(task, make_job, alone, in_ranks):
    job = make_job("Ragged", **HARD)
    inputs, target = task("Ragged").data("train").tensors
    module = task("Ragged").model()
    read_model(module, job.model)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for epoch in range(2):
        for index in epoch_order(job, epoch, 63).split(16):
            module.zero_grad()
            nn.functional.cross_entropy(module(inputs[index]).transpose(1, 2), target[index]).backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad
    expected = {n: t - before[n] for n, t in module.state_dict().items()}
    assert apart(alone("Ragged", **HARD)[0], expected) <= 1e-6
    update, result = in_ranks("Ragged", micro_batch=3, **HARD)
    assert apart(update, expected) <= 1e-6
    assert result.metrics["train_loss"][1] == 2 * int((target != -100).sum())


@pytest.mark.parametrize("where", ["alone", "in_ranks"])
def test_bf16_stays_within_a_hundredth_of_fp32(where, request, alone):
    half, _ = request.getfixturevalue(where)(precision="bf16", **HARD)
    full, _ = alone(**HARD)
    assert 0 < apart(half, full) <= 1e-2


def test_fp16_leaves_out_a_step_that_overflowed(alone):
    # The whole data set is one batch, so that a step is the same whichever epoch it belongs to.
    whole = {"batch_size": 64, "precision": "fp16", "lr": 0.1}
    nothing, result = alone(options={"fault": "inf first"}, epochs=1, **whole)
    assert (size(nothing), result.steps) == (0.0, 0)
    second_only, result = alone(options={"fault": "inf first"}, epochs=2, **whole)
    assert result.steps == 1
    assert apart(second_only, alone(epochs=1, **whole)[0]) <= 1e-4 < size(second_only)


def test_fp16_overflow_on_one_rank_leaves_the_step_out_on_all(in_ranks):
    update, result = in_ranks(options={"fault": "inf on rank 1"}, batch_size=64, precision="fp16", mu=0.1)
    assert (size(update), result.steps) == (0.0, 0)


def test_batchnorm_counts_every_step_and_ranks_average_their_statistics(task, make_job, in_ranks):
    # A rate so small that no weight moves: the statistics of both ranks can then be computed side by side.
    still = {"batch_size": 16, "epochs": 1, "lr": 1e-12}
    job = make_job(options={"norm": True}, **still)
    update, result = in_ranks(options={"norm": True}, **still)
    inputs = task().data("train").tensors[0]
    replicas = [task(norm=True).model() for _ in range(2)]
    for r, module in enumerate(replicas):
        read_model(module, job.model)
        for index in epoch_order(job, 0, 63).split(16):
            module(inputs[index[r::2]])
    incoming = task(norm=True).model()
    read_model(incoming, job.model)
    for name in ("running_mean", "running_var"):
        both = torch.stack([getattr(m[1], name) for m in replicas])
        assert not torch.allclose(both[0], both[1], atol=1e-3)
        assert torch.allclose(update[f"1.{name}"], both.mean(0) - getattr(incoming[1], name), atol=1e-6)
    assert update["1.num_batches_tracked"].item() == result.steps == 4


def test_batchnorm_over_space_survives_a_last_batch_of_one(in_ranks):
    update, _ = in_ranks("Images", {"n": 17}, **HARD)
    assert update["2.num_batches_tracked"].item() == 4
    assert 0 < size(update) < 10


@pytest.mark.parametrize("examples", [17, 19, 33])
def test_batchnorm_over_examples_never_meets_one_alone(examples, in_ranks, alone):
    # Batches of 16: 17 and 33 leave one example over, and 19 three, of which a second rank would get one.
    options = {"n": examples, "norm": True}
    for run in (alone, in_ranks):
        update, result = run(options=options, **HARD)
        assert (result.examples, result.metrics["train_loss"][1]) == (examples, 2 * examples)
        assert update["1.num_batches_tracked"].item() == result.steps == {17: 2, 19: 4, 33: 4}[examples]


def test_a_batchnorm_that_can_do_with_one_example_gets_one(alone):
    _, result = alone("Images", {"n": 17}, **HARD)
    assert result.steps == 4


def test_steps_end_in_the_midst_of_an_epoch_and_go_on_into_the_next(alone, in_ranks):
    settings = {"batch_size": 16, "lr": 0.1}
    assert apart(alone(**settings, steps=8)[0], alone(**settings, epochs=2)[0]) == 0
    update, result = alone(**settings, steps=6)
    assert (result.steps, result.examples, result.metrics["train_loss"][1]) == (6, 63, 63 + 32)
    assert apart(in_ranks(**settings, steps=6)[0], update) <= 1e-6


def test_pieces_are_halved_until_memory_is_enough_and_stay_so(task, make_job, caplog):
    rows, session = task(fault="out of memory above 5"), Session()
    job = make_job(batch_size=16, micro_batch="auto")
    result = run_job(rows, job, session=session)
    found = job.update.read_bytes()
    told = [(r.was, r.micro_batch) for r in caplog.records if "memory ran out" in r.message]
    assert (told, result.steps) == ([(16, 8), (8, 4)], 4)
    run_job(rows, job, session=session)
    assert len([r for r in caplog.records if "memory ran out" in r.message]) == 2
    run_job(task(), make_job(batch_size=16, micro_batch=4))
    assert found == job.update.read_bytes()


def test_a_parameter_without_gradient_does_not_stop_the_ranks(alone, in_ranks):
    ours, theirs = (run(options={"fault": "unused"}, **HARD)[0] for run in (alone, in_ranks))
    assert apart(ours, theirs) <= 1e-6
    assert ours["0.spare.weight"].abs().max() == 0


def test_metrics_are_exact_sums_over_the_test_split_of_the_incoming_model(task, make_job, alone, in_ranks):
    job = make_job(**HARD)
    module = task().model()
    read_model(module, job.model)
    inputs, target = task().data("test").tensors
    loss = nn.functional.cross_entropy(module(inputs), target, reduction="sum").item()
    right = int((module(inputs).argmax(1) == target).sum())
    for run in (alone, in_ranks):
        _, result = run(**HARD)
        assert result.metrics["loss"] == (pytest.approx(loss, rel=1e-6), 21)
        assert result.metrics["accuracy"] == (right, 21)
        assert result.metrics["train_loss"][1] == 2 * 63
        assert result.metrics.keys() == {"loss", "accuracy", "train_loss"}  # not "private": nobody asked for it


def test_an_evaluation_writes_no_update(alone, make_job, task):
    job = make_job(kind="evaluate")
    result = run_job(task(), job)
    assert (result.update, result.examples, result.steps) == (None, 21, 0)
    assert result.metrics.keys() == {"loss", "accuracy"}
    assert not job.update.exists()


def test_a_task_without_test_data_is_trained_unmeasured(alone):
    _, result = alone(options={"test": 0})
    assert result.metrics.keys() == {"train_loss"}


@pytest.mark.parametrize("epochs", [1, 3])
def test_each_example_is_seen_once_an_epoch(epochs, task, make_job):
    listed = task("Listed")
    session = Session()
    session.load(listed, make_job("Listed"))
    dataset = session.data("train")
    session.prepare_training(dataset, make_job("Listed"))
    dataset.seen.clear()
    run_job(listed, make_job("Listed", epochs=epochs, batch_size=16, micro_batch=5), session=session)
    assert sorted(dataset.seen) == sorted([*range(63)] * epochs)


def test_the_same_job_gives_the_same_bytes_and_another_seed_round_or_client_others(task, make_job):
    rows = task(dropout=0.5, norm=True)
    job = make_job(options={"norm": True}, **HARD)
    session = Session()

    def trained(job, **how):
        run_job(rows, job, **how)
        return job.update.read_bytes()

    first = trained(job)
    assert trained(job, session=session) == first
    others = [replace(job, seed=4), replace(job, round=2), replace(job, client="south")]
    assert len({first, *(trained(other, session=session) for other in others)}) == 4
    assert trained(job, session=session) == first


@pytest.mark.parametrize("change", [{"seed": 4}, {"round": 2}, {"client": "south"}], ids=str)
def test_dropout_is_drawn_anew_for_every_seed_round_and_client(change, alone):
    # One batch of everything: the order of the examples moves nothing but the last bits.
    still = {"options": {"n": 1}, "lr": 1.0}
    assert apart(alone(**still)[0], alone(**still, **change)[0]) == 0
    drawn = {"options": {"n": 1, "dropout": 0.5}, "lr": 1.0}
    assert apart(alone(**drawn)[0], alone(**drawn, **change)[0]) > 1e-3


def test_global_generators_are_put_back(alone):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    alone("Listed", **HARD)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_stop_takes_effect_at_the_next_batch_and_leaves_no_update(task, make_job):
    rows, job = task(test=0), make_job(**HARD)
    asked = []
    with pytest.raises(Cancelled, match="after 5 of 8"):
        run_job(rows, job, stop=lambda: asked.append(1) or len(asked) > 5)
    assert not job.update.exists()


def test_a_cancelled_job_leaves_nothing_for_the_next(task, make_job):
    rows, session = task(norm=True), Session()
    job = make_job(options={"norm": True}, **HARD)
    run_job(rows, job)
    clean = job.update.read_bytes()
    asked = []
    with contextlib.suppress(Cancelled):
        run_job(rows, job, session=session, stop=lambda: asked.append(1) or len(asked) > 4)
    run_job(rows, job, session=session)
    assert job.update.read_bytes() == clean


def test_gradients_of_a_job_that_failed_do_not_reach_the_next(task, make_job):
    session, job = Session(), make_job(micro_batch=8, **HARD)
    run_job(task(), job)
    clean = job.update.read_bytes()
    with pytest.raises(LookupError):
        run_job(task(fault="raises second"), job, session=session)  # between the pieces of the first step
    run_job(task(), job, session=session)
    assert job.update.read_bytes() == clean


def test_gradients_are_exchanged_once_a_step_however_many_pieces_it_has(make_job, tmp_path):
    job = make_job("Exchanges", batch_size=16, micro_batch=2, metrics=("held",))
    with Trainer(f"{TASKS}:Exchanges", {}, processes=2, workdir=tmp_path) as trainer:
        trainer.run(job)
        held, told = trainer.run(replace(job, kind="evaluate")).metrics["held"]
    assert held / told == 4 * 3  # 4 steps, 4 pieces each, of which the last is exchanged


def test_progress_counts_up_to_the_last_batch(task, make_job):
    told = []
    run_job(task(), make_job(**HARD), report=told.append)
    assert (told[0].step, told[-1].step, told[-1].steps) == (1, 10, 10)  # 21 test examples in 2, 2 epochs of 4
    assert all(p.loss > 0 and p.examples_per_s > 0 for p in told)


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"fault": "mean"}, {}, "looks like a mean"),
        ({"fault": "vector"}, {}, r"must be the sum over the batch, a scalar"),
        ({"fault": "nan"}, {}, "NaN"),
        ({"n": 0}, {}, "empty"),
        ({}, {"optimizer": "Adagard"}, "did you mean Adagrad"),
        ({}, {"optimizer": "LBFGS"}, "no 'LBFGS' that can be used here"),
        ({}, {"optimizer_options": {"momentun": 0.9}}, "no option 'momentun'; did you mean momentum"),
        ({}, {"optimizer_options": {"nesterov": True}}, "refuses these settings"),
    ],
)
def test_mistakes_of_the_operator_are_named_and_leave_no_file(options, settings, words, task, make_job):
    job = make_job(options=options, **settings)
    with pytest.raises(OperatorError, match=words):
        run_job(task(**options), job)
    assert [p.name for p in job.update.parent.iterdir()] == ["Rows.model"]
