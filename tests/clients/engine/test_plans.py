"""Every plan gives the update of a single process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import built, initial_model, map_tensors
from murmur.clients.job import Job
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Parallel, Train
from murmur.protocol.tensors import read_layout

TASKS = Path(__file__).with_name("plan_tasks.py")
LINES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
TWO = [
    {"shard": 2},
    {"shard": 2, "activation_checkpoint": True},
    {"tensor": 2},
    *({"pipeline": 2, "schedule": line} for line in LINES),
    {"pipeline": 2, "activation_checkpoint": True},
    {"data": 2, "activation_checkpoint": True},
]
FOUR = [
    {"shard": 4},
    {"data": 2, "shard": 2},
    {"data": 2, "tensor": 2},
    {"shard": 2, "tensor": 2},
    {"shard": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    *({"data": 2, "pipeline": 2, "schedule": line} for line in LINES if line != "zero-bubble"),
]
# 63 examples in batches of 16: the last has 15, in pieces of 3 that two processes do not share evenly.
PLAIN = {"batch_size": 16, "epochs": 2, "lr": 0.1}
HARD = PLAIN | {"mu": 0.5, "clip_norm": 0.3, "micro_batch": 3, "optimizer_options": {"momentum": 0.9}}


def name(value):
    return " ".join(f"{key}={v}" for key, v in value.items())


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Warm ranks, by task and number."""
    started: dict[tuple, Trainer] = {}

    def get(task: str, processes: int, **options) -> Trainer:
        key = task, processes, *options.items()
        if key not in started:
            folder = tmp_path_factory.mktemp("ranks")
            started[key] = Trainer(f"{TASKS}:{task}", options, processes=processes, workdir=folder)
        return started[key]

    yield get
    for trainer in started.values():
        trainer.close()


@pytest.fixture
def make(tmp_path):
    def job(task="Deep", options=None, plan=None, **settings):
        model = tmp_path / "model"
        initial_model(load_task(f"{TASKS}:{task}", options or {}), 7, model)
        train = Train(**{k: settings.pop(k) for k in [*settings] if k in Train.model_fields})
        values = {"mu": 0.0, "metrics": ("loss", "accuracy"), "seed": 3, "round": 1, "client": "north"}
        return Job(
            id="job", kind="train", model=model, update=tmp_path / "update", train=train,
            parallel=Parallel(**(plan or {})), **(values | settings),
        )  # fmt: skip

    return job


@pytest.fixture
def compare(trainers, make):
    """Train by the plan and in one process; gives the largest difference, after checks of all that is not a weight."""

    def run(task, plan, processes, options=None, **settings):
        if torch.cuda.is_available() and torch.cuda.device_count() < processes:
            pytest.skip(f"{processes} GPUs needed, {torch.cuda.device_count()} found")
        job = make(task, options, plan, **settings)
        expected = run_job(load_task(f"{TASKS}:{task}", options or {}), job)
        ours = tensors(job.update)
        job.update.unlink()
        told = []
        result = trainers(task, processes, **(options or {})).run(job, told.append)
        theirs = tensors(job.update)
        assert (result.examples, result.steps) == (expected.examples, expected.steps)
        for key, (total, count) in expected.metrics.items():
            loose = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[job.train.precision]
            assert result.metrics[key] == (pytest.approx(total, rel=loose, abs=1), count)
        assert told[-1].step == told[-1].steps and all(p.loss > 0 for p in told)
        assert ours.keys() == theirs.keys()
        assert max(float(t.abs().max()) for n, t in ours.items() if t.is_floating_point()) > 0.01
        return max(float((ours[n] - theirs[n]).abs().max()) for n in ours if ours[n].is_floating_point())

    return run


def tensors(path):
    return {name: tensor.clone() for name, tensor in map_tensors(path, read_layout(path)).items()}


@pytest.mark.parametrize("settings", [PLAIN, HARD], ids=["plain", "prox, clip, momentum, pieces of 3"])
@pytest.mark.parametrize("plan", TWO, ids=name)
def test_two_processes_equal_one(plan, settings, compare):
    assert compare("Deep", plan, 2, **settings) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, HARD], ids=["plain", "prox, clip, momentum, pieces of 3"])
@pytest.mark.parametrize("plan", FOUR, ids=name)
def test_four_processes_equal_one(plan, settings, compare):
    assert compare("Deep", plan, 4, **settings) <= 1e-6


@pytest.mark.parametrize("plan", [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}], ids=name)
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 1e-2), ("fp16", 1e-3)])
def test_lower_precision_is_as_near(precision, limit, plan, compare):
    assert compare("Deep", plan, 2, **(HARD | {"precision": precision})) <= limit


GPUS = [
    (1, {"activation_checkpoint": True}),
    (2, {"shard": 2}),
    (2, {"shard": 2, "offload": True}),
    (2, {"tensor": 2}),
    *((2, {"pipeline": 2, "schedule": line}) for line in LINES),
    (4, {"data": 2, "shard": 2}),
    (4, {"data": 2, "pipeline": 2}),
    (4, {"shard": 2, "tensor": 2}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize(("gpus", "plan"), GPUS, ids=str)
def test_several_gpus_equal_one(gpus, plan, precision, limit, compare):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs needed, {torch.cuda.device_count()} found")
    assert compare("Deep", plan, gpus, **(HARD | {"precision": precision})) <= limit


@pytest.mark.parametrize("plan", [{"shard": 2}, {"tensor": 2}], ids=name)
def test_tied_weights_layers_that_the_task_cuts_and_a_loss_by_tokens(plan, compare):
    assert compare("Tokens", plan, 2, **HARD) <= 1e-6


@pytest.mark.parametrize("line", ["1f1b", "interleaved"])
def test_stages_that_the_task_names(line, compare):
    assert compare("Tokens", {"pipeline": 2, "schedule": line}, 2, {"fault": "untied"}, **HARD) <= 1e-6


@pytest.mark.parametrize("plan", [{"shard": 2}, {"pipeline": 2}], ids=name)
@pytest.mark.parametrize("examples", [17, 1])
def test_processes_without_an_example_change_nothing(examples, plan, compare):
    assert compare("Deep", plan, 2, {"n": examples}, **HARD) <= 1e-6


def test_a_buffer_counts_what_was_computed_and_nothing_that_was_tried_before(trainers, make):
    job = make(plan={"pipeline": 2}, **PLAIN)
    trainers("Deep", 2).run(job)
    assert tensors(job.update)["3.steps"].item() == 8 * 8  # 8 steps of 8 pieces: 4 for each stage


def test_batchnorm_is_averaged_over_the_shards(trainers, make):
    job = make("Normed", plan={"shard": 2}, **PLAIN)
    trainers("Normed", 2).run(job)
    sharded = tensors(job.update)
    trainers("Normed", 2).run(replace(job, parallel=Parallel(data=2)))
    replicated = tensors(job.update)
    assert all(torch.allclose(sharded[n].float(), replicated[n].float(), atol=1e-6) for n in replicated)


def test_all_stages_see_the_same_examples_though_they_draw_different_numbers(trainers, make):
    job = make("Drawn", plan={"pipeline": 2}, **(PLAIN | {"lr": 1e-9}))
    total, count = trainers("Drawn", 2).run(job).metrics["train_loss"]
    assert count == 2 * 63 and total < 1e-4


HALF = [
    ({"shard": 2}, 0.5),
    pytest.param({"pipeline": 2}, 0.6, marks=pytest.mark.slow),
    ({"tensor": 2}, 0.75),
]  # a stage has 702 of 1137; no norm is cut


@pytest.mark.parametrize(("plan", "share"), HALF, ids=str)
def test_a_process_holds_its_part_only(plan, share, trainers, make):
    job = make("Held", plan=plan, **PLAIN)
    trainers("Held", 2).run(job)
    total, count = trainers("Held", 2).run(replace(job, kind="evaluate")).metrics["accuracy"]
    whole = sum(p.numel() for p in load_task(f"{TASKS}:Held", {}).model().parameters())
    assert 0.3 * whole < total / count < share * whole + 40


@pytest.mark.parametrize("plan", [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}], ids=name)
def test_an_overflow_on_one_process_makes_all_leave_the_step_out(plan, trainers, make):
    fault = {"fault": "inf on rank 1"}
    job = make("Deep", fault, plan, precision="fp16", **PLAIN)
    assert trainers("Deep", 2, **fault).run(job).steps == 0
    update = tensors(job.update)
    assert all(t.abs().max() == 0 for t in update.values() if t.is_floating_point())


@pytest.mark.slow
def test_plans_may_change_from_job_to_job_and_the_same_one_gives_the_same_bytes(trainers, make):
    trainer, job = trainers("Deep", 2, dropout=0.5), make("Deep", {"dropout": 0.5}, **HARD)
    found = {}
    for plan in [{"shard": 2}, {"pipeline": 2}, {"data": 2}, {"shard": 2}, {"pipeline": 2}]:
        trainer.run(replace(job, parallel=Parallel(**plan)))
        assert found.setdefault(str(plan), job.update.read_bytes()) == job.update.read_bytes()
    assert len({*found.values()}) == 3


REFUSED = [
    ({"shard": 2, "offload": True}, {}, "there is no GPU: set offload = false"),
    ({"shard": 3}, {}, r"parallel.shard = 3 needs as many processes, and this site has 2"),
    ({"data": 2, "tensor": 2}, {}, r"parallel.data = 2 \* parallel.tensor = 2 needs 4 processes, and this site has 2"),
    ({"shard": 2}, {"optimizer": "Adafactor"}, "'Adafactor' looks at whole weights.* use one of ASGD"),
    ({"tensor": 2}, {"dp": Dp(mode="local")}, "spread the data only"),
    ({"shard": 2}, {"algorithm": "scaffold"}, 'strategy.name = "scaffold" needs the whole model'),
    ({"tensor": 2}, {"distill": {"weight": 1.0}}, "train.distill needs the whole model"),
    ({"pipeline": 2}, {"compile": True}, "train.compile needs the whole model"),
    ({"shard": 2}, {"qat": True}, "train.qat needs the whole model"),
    ({"shard": 2}, {"keep_zeros": True}, "train.keep_zeros needs the whole model"),
]


@pytest.mark.parametrize(("plan", "settings", "words"), REFUSED, ids=str)
def test_a_plan_that_cannot_work_is_refused_before_a_process_starts(plan, settings, words, make, tmp_path, monkeypatch):
    monkeypatch.setattr("murmur.clients.trainer.gpu_count", lambda: 0)
    job = make("Deep", plan=plan, **settings)
    with Trainer(f"{TASKS}:Deep", {}, processes=2, workdir=tmp_path) as trainer:
        with pytest.raises(OperatorError, match=words):
            trainer.run(job)
        assert trainer.pids == ()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"offload": True}, "set shard to 2 or more"),
        ({"pipeline": 2, "schedule": "zero-bubble", "activation_checkpoint": True}, 'set schedule = "1f1b"'),
        ({"shard": 2, "reduce": "bf16"}, 'reduce = "bf16" is between processes that have the whole model each'),
    ],
    ids=str,
)
def test_a_plan_that_never_works_is_no_plan(plan, words):
    with pytest.raises(ValueError, match=words):
        Parallel(**plan)


@pytest.mark.parametrize(
    ("task", "plan", "words"),
    [
        ("Normed", {"pipeline": 2}, "use GroupNorm or LayerNorm, or parallel.shard"),
        ("Normed", {"pipeline": 2, "schedule": "interleaved"}, "use GroupNorm"),
        ("Shaped", {"pipeline": 2}, "not a Sequential: give the task stages"),
        (
            "Drawn",
            {"pipeline": 2, "schedule": "interleaved"},
            "a chain of 2 layers, and this plan needs 4 stages",
        ),
        ("Drawn", {"tensor": 2}, "found no layer to cut"),
        ("Tokens", {"pipeline": 2}, "'embed.weight' of the model is needed in two stages"),
        ("PartlyFrozen", {"pipeline": 2}, "stage 0 of the pipeline has nothing to train"),
        ("AtHome", {"tensor": 2}, "nothing stays at the site, and this task has a local"),
        ("TwoSets", {"pipeline": 2}, "join several with torch.utils.data.ConcatDataset"),
    ],
)
def test_a_model_that_does_not_fit_the_plan_is_refused_in_words(task, plan, words, make, trainers):
    with pytest.raises(OperatorError, match=words):
        trainers(task, 2).run(make(task, plan=plan))


EACH = [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}]


@pytest.mark.parametrize("plan", EACH, ids=name)
def test_adapters_of_a_frozen_base_equal_those_of_one_process(plan, compare):
    assert compare("Tuned", plan, 2, **HARD) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*EACH, {"shard": 2, "activation_checkpoint": True}], ids=name)
def test_a_mapped_base_and_frozen_layers_are_split_as_well(plan, compare, tmp_path):
    save_file({n: t.clone() for n, t in built(load_task(f"{TASKS}:Deep", {})).state_dict().items()}, tmp_path / "base")
    assert compare("Tuned", plan, 2, {"base": str(tmp_path / "base")}, **HARD) <= 1e-6
    if "pipeline" not in plan:
        assert compare("PartlyFrozen", plan, 2, **HARD) <= 1e-6


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        ("Forked", {"shard": 2}),
        pytest.param("Forked", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("TwoSets", {"shard": 2}, marks=pytest.mark.slow),
        pytest.param("TwoSets", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("Streamed", {"shard": 2}, marks=pytest.mark.slow),
        pytest.param("Streamed", {"tensor": 2}, marks=pytest.mark.slow),
        ("Streamed", {"pipeline": 2}),
    ],
    ids=str,
)
def test_several_data_sets_and_streams_train_a_split_model_as_one_process(task, plan, compare):
    assert compare(task, plan, 2, **HARD) <= 1e-6


@pytest.mark.parametrize(
    "more", [{"data": 2}, {"data": 0}, {"data": 1, "shard": 2}, {"data": 1, "tensor": 2}], ids=name
)
def test_zero_bubble_goes_with_nothing_else(more):
    # Sharded, its update was off by a few per cent of the loss on torch 2.13: what is refused here is not what is slow.
    with pytest.raises(OperatorError, match='or schedule = "interleaved"'):
        Parallel(pipeline=2, schedule="zero-bubble", **more).world(4)
    assert Parallel(pipeline=2, schedule="zero-bubble", data=1).world(4) == 2


def test_a_site_that_has_more_processes_makes_more_replicas():
    assert Parallel(shard=2).world(7) == 6
    assert Parallel(data=1, shard=2, tensor=2).world(7) == 4
    assert Parallel().world(7) == 7


@pytest.mark.parametrize(
    "plan",
    [
        {"shard": 2},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=name,
)
def test_a_killed_rank_ends_the_job_and_the_next_one_ends_in_the_same_bits(plan, make, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("MURMUR_TEST_MARK", str(mark))
    fault = {"fault": "killed late", "dropout": 0.3}
    settings = {"batch_size": 16, "epochs": 8, "lr": 0.01, "optimizer": "AdamW", "mu": 0.1, "precision": "fp16"}
    settings["micro_batch"] = 8
    job = make("Deep", fault, plan, **settings)
    with Trainer(f"{TASKS}:Deep", fault, processes=2, workdir=tmp_path) as trainer:
        mark.touch()  # undisturbed
        undisturbed = trainer.run(job)
        wanted = job.update.read_bytes()
    mark.unlink()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with Trainer(f"{TASKS}:Deep", fault, processes=2, workdir=tmp_path) as trainer:
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            trainer.run(job)
        assert trainer.pids == ()
        told = []
        result = trainer.run(job, told.append)
    assert mark.exists() and told[0].step > 3
    assert job.update.read_bytes() == wanted
    assert (result.metrics, result.steps) == (undisturbed.metrics, undisturbed.steps)


def test_a_checkpoint_of_another_plan_is_not_used(make, tmp_path, trainers, caplog):
    job = make("Deep", plan={"shard": 2}, **PLAIN, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    trainers("Deep", 2).run(job)
    assert [*(tmp_path / "kept").glob("*.0.*.safetensors")]
    told = []
    trainers("Deep", 2).run(replace(job, parallel=Parallel(pipeline=2)), told.append)
    assert told[0].step == 1
