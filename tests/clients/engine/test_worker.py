from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from murmur.clients.engine.worker import failure
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError

TASKS = Path(__file__).with_name("sample_tasks.py")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_lost_peer_is_told_apart_from_an_error_of_ones_own():
    lost = raised(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"))
    assert failure(lost, world=2)["echo"]
    assert failure(raised(dist.DistBackendError("NCCL communicator was aborted on rank 0")), world=2)["echo"]
    assert not failure(lost, world=1)["echo"]
    assert not failure(raised(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), world=2)["echo"]
    assert not failure(raised(LookupError("the connection closed file is missing")), world=2)["echo"]


def test_our_errors_travel_as_they_are_and_others_with_the_end_of_their_traceback():
    told = failure(raised(OperatorError("set this to that")), world=1)
    assert told == {"problem": OperatorError("set this to that").problem()}
    told = failure(raised(ValueError("x" * 10_000)), world=1)
    assert (told["kind"], len(told["detail"])) == ("ValueError", 3000)


def test_what_gloo_says_when_a_peer_is_killed_is_known_for_an_echo(make_job, tmp_path, monkeypatch):
    job = make_job(batch_size=16, epochs=2000)
    with Trainer(f"{TASKS}:Rows", {}, processes=2, workdir=tmp_path) as trainer:
        trainer.run(replace(job, kind="evaluate"))
        group = trainer._group
        assert group is not None
        group.send({"job": job.to_json()})
        heard = []
        while not any("progress" in message for _, message in heard):
            heard += group.hear(1.0)
        os.kill(trainer.pids[1], signal.SIGKILL)
        while not any(rank == 0 and "failed" in message for rank, message in heard):
            heard += group.hear(1.0)
        told = next(message["failed"] for rank, message in heard if rank == 0 and "failed" in message)
        print(told["detail"][-300:])
        assert told["echo"]


def test_an_error_in_loading_the_task_reaches_the_caller(make_job, tmp_path):
    with (
        Trainer(f"{TASKS}:Rows", {"surprise": 1}, processes=2, workdir=tmp_path) as trainer,
        pytest.raises(OperatorError, match=r"unexpected keyword argument 'surprise'. It takes: n, test"),
    ):
        trainer.run(make_job())


def test_an_error_outside_the_task_names_its_kind(make_job, tmp_path):
    job = make_job()
    job.model.unlink()
    with (
        Trainer(f"{TASKS}:Rows", {}, workdir=tmp_path) as trainer,
        pytest.raises(TrainerFailed, match="FileNotFoundError") as caught,
    ):
        trainer.run(job)
    assert caught.value.kind == "FileNotFoundError"
