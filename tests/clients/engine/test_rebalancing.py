"""Stages of a pipeline that are cut anew between rounds, by what they took."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import pytest
import torch
from torch import nn

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.rebalancing import Stopwatch, better, layer_costs
from murmur.clients.engine.state import initial_model
from murmur.clients.job import Job
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer
from murmur.protocol.sections import Parallel, Train

from .conftest import tensors

LOPSIDED = f"{Path(__file__).with_name('plan_tasks.py')}:Lopsided"


@pytest.mark.parametrize(
    ("costs", "cuts", "found"),
    [
        ([1, 1, 1, 1], [0, 1, 4], [0, 2, 4]),  # 3 of 4 in the second stage: 1.5 times the mean, and 2 is better
        ([4, 1, 1, 1], [0, 1, 4], None),  # 4 of 7 is 1.14 times the mean
        ([2, 1], [0, 1, 2], None),  # 1.33 times the mean, and there is no other cut
        ([9, 8, 1, 1], [0, 1, 3, 4], None),  # 1.42 times the mean, and 9 stays the longest wherever one cuts
        ([1e-4, 1e-4, 1e-4, 1e-4], [0, 1, 4], None),  # as the first, but nobody waits long
    ],
)
def test_layers_move_where_a_stage_is_much_too_long_and_another_cut_is_better(costs, cuts, found):
    assert better(costs, cuts) == found


def test_a_layer_takes_its_forward_passs_share_of_all_that_its_stage_does():
    medians = {("layer", 0): 1.0, ("layer", 1): 3.0, ("forward", 0): 4.5, ("backward", 0): 9.0, ("weights", 0): 2.5}
    assert layer_costs(medians, [0, 2, 3]) == [4.0, 12.0, 0.0]  # 16 s in proportion 1 : 3; the last is elsewhere


def test_a_stopwatch_gives_the_median_of_passes_that_are_differentiated():
    class Sleeps(nn.Module):
        def forward(self, seconds):
            sleep(seconds)
            return seconds

    watch, layer = Stopwatch(torch.device("cpu")), Sleeps()
    watch.watch("layer", layer)
    with torch.no_grad():
        layer(0.0)
    for seconds in (0.2, 0.02, 0.02):
        layer(seconds)
    assert 0.02 <= watch.medians()["layer"] < 0.2
    watch.forget()
    assert watch.medians() == {}


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gpipe", "zero-bubble", "interleaved"))]
)
def test_a_lopsided_model_is_cut_anew_once_and_trains_as_in_one_process(schedule, tmp_path):
    task = load_task(LOPSIDED, {})
    initial_model(task, 7, tmp_path / "model")
    job = Job(
        id="job", kind="train", model=tmp_path / "model", update=tmp_path / "update", mu=0.5, metrics=("loss",),
        train=Train(batch_size=32, lr=0.1), seed=3, round=1, client="north",
        parallel=Parallel(pipeline=2, schedule=schedule),
    )  # fmt: skip
    run_job(task, job)
    alone, logged = tensors(job.update), tmp_path / "log"
    moved = []
    with Trainer(LOPSIDED, {}, processes=2, workdir=tmp_path, log_file=logged) as trainer:
        for _ in range(3):
            trainer.run(job)
            moved.append(logged.read_text().count("pipeline stages move"))
            ours = tensors(job.update)
            assert max(float((ours[n] - alone[n]).abs().max()) for n in alone) <= 1e-6
    print(logged.read_text())
    if schedule in ("interleaved", "zero-bubble"):  # four stages: two of them lie where they should
        assert moved[-1] <= 1
    else:
        assert moved == [1, 1, 1]
        assert "cut_before='[0, 1, 6]' cut_after='[0, 3, 6]'" in logged.read_text()
