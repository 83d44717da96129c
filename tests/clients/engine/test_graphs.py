from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.session import Session
from murmur.clients.trainer import Trainer
from murmur.protocol.sections import Dp

from .conftest import tensors

TASKS = Path(__file__).with_name("sample_tasks.py")
HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1}  # 63 examples: the last batch of an epoch has 15


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="murmur")
    return lambda: [r for r in caplog.records if r.name.endswith("graphs")]


@pytest.mark.parametrize("options", [{}, {"norm": True, "dropout": 0.3}], ids=str)
def test_a_static_graph_trains_to_the_same_weights_under_the_same_names(options, alone, messages):
    exact, _ = alone(options=options, **HARD, mu=0.5)
    update, result = alone(options=options, **HARD, mu=0.5, compile="aot_eager")
    assert apart(update, exact) <= 1e-6
    assert result.steps == 8
    assert [(r.message, r.backend) for r in messages()] == [("model compiled", "aot_eager")]
    assert messages()[0].took_s > 0


@pytest.mark.slow
def test_two_ranks_train_a_static_graph(make_job, alone, tmp_path):
    exact, _ = alone(**HARD)
    log = tmp_path / "ranks.log"
    with Trainer(f"{TASKS}:Rows", {}, processes=2, workdir=tmp_path, log_file=log) as trainer:
        trainer.run(make_job(**HARD, micro_batch=4, compile="aot_eager"))
    assert apart(tensors(tmp_path / "update"), exact) <= 1e-6
    assert log.read_text().count("model compiled") == 2


def test_a_warm_session_compiles_once_and_trains_plainly_where_it_is_not_asked(task, make_job, messages):
    rows, session, calls = task(), Session(), []
    jobs = [make_job(**HARD, compile=how) for how in ("eager", False, "eager", "aot_eager")]

    def trained(job):
        run_job(rows, job, session=session)
        calls.append(session.module._compiled_call_impl is not None)
        return job.update.read_bytes()

    first, plain, again, _ = map(trained, jobs)
    assert calls == [True, False, True, True]
    assert first == again == plain  # the backend "eager" computes with the same kernels
    assert [r.backend for r in messages()] == ["eager", "aot_eager"]
    run_job(rows, replace(jobs[0], kind="evaluate"), session=session)
    assert session.module._compiled_call_impl is None  # evaluation is not compiled: the same numbers in every round


def test_a_model_that_cannot_be_compiled_trains_as_it_is_and_says_so(task, make_job, alone, messages, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler on this machine\nand a long story")

    exact, _ = alone(**HARD)
    torch._dynamo.reset()  # another test's graph would do
    torch._dynamo.backends.registry.lookup_backend("aot_eager")
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "aot_eager", broken)
    rows, session, job = task(), Session(), make_job(**HARD, compile="aot_eager")
    for _ in range(2):
        run_job(rows, job, session=session)
        assert apart(tensors(job.update), exact) == 0
    (said,) = messages()
    assert (said.levelno, said.message) == (logging.WARNING, "the model could not be compiled and trains as it is")
    assert said.backend == "aot_eager" and "no compiler on this machine" in said.why and "\n" not in said.why


def test_dp_sgd_is_not_compiled_and_says_so(task, make_job, caplog):
    job = make_job(batch_size=16, dp=Dp(mode="local", noise_multiplier=0.0), compile="aot_eager")
    run_job(task(), job)
    assert [r.why for r in caplog.records if r.message == "the model trains as it is"] == [
        "DP-SGD needs gradients by example"
    ]


SECOND = """
    import sys, time
    from pathlib import Path
    from murmur.clients.engine.loop import run_job
    from murmur.clients.engine.state import initial_model
    from murmur.clients.job import Job
    from murmur.clients.task import load_task
    from murmur.protocol.sections import Train

    task, folder = load_task(sys.argv[1], {}), Path(sys.argv[2])
    initial_model(task, 7, folder / "model")
    import torch._inductor.compile_fx
    train = Train(batch_size=16, compile=True)
    job = Job(id="j", kind="train", model=folder / "model", update=folder / "update", train=train, mu=0.0,
              metrics=(), seed=3, round=1, client="north")
    began = time.monotonic()
    run_job(task, job)
    print(time.monotonic() - began)
"""


@pytest.mark.slow
def test_a_second_process_takes_the_compiled_graph_from_the_cache(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def took_s():
        command = [sys.executable, "-c", textwrap.dedent(SECOND), f"{TASKS}:Rows", str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return float(done.stdout)

    cold, warm = took_s(), took_s()
    print(f"cold {cold:.1f} s, warm {warm:.1f} s")
    assert warm < cold / 2 and any((tmp_path / "cache").rglob("*.so"))
