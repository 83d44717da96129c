"""Local algorithms in one process and in two ranks, against loops written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from murmur.aggregation.local import CONTROL, controls, first_version
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.local import Proximal, effective_steps
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import map_tensors, read_model, write_tensors
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Strategy, Train
from murmur.protocol.tensors import read_layout, write_file

TASKS = Path(__file__).with_name("sample_tasks.py")
HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1}  # 63 examples: the last batch of an epoch has 15


def tensors(path):
    return {name: tensor.clone() for name, tensor in map_tensors(path, read_layout(path)).items()}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def scaffold_job(make_job, tmp_path):
    """A job whose version and own file hold control variates that were drawn at random."""

    def make(name="Rows", options=None, spread=0.3, **settings):
        job = make_job(name, options, algorithm="scaffold", **settings)
        first_version(job.model, read_layout(job.model), Strategy(name="scaffold"), job.model)
        layout = read_layout(job.model)
        generator = torch.Generator().manual_seed(1)
        drawn = {
            side: {t.name: spread * torch.randn(t.shape, generator=generator) for t in controls(layout)}
            for side in ("c", "own")
        }
        version = {n: t.clone() for n, t in map_tensors(job.model, layout).items()} | drawn["c"]
        write_file(job.model, {n: t.numpy() for n, t in version.items()}, layout)
        write_tensors(drawn["own"], tmp_path / "own-before")
        return replace(job, own=tmp_path / "own-before"), drawn["c"], drawn["own"]

    return make


def scaffold_by_hand(task, job, c, own):
    """Algorithm 1 of the paper, option II, in float64: what is sent, and c_i afterwards."""
    module = task.model()
    read_model(module, job.model)
    named = dict(module.named_parameters())
    y = {name: p.detach().double().numpy().copy() for name, p in named.items()}
    x = {name: value.copy() for name, value in y.items()}
    c, own = ({n: t.double().numpy() for n, t in held.items()} for held in (c, own))
    inputs, target = task.data("train").tensors
    steps = 0
    for epoch in range(job.train.epochs):
        for index in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(torch.from_numpy(y[name]))
                    p.grad = None
            nn.functional.cross_entropy(module(inputs[index]), target[index]).backward()
            steps += 1
            for name, p in named.items():
                gradient = 0 if p.grad is None else p.grad.double().numpy()
                y[name] -= job.train.lr * (gradient - own[CONTROL + name] + c[CONTROL + name])
    after, sent = {}, {n: torch.from_numpy(y[n] - x[n]).float() for n in y}
    for name in y:
        control = CONTROL + name
        after[control] = own[control] - c[control] + (x[name] - y[name]) / (steps * job.train.lr)
        sent[control] = torch.from_numpy(after[control] - own[control]).float()
    return sent, {n: torch.from_numpy(a).float() for n, a in after.items()}


def in_processes(task, job, tmp_path, name="Rows", options=None, processes=1):
    if processes == 1:
        return run_job(task(name, **(options or {})), job)
    with Trainer(f"{TASKS}:{name}", options or {}, processes=processes, workdir=tmp_path) as trainer:
        return trainer.run(job)


@pytest.mark.parametrize(
    ("settings", "processes"),
    [({}, 1), ({"micro_batch": 5}, 1), ({"precision": "fp16"}, 1), ({"micro_batch": 5}, 2), ({"precision": "fp16"}, 2)],
    ids=str,
)
def test_scaffold_sends_and_keeps_what_the_papers_algorithm_does(processes, settings, task, scaffold_job, tmp_path):
    job, c, own = scaffold_job(**HARD, **settings)
    result = in_processes(task, job, tmp_path, processes=processes)
    sent, after = scaffold_by_hand(task(), job, c, own)
    # (x - y) / (K lr) divides the rounding of x and y by 0.8; fp16 computes in halves, a thousand times as coarse
    limit = 1e-2 if settings.get("precision") else 2e-6
    assert apart(tensors(job.update), sent) < limit
    assert apart(tensors(job.own_after), after) < limit
    assert result.steps == 8
    assert apart(sent, {n: torch.zeros_like(t) for n, t in sent.items()}) > 0.1


def test_scaffold_counts_only_the_steps_that_happened(task, scaffold_job):
    job, c, own = scaffold_job(options={"fault": "inf first"}, precision="fp16", **HARD)
    result = run_job(task(fault="inf first"), job)
    assert result.steps == 7
    update, after = tensors(job.update), tensors(job.own_after)
    for name in ("0.weight", "4.bias"):
        mean = -update[name] / (7 * 0.1)
        assert torch.allclose(update[CONTROL + name], mean - c[CONTROL + name], atol=1e-6)
        assert torch.allclose(after[CONTROL + name], mean - c[CONTROL + name] + own[CONTROL + name], atol=1e-6)


def test_scaffold_under_dp_sgd_keeps_what_left_with_noise(task, scaffold_job):
    job, c, own = scaffold_job(dp=Dp(mode="local", clip_norm=0.5, noise_multiplier=1.0), **HARD)
    result = run_job(task(), job)
    assert result.steps == 8
    update, after = tensors(job.update), tensors(job.own_after)
    for name in ("0.weight", "4.bias"):
        mean = -update[name] / (8 * 0.1)
        assert torch.allclose(update[CONTROL + name], mean - c[CONTROL + name], atol=1e-6)
        assert torch.allclose(after[CONTROL + name], mean - c[CONTROL + name] + own[CONTROL + name], atol=1e-6)
        noisy = mean - c[CONTROL + name] + own[CONTROL + name]  # the mean gradient: eight times noise of 0.5 / 16
        assert 0.2 < float(noisy.std()) / (0.5 / 16 / 8**0.5) < 5


def test_scaffold_without_a_single_step_moves_no_control_variate(task, scaffold_job):
    job, _, own = scaffold_job(options={"n": 4}, precision="fp16", batch_size=16)
    result = run_job(task(n=4, fault="inf first"), job)
    assert result.steps == 0
    assert all(not t.any() for t in tensors(job.update).values())
    assert apart(tensors(job.own_after), own) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_scaffold_moves_a_parameter_that_this_client_does_not_use(processes, task, scaffold_job, tmp_path):
    job, c, own = scaffold_job(options={"fault": "unused"}, **HARD)
    in_processes(task, job, tmp_path, options={"fault": "unused"}, processes=processes)
    sent, after = scaffold_by_hand(task(fault="unused"), job, c, own)
    assert float(sent["0.spare.weight"].abs().max()) > 0.05  # 8 steps of 0.1 along c - c_i
    assert apart(tensors(job.update), sent) < 2e-6
    assert apart(tensors(job.own_after), after) < 2e-6
    assert float(tensors(job.own_after)[CONTROL + "0.spare.weight"].abs().max()) < 1e-6  # its gradient is zero


def test_scaffold_begins_at_zero_where_the_site_kept_nothing(task, scaffold_job):
    job, c, own = scaffold_job(**HARD)
    run_job(task(), replace(job, own=None))
    sent, _ = scaffold_by_hand(task(), job, c, {n: torch.zeros_like(t) for n, t in own.items()})
    assert apart(tensors(job.update), sent) < 2e-6


def test_a_broken_own_file_is_not_taken_for_zero(task, scaffold_job):
    job, _, _ = scaffold_job(**HARD)
    job.own.write_bytes(job.own.read_bytes()[:-4])
    with pytest.raises(OperatorError, match="own-before: bring it back from a copy"):
        run_job(task(), job)
    assert not job.update.exists()


def test_an_algorithm_and_a_version_that_do_not_fit_are_told(task, scaffold_job, make_job):
    job, _, _ = scaffold_job(**HARD)
    with pytest.raises(OperatorError, match="model has control variates, and its algorithm is 'plain'"):
        run_job(task(), replace(job, algorithm="plain"))
    with pytest.raises(OperatorError, match="model lacks control variates, and its algorithm is 'scaffold'"):
        run_job(task(), make_job(algorithm="scaffold", **HARD))


def test_an_evaluation_ignores_control_variates(task, scaffold_job, make_job):
    job, _, _ = scaffold_job(kind="evaluate")
    measured = run_job(task(), job).metrics
    assert measured == run_job(task(), make_job(kind="evaluate")).metrics


@pytest.mark.parametrize(("algorithm", "processes"), [("scaffold", 2), ("distilled", 1)])
def test_a_killed_training_ends_in_the_same_bits(algorithm, processes, scaffold_job, make_job, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("MURMUR_TEST_MARK", str(mark))
    options, settings = {"fault": "killed late"}, {"batch_size": 16, "epochs": 3}
    if algorithm == "scaffold":
        job, _, _ = scaffold_job("Noisy", options, **settings)
    else:
        job = make_job("Noisy", options, distill={"weight": 2.0}, **settings)
    mark.touch()  # undisturbed
    with Trainer(f"{TASKS}:Noisy", options, processes=processes, workdir=tmp_path) as trainer:
        trainer.run(job)
        wanted = [path.read_bytes() for path in (job.update, job.own_after) if path.exists()]
        mark.unlink()
    job.update.unlink()
    job.own_after.unlink(missing_ok=True)
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    output = tmp_path / "ranks.log"
    with Trainer(f"{TASKS}:Noisy", options, processes=processes, workdir=tmp_path, log_file=output) as trainer:
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            trainer.run(job)
        trainer.run(job)
    assert "training goes on from a checkpoint" in output.read_text()
    assert [path.read_bytes() for path in (job.update, job.own_after) if path.exists()] == wanted
    assert len(wanted) == (2 if algorithm == "scaffold" else 1)


# FedNova


SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5, "dampening": 0.25},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("options", SGD, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 17])
def test_effective_steps_are_how_far_sgd_goes_along_a_gradient_of_one(options, steps):
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, **options)
    for _ in range(steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    assert effective_steps(steps, Train(optimizer_options=options)) == pytest.approx(float(weight.detach()), rel=1e-12)


def test_effective_steps_with_momentum_are_the_papers():
    # Section 4: |a| = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)
    rho, tau = 0.9, 20
    expected = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert effective_steps(tau, Train(optimizer_options={"momentum": rho})) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "alone"), ({"optimizer_options": {"momentum": 0.9}}, "alone"), ({"micro_batch": 4}, "in_ranks")],
    ids=str,
)
def test_fednova_sends_the_update_per_effective_step_and_statistics_as_they_are(where, settings, request):
    run, options = request.getfixturevalue(where), {"norm": True}
    plain, _ = run(options=options, **HARD, **settings)
    update, result = run(options=options, algorithm="fednova", **HARD, **settings)
    effective = effective_steps(8, Train(**settings))
    assert result.effective_steps == effective and (effective == 8) == ("optimizer_options" not in settings)
    for name, tensor in plain.items():
        statistic = "running" in name or "num_batches" in name
        assert torch.allclose(
            update[name].double(), tensor.double() / (1 if statistic else effective), rtol=1e-6, atol=1e-9
        )


def test_fednova_counts_only_the_steps_that_happened(alone):
    _, result = alone(options={"fault": "inf first"}, precision="fp16", algorithm="fednova", **HARD)
    assert result.effective_steps == 7


# A site's own bound on the time


@pytest.mark.parametrize("where", ["alone", "in_ranks"])
@pytest.mark.parametrize("algorithm", ["plain", "fednova"])
def test_a_site_without_time_sends_the_first_step(algorithm, where, request, task, make_job):
    update, result = request.getfixturevalue(where)(train_s=1e-9, algorithm=algorithm, **HARD)
    first = make_job(**HARD)
    module = task().model()
    read_model(module, first.model)
    inputs, target = task().data("train").tensors
    index = epoch_order(first, 0, 63)[:16]
    nn.functional.cross_entropy(module(inputs[index]), target[index]).backward()
    assert apart(update, {name: -0.1 * p.grad for name, p in module.named_parameters()}) < 1e-6
    assert (result.steps, result.examples) == (1, 63)
    assert result.effective_steps == (1 if algorithm == "fednova" else 0)


def test_a_site_with_time_enough_trains_it_all(alone):
    update, result = alone(train_s=3600.0, **HARD)
    assert result.steps == 8 and apart(update, alone(**HARD)[0]) == 0


# The proximal term, as a hook


def test_the_proximal_term_pulls_toward_the_anchor_and_skips_what_has_no_gradient():
    moved, idle = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([5.0]))
    pull = Proximal({"moved": moved, "idle": idle}, mu=0.5)
    with torch.no_grad():
        moved += torch.tensor([2.0, -4.0])
    moved.grad = torch.tensor([10.0, 10.0])
    pull.before_step()
    assert moved.grad.tolist() == [11.0, 8.0]  # 10 + 0.5 * 2, 10 - 0.5 * 4
    assert idle.grad is None


# Distillation


def distilled_by_hand(task, job, temperature):
    """The mean over the batch of cross-entropy plus weight * T^2 * KL(incoming | trained)."""
    module, teacher = task.model(), task.model()
    for each in (module, teacher):
        read_model(each, job.model)
    teacher.eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    inputs, target = task.data("train").tensors
    for epoch in range(job.train.epochs):
        for index in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            module.zero_grad()
            output = module(inputs[index])
            p = (teacher(inputs[index]).detach() / temperature).softmax(1)
            q = (output / temperature).softmax(1)
            divergence = (p * (p / q).log()).sum(1).mean() * temperature**2
            (nn.functional.cross_entropy(output, target[index]) + 3.0 * divergence).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= job.train.lr * parameter.grad
    return {n: t - before[n] for n, t in module.state_dict().items()}


@pytest.mark.parametrize(
    ("temperature", "settings", "where"),
    [(1.0, {}, "alone"), (2.5, {"micro_batch": 5}, "alone"), (2.5, {"micro_batch": 5}, "in_ranks")],
)
def test_distillation_adds_the_divergence_from_the_incoming_model(
    temperature, where, settings, request, task, make_job
):
    settings = HARD | settings | {"distill": {"weight": 3.0, "temperature": temperature}}
    update, result = request.getfixturevalue(where)(**settings)
    job = make_job(**settings)
    assert apart(update, distilled_by_hand(task(), job, temperature)) < 1e-6
    plain, without = request.getfixturevalue("alone")(**HARD)
    assert apart(update, plain) > 1e-2
    assert result.metrics["train_loss"] != without.metrics["train_loss"]


def test_the_reported_loss_is_the_tasks_own(task, make_job):
    job = make_job(batch_size=64, distill={"weight": 1e3})  # one step, from the teacher itself
    assert run_job(task(), job).metrics["train_loss"] == run_job(task(), make_job(batch_size=64)).metrics["train_loss"]


def test_a_task_may_say_what_distillation_is(task, make_job):
    ragged = task("Ragged")
    job = make_job("Ragged", distill={"weight": 1.0}, **HARD)
    with pytest.raises(OperatorError, match=r"a tensor of shape .*: write distill\(output, teacher_output\)"):
        run_job(ragged, job)
    seen = []

    def distill(output, answer):
        seen.append(float((output - answer).detach().abs().max()))
        assert output.requires_grad and not answer.requires_grad
        return ((output - answer) ** 2).sum()

    ragged.distill = distill
    run_job(ragged, job)
    assert len(seen) == 8 and seen[0] == 0 < seen[-1]
