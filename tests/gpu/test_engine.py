"""The engine on a CUDA device: the same weights as on the CPU, and the aims of the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import map_tensors
from murmur.protocol.tensors import read_layout

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The update of a small CNN trained on a device, and the size of its largest value."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import engine, engine_tasks

    task = engine_tasks.SmallCnn(200)
    job = engine.make_job(task, tmp_path, batch_size=64, epochs=2, lr=0.05)

    def train(device, *, mu=0.0, **settings):
        changed = replace(job, mu=mu, train=job.train.model_copy(update=settings))
        run_job(task, changed, session=Session(Ranks.alone(device)))
        return {name: t.clone() for name, t in map_tensors(job.update, read_layout(job.update)).items()}

    return train


def apart(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 1e-4),
        ({"mu": 0.5}, 1e-4),
        ({"micro_batch": 16}, 1e-4),
        ({"precision": "fp16"}, 1e-2),
        ({"precision": "bf16"}, 1e-2),
        ({"compile": True}, 1e-4),
    ],
    ids=str,
)
def test_a_gpu_trains_to_the_weights_of_a_cpu(settings, limit, trained, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = trained("cpu", **({"mu": settings["mu"]} if "mu" in settings else {}))
    assert apart(trained("cuda:0", **settings), exact) <= limit < apart(exact, {n: t * 0 for n, t in exact.items()})


def test_pieces_get_smaller_until_the_cards_memory_is_enough(trained, caplog):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(80e6 / total)  # activations of 64 images alone take 39 MB twice over
    try:
        found = trained("cuda:0", batch_size=200, micro_batch="auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    sizes = [r.micro_batch for r in caplog.records if "memory ran out" in r.message]
    assert sizes, "80 MB were enough"
    assert apart(found, trained("cuda:0", batch_size=200, micro_batch=sizes[-1])) <= 1e-6


def test_the_aims_on_this_card_are_met(tmp_path):
    command = [sys.executable, "-m", "benchmarks.engine", "--only", "gpu", "--json", "--dir", str(tmp_path)]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=1))
    assert [row["name"] for row in found["aims"] if not row["met"]] == []
