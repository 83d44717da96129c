"""The adapter for Flower's ClientApp. Its app fits y = 2 x to x = 1 … 4: a step takes w to w - lr 15 (w - 2)."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import initial_model
from murmur.clients.flower_state import read_state, write_state
from murmur.clients.job import Cancelled, Job, Progress
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Train

APPS = Path(__file__).with_name("flower_apps.py")
APP = f"flower:{APPS}:app"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """From w = 0, one step of lr 0.01: w becomes 0.3."""
    initial_model(load_task(APP, {"initial": f"{APPS}:FIRST"}), 0, tmp_path / "model")
    return Job(
        id="job",
        kind="train",
        model=tmp_path / "model",
        update=tmp_path / "update",
        train=Train(lr=0.01, epochs=1),
        mu=0.0,
        metrics=("loss",),
        seed=3,
        round=5,
        client="north",
    )


def test_an_update_is_what_the_app_trained_minus_what_came(job: Job):
    result = run_job(load_task(APP, {}), job)
    assert load_file(job.update)["weight"].item() == pytest.approx(0.3, rel=1e-6)
    assert (result.examples, result.steps) == (4, 1)
    assert result.metrics["train_loss"] == (0.0, 4.0)
    # of the version that came, which round 4 had made, over 2 examples: mean of 4 x^2 is 30
    assert result.metrics["eval_loss"] == result.metrics["loss"] == (60.0, 2.0)
    assert result.metrics["server-round"] == (8.0, 2.0)


def test_an_evaluation_trains_nobody(job: Job):
    result = run_job(load_task(APP, {}), replace(job, kind="evaluate"))
    assert (result.update, result.examples, result.steps) == (None, 2, 0)
    assert not job.update.exists() and not job.own_after.exists()


def test_the_sites_configuration_takes_the_place_of_the_recipes(job: Job):
    task = load_task(APP, {"config": {"lr": 0.02}, "run_config": {"local-epochs": 2}, "metrics": {"loss": "rounds"}})
    result = run_job(task, job)
    assert load_file(job.update)["weight"].item() == pytest.approx(0.6 + 0.3 * 1.4, rel=1e-6)
    assert result.steps == 2
    assert result.metrics["loss"] == result.metrics["rounds"] == (0.0, 2.0) != result.metrics["eval_loss"]


def test_what_the_app_keeps_goes_to_its_next_job_through_a_file(job: Job, tmp_path: Path):
    task = load_task(APP, {})
    run_job(task, job)
    kept = job.own_after.rename(tmp_path / "kept")
    result = run_job(task, replace(job, round=6, own=kept))
    assert result.metrics["rounds"] == (2.0, 2.0)
    assert read_state(job.own_after)["seen"]["rounds"] == [5, 6]
    run_job(task, replace(job, round=6, own=kept))  # tried again: it begins from the same
    assert read_state(job.own_after)["seen"]["rounds"] == [5, 6]


def test_a_state_is_read_as_it_was_written(tmp_path: Path):
    state = RecordDict(
        {
            "numbers": MetricRecord({"a": 1, "b": [0.1, float("inf")]}),
            "heads": ArrayRecord(
                {"z": Array(np.float16([[1, 2]])), "a": Array(np.array(3.5)), "e": Array(np.empty(0))}
            ),
            "words": ConfigRecord({"s": "ü", "raw": b"\0\xff", "raws": [b"", b"x"], "on": True, "none": []}),
            "empty": ArrayRecord(),
        }
    )
    write_state(tmp_path / "state", state)
    again = read_state(tmp_path / "state")
    assert [*again] == [*state] and [*again["heads"]] == ["z", "a", "e"]
    assert again == state
    assert again["heads"]["a"].numpy().shape == ()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error", "answered train with error 7: no data today"),
        ("nothing", "train function gave a NoneType, not a Message"),
        ("no weight", "must answer train with one MetricRecord that has 'num-examples'"),
        ("half an example", "num-examples = 0.5: a whole number"),
        ("no example", "trained on no example"),
        ("no arrays", "one ArrayRecord, and not with 0"),
        ("another name", "'bias' is in one of them only"),
        ("another shape", r"'weight' as \[1, 2\], it came as \[1, 1\]"),
        ("not finite", r"NaN or infinity \('weight'\)"),
    ],
)
def test_an_answer_that_no_update_can_be_made_of_is_refused_with_words(job: Job, fault: str, words: str):
    with pytest.raises(OperatorError, match=words):
        run_job(load_task(APP, {"node_config": {"fault": fault}}), job)
    assert not job.update.exists()


def test_local_differential_privacy_is_refused_before_anything_is_charged(job: Job):
    private = replace(job, kind="inspect", dp=Dp(mode="local"))
    with pytest.raises(OperatorError, match="a Flower app trains by itself"):
        run_job(load_task(APP, {}), private)


def test_a_model_in_bfloat16_is_refused(job: Job):
    save_file({"weight": torch.zeros(1, 1, dtype=torch.bfloat16)}, job.model)
    with pytest.raises(OperatorError, match="'weight' in BF16"):
        run_job(load_task(APP, {}), job)


def test_a_list_of_arrays_keeps_its_order(job: Job):
    """Their names are 0 … 11, which a file sorts as words."""
    task = load_task(f"flower:{APPS}:many", {"initial": f"{APPS}:twelve"})
    initial_model(task, 0, job.model)
    assert run_job(task, job).metrics == {}  # it has no evaluate function, and says nothing of its training
    assert {int(name): t.item() for name, t in load_file(job.update).items()} == {n: n for n in range(12)}


@pytest.mark.parametrize(
    ("initial", "words"),
    [("", "--option initial="), (f"{APPS}:EMPTY", "gave a dict"), (f"{APPS}:raises", "TypeError")],
    ids=["none", "empty", "one that fails"],
)
def test_what_a_run_cannot_start_from_is_refused_with_words(tmp_path: Path, initial: str, words: str):
    with pytest.raises(OperatorError, match=words):
        initial_model(load_task(APP, {"initial": initial}), 0, tmp_path / "model")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (f"flower:{APPS}:net", "not a flwr.clientapp.ClientApp"),
        (f"flower:{APPS}:old", "made with client_fn, Flower's old kind"),
        (f"flower:{APPS}:missing", "there is no 'missing'"),
        ("flower:no.such.module:app", "there is no module 'no'"),
        ("flower:/nowhere", "neither package.module:app nor an app's folder"),
    ],
)
def test_an_app_that_is_none_is_refused_with_words(reference: str, words: str):
    with pytest.raises(OperatorError, match=words):
        load_task(reference, {})


def test_an_option_that_an_app_does_not_take_is_named():
    with pytest.raises(OperatorError, match="node_config, run_config, config, metrics"):
        load_task(APP, {"nodeconfig": {}})


# In the ranks of a trainer


def test_every_rank_gets_the_message_and_rank_0_answers(job: Job, tmp_path: Path):
    """Two ranks under DDP: the mean of their gradients is that of all four rows, and 4 and not 5 examples count."""
    with Trainer(APP, {}, processes=2, workdir=tmp_path) as trainer:
        result = trainer.run(job)
        assert load_file(job.update)["weight"].item() == pytest.approx(0.3, rel=1e-6)
        assert (result.examples, result.metrics["train_loss"]) == (4, (4.0, 4.0))  # 1.0, over 4
        kept = job.own_after.rename(tmp_path / "kept")
        assert trainer.run(replace(job, id="next", own=kept)).metrics["rounds"] == (2.0, 2.0)


def test_what_an_app_raises_is_a_failed_job_with_the_end_of_its_traceback(job: Job, tmp_path: Path):
    options = {"node_config": {"fault": "raises"}}
    with Trainer(APP, options, workdir=tmp_path) as trainer, pytest.raises(TrainerFailed) as failed:
        trainer.run(job)
    assert failed.value.kind == "LookupError"
    assert "flower_apps.py" in failed.value.detail and failed.value.detail.endswith("the drawer is empty")


def test_an_app_is_alive_while_it_steps_and_is_stopped_at_a_step(job: Job, tmp_path: Path):
    signs: list[Progress] = []
    with Trainer(APP, {"node_config": {"fault": "never ends"}}, workdir=tmp_path) as trainer:

        def on_progress(progress: Progress) -> None:
            signs.append(progress)
            if len(signs) == 2:
                threading.Thread(target=trainer.cancel).start()

        began = time.monotonic()
        with pytest.raises(Cancelled, match="of the app's steps"):
            trainer.run(job, on_progress)
        pids = trainer.pids
        assert pids, f"the ranks were killed after {time.monotonic() - began:.0f} s"
    assert [(sign.step, sign.steps) for sign in signs[:2]] == [(1, 0), (2, 0)]


def test_telemetry_is_off():
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
