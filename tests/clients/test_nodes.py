"""Ranks that a launcher has started on two "nodes", which are both this machine, as the trainer uses them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors.torch import load_file

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.nodes import serve
from murmur.clients.engine.state import initial_model
from murmur.clients.job import Cancelled, Job
from murmur.clients.nodes import Nodes
from murmur.clients.places import Place
from murmur.clients.processes import PRELOAD
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Parallel, Train

from .conftest import patiently

TASKS = Path(__file__).parent / "engine" / "sample_tasks.py"
ROWS = f"{TASKS}:Rows"
FLOWER = f"flower:{Path(__file__).with_name('flower_apps.py')}:app"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of the trainer, where its ranks find it; pytest's own paths may be too long for a socket."""
    found = tmp_path / "t"
    found.mkdir()
    return found


@pytest.fixture
def make(tmp_path):
    def job(reference=ROWS, options=None, first=None, **settings) -> Job:
        model = tmp_path / "model"
        initial_model(load_task(reference, (options or {}) | (first or {})), 7, model)
        train = Train(batch_size=16, epochs=2, lr=0.1) if reference == ROWS else Train(lr=0.01, epochs=1)
        values = {"train": train, "metrics": ("loss",), "mu": 0.0, "seed": 3, "round": 5, "client": "north"}
        return Job(id="job", kind="train", model=model, update=tmp_path / "update", **(values | settings))

    return job


@pytest.fixture
def ranks(folder):
    """Start two ranks, as two nodes with one each, forked from a server that has torch; all are killed at the end."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "murmur.clients.engine.nodes"])
    started = []

    def start(path=folder / "ranks.sock"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [
            Place(rank=r, world=2, local=0, here=1, node=r, nodes=2, host="127.0.0.1", port=port, start=str(port))
            for r in range(2)
        ]
        processes = [context.Process(target=serve, args=(place, path), daemon=True) for place in places]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def trainer(folder):
    made: list[Trainer] = []

    def get(reference=ROWS, nodes=2, wait_s=300.0, **options) -> Trainer:
        there = Nodes(folder, nodes, "murmur client ranks", wait_s)
        made.append(Trainer(reference, options, workdir=folder, nodes=there))
        return made[-1]

    yield get
    for one in made:
        one.close()


def apart(job, reference=ROWS) -> float:
    """How far the update is from that of one process, and what the latter is."""
    ours = load_file(job.update)
    run_job(load_task(reference, {}), job)
    alone = load_file(job.update)
    assert max(float(t.abs().max()) for t in alone.values()) > 0.01
    return max(float((ours[name] - alone[name]).abs().max()) for name in alone)


def test_two_nodes_equal_one_process_stay_warm_and_end_with_the_agent(make, trainer, ranks):
    job, there, processes = make(), trainer(), ranks()
    told = []
    result = there.run(job, told.append)
    assert (result.examples, result.steps) == (63, 8) and told[-1].step == told[-1].steps
    assert apart(job) <= 1e-6
    first = there.pids
    there.run(replace(job, id="two"))
    with pytest.raises(OperatorError, match="asks for 1 processes, and 2 were started"):
        there.run(replace(job, id="three", parallel=Parallel(data=1)))
    there.run(replace(job, id="four"))
    assert there.pids == first
    there.close()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def test_an_error_on_another_node_reaches_the_agent_and_all_ranks_end(make, trainer, ranks):
    processes = ranks()
    with pytest.raises(TrainerFailed, match="the drawer of rank 1 is empty") as caught:
        trainer(fault="raises on rank 1").run(make())
    assert (caught.value.rank, caught.value.kind) == (1, "LookupError")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]


def test_nodes_with_other_data_are_refused(make, trainer, ranks):
    ranks()
    with pytest.raises(OperatorError, match="62 examples on one process and 63 on another"):
        trainer(fault="fewer on rank 1").run(make())


def test_a_lost_rank_ends_the_job_and_ranks_that_come_again_do_the_next(make, trainer, ranks):
    job, there, processes = make(), trainer(), ranks()
    there.run(job)

    def kill(progress):
        os.kill(processes[1].pid, signal.SIGKILL)

    with pytest.raises(TrainerFailed, match="a process on this client's nodes is gone") as caught:
        there.run(replace(job, id="two", train=Train(epochs=2000, batch_size=16)), kill)
    assert caught.value.killed
    ranks()
    there.run(replace(job, id="three"))
    assert apart(job) <= 1e-6


def test_without_ranks_a_job_fails_in_words_or_is_called_off(make, trainer):
    waits = trainer(wait_s=0.3)
    with pytest.raises(
        OperatorError, match=r"no ranks have come from this client's 2 nodes: start them with murmur cli"
    ):
        waits.run(make())
    waits.close()
    waits = trainer()
    with patiently(waits.cancel), pytest.raises(Cancelled):  # and not that none have come, after minutes
        waits.run(make())


def test_ranks_of_another_number_of_nodes_are_refused(make, trainer, ranks):
    ranks()
    with pytest.raises(OperatorError, match="nodes = 3, and ranks of 2 have come"):
        trainer(nodes=3).run(make())


def test_an_agent_that_dies_and_comes_again_finds_its_ranks(make, folder, trainer, ranks):
    job, first, processes = make(), trainer(), ranks()
    first.run(job)
    # As the kernel does for a process that is killed: first nobody listens, then the link is gone.
    first._nodes._listening.close()
    first._group._link.close()
    second = trainer()
    second.run(replace(job, id="two"))
    assert second.pids == (processes[0].pid,)


def test_every_rank_of_a_flower_app_gets_the_message_and_rank_0_answers(make, trainer, ranks):
    """As with two ranks on one machine: under DDP, four rows count, and w goes from 0 to 0.3."""
    job = make(FLOWER, first={"initial": f"{FLOWER.split(':')[1]}:FIRST"})
    ranks()
    result = trainer(FLOWER).run(job)
    assert load_file(job.update)["weight"].item() == pytest.approx(0.3, rel=1e-6)
    assert (result.examples, result.metrics["train_loss"]) == (4, (4.0, 4.0))


# Started as a user starts them

APART = """
import os
from pathlib import Path
import murmur.clients.engine.nodes as nodes
run_job = nodes.run_job
def told(task, job, **more):
    Path(f"read.{os.environ['RANK']}").write_text(str(job.model))
    return run_job(task, job, **more)
nodes.run_job = told
nodes.Copies._is_shared = lambda self, folder: False
from murmur.cli import app
app()
"""


def slurm(rank: int, job: int) -> dict[str, str]:
    said = {
        "SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_JOB_ID": job,
        "SLURM_NODELIST": "localhost,n[2-3]", "SLURM_TASKS_PER_NODE": "1(x2)",
    }  # fmt: skip
    return os.environ | {name: str(value) for name, value in said.items()}


def client(tmp_path: Path) -> Path:
    """A client's folder; gives that of its trainer."""
    settings = f'name = "a"\ncoordinator = "http://127.0.0.1:1"\nnodes = 2\n[tasks.rows]\nreference = "{ROWS}"\n'
    (tmp_path / "client.toml").write_text(settings)
    workdir = tmp_path / "work" / "trainers" / "rows"
    workdir.mkdir(parents=True)
    return workdir


@pytest.mark.slow
def test_srun_on_nodes_that_do_not_share_a_folder(make, tmp_path):
    workdir, number = client(tmp_path), random.randrange(10_000)
    print("job", number)
    command = [sys.executable, "-c", APART, "client", "ranks", "--dir", str(tmp_path)]
    started = [
        subprocess.Popen(command, env=slurm(rank, number) | {"TMPDIR": str(tmp_path)}, cwd=tmp_path)
        for rank in range(2)
    ]
    job = make(checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with Trainer(ROWS, {}, workdir=workdir, nodes=Nodes(workdir, 2, "srun")) as there:
        assert there.run(job).steps == 8
    assert [process.wait(60) for process in started] == [0, 0]
    assert apart(replace(job, checkpoint=None)) <= 1e-6
    assert [(tmp_path / f"read.{rank}").read_text() == str(job.model) for rank in range(2)] == [True, False]
    assert not [*tmp_path.glob("murmur-*")] and not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again(make, tmp_path, monkeypatch):
    """Two torchruns are two nodes; a rank that kills itself in the first job costs one start of all."""
    workdir = client(tmp_path)
    monkeypatch.setenv("MURMUR_TEST_MARK", str(tmp_path / "mark"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
    launch += ["--max-restarts", "3", "-m", "murmur", "client", "ranks", "--dir", str(tmp_path)]
    started = [subprocess.Popen(launch, cwd=tmp_path, start_new_session=True) for _ in range(2)]
    options = {"fault": "killed once"}
    job = make()
    try:
        with Trainer(ROWS, options, workdir=workdir, nodes=Nodes(workdir, 2, "torchrun")) as there:
            with pytest.raises(TrainerFailed) as caught:
                there.run(job)
            assert caught.value.killed
            assert there.run(replace(job, id="two")).steps == 8
        assert [process.wait(60) for process in started] == [0, 0]
        assert apart(job) <= 1e-6
    finally:
        for process in started:
            process.kill()
