from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from murmur.clients.engine import checkpoint as module
from murmur.clients.engine.loop import run_job
from murmur.clients.job import Cancelled
from murmur.clients.trainer import Trainer, TrainerFailed

TASKS = Path(__file__).with_name("sample_tasks.py")
ALWAYS = 1e-9  # seconds between two checkpoints: at every step that finds the disk idle
LONG = {"batch_size": 16, "epochs": 3}  # 63 rows: 4 steps an epoch, 12 in all; two batches of the split "test" before
ONE, TWO = "0" * 64, "1" * 64


def stops(after: int):
    """Says yes when it was asked `after` times."""
    asked = iter(range(10_000))
    return lambda: next(asked) == after


@pytest.fixture
def waits(monkeypatch):
    """Each checkpoint is on disk before the next step begins, so that a test knows which one is found."""
    real = module.Checkpoints.write

    def write(self, *args):
        real(self, *args)
        self.close()

    monkeypatch.setattr(module.Checkpoints, "write", write)


def interrupted(task, job, after):
    with pytest.raises(Cancelled):
        run_job(task, job, stop=stops(after))


def resumed(task, job):
    """The job again; gives its result and the number of its first batch."""
    told = []
    return run_job(task, job, report=told.append), told[0].step


MOMENTUM = {"optimizer_options": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}}


@pytest.mark.parametrize("after", [3, 8, 13], ids=lambda n: f"killed after batch {n}")
@pytest.mark.parametrize(
    "settings",
    [
        MOMENTUM,
        {"optimizer": "Adam", "lr": 0.01, "mu": 0.5},
        {"optimizer": "AdamW", "lr": 0.01, "micro_batch": 11, "clip_norm": 0.3},
        {"optimizer": "ASGD", "precision": "fp16"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_a_resumed_job_ends_in_the_same_bits(settings, after, task, make_job, tmp_path, waits):
    job = make_job("Noisy", **LONG, **settings)
    undisturbed = run_job(task("Noisy"), job)
    wanted = job.update.read_bytes()
    job.update.unlink()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    interrupted(task("Noisy"), job, after)
    result, first = resumed(task("Noisy"), job)
    assert job.update.read_bytes() == wanted
    assert (result.metrics, result.steps, result.examples) == (undisturbed.metrics, undisturbed.steps, 63)
    assert first == (after + 1 if after > 2 else 1)


def test_a_job_may_be_interrupted_again_and_again(task, make_job, tmp_path, waits):
    job = make_job("Noisy", **LONG, **MOMENTUM)
    run_job(task("Noisy"), job)
    wanted = job.update.read_bytes()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    for _ in range(4):
        interrupted(task("Noisy"), job, 3)
    assert resumed(task("Noisy"), job)[1] > 3 * 2
    assert job.update.read_bytes() == wanted


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "settings", [MOMENTUM, pytest.param({"optimizer": "Adam", "lr": 0.01}, marks=pytest.mark.slow)], ids=str
)
def test_a_killed_rank_leaves_a_checkpoint_that_ends_in_the_same_bits(
    settings, processes, make_job, tmp_path, monkeypatch
):
    mark = tmp_path / "mark"
    monkeypatch.setenv("MURMUR_TEST_MARK", str(mark))
    options = {"fault": "killed late"}
    mark.touch()  # undisturbed
    job = make_job("Noisy", options, **LONG, **settings)
    with Trainer(f"{TASKS}:Noisy", options, processes=processes, workdir=tmp_path) as trainer:
        undisturbed = trainer.run(job)
        wanted = job.update.read_bytes()
        mark.unlink()
        job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    output = tmp_path / "ranks.log"
    with Trainer(f"{TASKS}:Noisy", options, processes=processes, workdir=tmp_path, log_file=output) as trainer:
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            trainer.run(job)
        told = []
        result = trainer.run(job, told.append)
    assert mark.exists() and job.update.read_bytes() == wanted
    assert (result.metrics, result.steps) == (undisturbed.metrics, undisturbed.steps)
    assert told[0].step > 2 + 1  # behind the evaluation and at least one step
    assert output.read_text().count("training goes on from a checkpoint") == processes


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def kept(task, make_job, tmp_path, waits):
    job = make_job("Rows", **LONG, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    interrupted(task(), job, 8)
    return job


def test_two_files_lie_there_at_most_and_their_names_say_what_they_hold(kept):
    found = files(kept.checkpoint)
    assert [p.name.split(".")[:2] for p in found] == [["000000000005", "0"], ["000000000006", "0"]]
    for path in found:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name.split(".")[2]
    assert len([*kept.checkpoint.iterdir()]) == 2 and kept.checkpoint.stat().st_mode & 0o77 == 0


def test_a_damaged_file_is_deleted_and_the_one_before_it_taken(kept, task, caplog):
    found = files(kept.checkpoint)
    data = bytearray(found[1].read_bytes())
    data[-1] ^= 1
    found[1].write_bytes(data)
    assert resumed(task(), kept)[1] == 2 + 5 + 1
    (ignored,) = (r for r in caplog.records if r.message == "checkpoint ignored")
    assert (ignored.file, ignored.why) == (found[1].name, "it was damaged on disk")
    assert not found[1].exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digest": TWO}, "it is of another job: digest is 000"),
        ({"world": 2}, "it is of another job: world is 1, and here 2"),
        ({"device": "cuda"}, "it is of another job: device is cpu, and here cuda"),
        ({"format": 3}, "it is of another job: format is 2, and here 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_deleted_and_the_job_begins_anew(change, why, kept, task, caplog, monkeypatch):
    real = module.Checkpoints.__init__

    def init(self, *args, **settings):
        real(self, *args, **settings)
        self._job |= change

    monkeypatch.setattr(module.Checkpoints, "__init__", init)
    old = files(kept.checkpoint)
    assert resumed(task(), kept)[1] == 1
    assert [r.why[: len(why)] for r in caplog.records if r.message == "checkpoint ignored"] == [why] * 2
    assert not any(path.exists() for path in old)


@pytest.mark.parametrize("left", [b"", b"x" * 100, b"\xff" * 8])
def test_a_file_that_is_no_checkpoint_is_deleted(left, kept, task, caplog):
    for path in files(kept.checkpoint):
        path.unlink()
    odd = kept.checkpoint / f"000000000007.0.{hashlib.sha256(left).hexdigest()}.safetensors"
    odd.write_bytes(left)
    (kept.checkpoint / ".000000000007.0.tmp").write_bytes(left)
    assert resumed(task(), replace(kept, checkpoint_s=1000.0))[1] == 1
    assert [*kept.checkpoint.iterdir()] == []


def test_a_model_of_another_shape_does_not_take_it(kept, task, make_job):
    other = make_job("Images", **LONG, checkpoint=kept.checkpoint, checkpoint_s=ALWAYS, digest=ONE)
    assert resumed(task("Images"), other)[1] == 1


def test_a_data_set_that_grew_does_not_take_it(kept, task):
    assert resumed(task("Rows", n=64), kept)[1] == 1


def test_a_full_disk_costs_the_checkpoint_and_not_the_job(task, make_job, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_chunks", full)
    job = make_job("Rows", **LONG, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    assert run_job(task(), job).steps == 12
    assert {(r.levelno, r.why) for r in caplog.records if r.message == "checkpoint not written"} == {
        (logging.WARNING, "[Errno 28] No space left on device")
    }
    assert [*job.checkpoint.iterdir()] == []


@pytest.mark.parametrize("settings", [{"checkpoint_s": 0.0}, {"kind": "evaluate"}], ids=str)
def test_nothing_is_kept_where_nothing_is_asked_for(settings, task, make_job, tmp_path):
    run_job(task(), make_job("Rows", **{"checkpoint": tmp_path / "kept", "checkpoint_s": ALWAYS, **settings}))
    assert not (tmp_path / "kept").exists()


def test_a_pace_is_kept(task, make_job, tmp_path, monkeypatch, waits):
    clock = iter(range(10_000))
    monkeypatch.setattr(module, "monotonic", lambda: next(clock) / 10)
    job = make_job("Rows", **LONG, checkpoint=tmp_path / "kept", checkpoint_s=0.35, digest=ONE)
    interrupted(task(), job, 12)
    assert 0 < len(files(job.checkpoint)) <= 2


def test_the_scale_of_fp16_is_kept_and_a_step_that_overflowed_is_not_counted(
    task, make_job, tmp_path, waits, monkeypatch
):
    scales = []
    real = module.Checkpoints._restore

    def restore(self, saved, net, stepper):
        tally = real(self, saved, net, stepper)
        scales.append((stepper.scaler.get_scale(), stepper.taken))
        return tally

    monkeypatch.setattr(module.Checkpoints, "_restore", restore)
    same = task("Rows", fault="inf first")
    job = make_job("Rows", **LONG, precision="fp16", checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    interrupted(same, job, 8)
    assert run_job(same, job).steps == 11
    assert scales == [(65536 / 2, 5)]
