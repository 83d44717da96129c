"""The training engine against loops written by hand: `python -m benchmarks.engine`. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.local import Proximal
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import initial_model
from murmur.clients.job import Job
from murmur.clients.trainer import Trainer
from murmur.protocol.sections import Train

from . import engine_gpu, engine_memory, engine_tasks
from .report import Figure, document, median, note, print_report

BATCH = 64
PAIRS = 7  # engine and bare loop, one after the other


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured, and where models and updates lie meanwhile."""

    folder: Path
    quick: bool

    @property
    def pairs(self) -> int:
        return 1 if self.quick else PAIRS

    @property
    def steps(self) -> int:
        return 2 if self.quick else 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Of one training: CPU seconds of all threads of this process, and the clock's."""

    cpu_s: float
    wall_s: float


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    scale = Scale(folder=Path(options.dir), quick=options.quick)
    if options.rank is not None:
        print(json.dumps(_as_rank(scale, options.rank, Path(options.rendezvous))))
        return
    torch.set_num_threads(1)  # CPU seconds of threads that share a core say little
    figures: list[Figure] = []
    for name in options.only or PARTS:
        note(f"{name} …")
        figures += PARTS[name](scale)
    print_report(document(figures, folder=scale.folder, quick=scale.quick), options.form)


def make_job(task: Any, folder: Path, **train: Any) -> Job:
    """A training of this task from a fresh model in `folder`."""
    initial_model(task, 7, folder / "model")
    return Job(
        id="bench",
        kind="train",
        model=folder / "model",
        update=folder / "update",
        train=Train.model_validate({"batch_size": BATCH, "lr": 0.01} | train),
        mu=0.0,
        metrics=(),
        seed=3,
        round=1,
        client="bench",
    )


def spent(work: Callable[[], object]) -> Spent:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Spent(cpu_s=time.process_time() - cpu, wall_s=time.perf_counter() - wall)


def bare_loop(model: nn.Module, data: tuple[Tensor, Tensor], job: Job, ranks: Ranks) -> None:
    """The same steps as a script has them; model: wrapped in DDP where there are several ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=job.train.lr)
    inputs, target = data
    model.train()
    done, epoch = 0, 0
    while done < job.train.steps:
        for batch in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
            if done == job.train.steps:
                break
            mine = batch[ranks.rank :: ranks.world]
            loss = nn.functional.cross_entropy(model(inputs[mine]), target[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
        epoch += 1


def pairs(scale: Scale, ranks: Ranks) -> list[tuple[Spent, Spent]]:
    """What the engine and the bare loop spend on the same steps, in turn, in this process."""
    task, session = engine_tasks.SmallCnn(), Session(ranks)
    dataset = task.data("train")
    assert dataset is not None
    data = dataset.tensors[0], dataset.tensors[1]
    model: nn.Module = task.model()
    if ranks.world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        job = make_job(task, Path(folder), steps=scale.steps)
        warm = replace(job, train=job.train.model_copy(update={"steps": 2}))
        run_job(task, warm, session=session)
        bare_loop(model, data, warm, ranks)
        found: list[tuple[Spent, Spent]] = []
        for number in range(scale.pairs):
            engine, bare = lambda: run_job(task, job, session=session), lambda: bare_loop(model, data, job, ranks)
            if number % 2:  # a machine that slows down must not favour either
                second = spent(bare)
                found.append((spent(engine), second))
            else:
                first = spent(engine)
                found.append((first, spent(bare)))
    return found


def _percent(found: list[tuple[Spent, Spent]], what: str) -> float:
    return 100 * (median([getattr(a, what) / getattr(b, what) for a, b in found]) - 1)


def alone(scale: Scale) -> list[Figure]:
    """One process: all of a job, with its model read and its update written, against the bare loop."""
    found = pairs(scale, Ranks.alone("cpu"))
    said = f"{scale.steps} steps of a CNN of 0.42 M parameters, batches of {BATCH}, {scale.pairs} pairs; CPU seconds"
    step_ms = 1e3 * median([b.cpu_s for _, b in found]) / scale.steps
    return [
        Figure(name="overhead", value=_percent(found, "cpu_s"), unit="% over bare", at_most=3, note=said),
        Figure(name="overhead_wall", value=_percent(found, "wall_s"), unit="% over bare"),
        Figure(name="bare_step", value=step_ms, unit="ms", note="CPU"),
    ]


def two(scale: Scale) -> list[Figure]:
    """Two processes over gloo, against DDP by hand in the same two."""
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        command = [sys.executable, "-m", "benchmarks.engine", "--dir", str(scale.folder), *["--quick"] * scale.quick]
        command += ["--rendezvous", f"{folder}/rendezvous", "--rank"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(r)], env=environment, stdout=subprocess.PIPE, text=True) for r in range(2)
        ]
        told = [json.loads(rank.communicate()[0]) for rank in ranks]
    together = [
        tuple(
            Spent(cpu_s=a[which]["cpu_s"] + b[which]["cpu_s"], wall_s=max(a[which]["wall_s"], b[which]["wall_s"]))
            for which in (0, 1)
        )
        for a, b in zip(*told, strict=True)
    ]
    found = [(engine, bare) for engine, bare in together]
    said = f"the same with 2 processes, {BATCH // 2} examples each; CPU seconds of both"
    return [
        Figure(name="overhead_ddp", value=_percent(found, "cpu_s"), unit="% over bare", at_most=5, note=said),
        Figure(name="overhead_ddp_wall", value=_percent(found, "wall_s"), unit="% over bare"),
    ]


def _as_rank(scale: Scale, rank: int, rendezvous: Path) -> list[list[dict[str, float]]]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo between CPUs, also where there is a GPU
    found = pairs(scale, Ranks.join(rank, 2, rendezvous))
    return [[{"cpu_s": s.cpu_s, "wall_s": s.wall_s} for s in pair] for pair in found]


def proximal(scale: Scale) -> list[Figure]:
    """FedProx's pull on the gradients of a step, against a step and against the term in the loss."""
    task = engine_tasks.SmallCnn(BATCH)
    dataset = task.data("train")
    assert dataset is not None
    inputs, target = dataset.tensors
    model = task.model()
    parameters = [*model.parameters()]
    pull = Proximal(dict(model.named_parameters()), 0.1)

    def step() -> None:
        nn.functional.cross_entropy(model(inputs), target).backward()

    def as_loss() -> None:
        pairs = zip(parameters, pull.anchors, strict=True)
        term: Any = sum((p - anchor).square().sum() for p, anchor in pairs)
        (0.05 * term).backward()

    times: dict[str, list[float]] = {"step": [], "pull": [], "loss": []}
    for _ in range(3 if scale.quick else 60):
        for name, work in (("step", step), ("pull", pull.before_step), ("loss", as_loss)):
            times[name].append(spent(work).cpu_s)
    step_s, pull_s, loss_s = (median(times[name]) for name in ("step", "pull", "loss"))
    said = f"0.42 M parameters, batches of {BATCH}; medians of CPU time"
    return [
        Figure(name="prox_cost", value=100 * pull_s / step_s, unit="% of a step", at_most=2, note=said),
        Figure(name="prox_vs_loss", value=loss_s / pull_s, unit="x cheaper", at_least=10, note=said),
        Figure(name="prox_ms", value=1e3 * pull_s, unit="ms"),
        Figure(name="prox_loss_ms", value=1e3 * loss_s, unit="ms"),
    ]


def warm(scale: Scale) -> list[Figure]:
    """What a warm trainer takes for a round beside its steps: the job told, model read, update written, result told."""
    task = engine_tasks.SmallCnn()
    file = Path(engine_tasks.__file__)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        job = make_job(task, Path(folder), steps=1)
        longer = replace(job, train=job.train.model_copy(update={"steps": 5}))
        with Trainer(f"{file}:SmallCnn", {}, processes=1, workdir=Path(folder)) as trainer:
            cold_s = spent(lambda: trainer.run(job)).wall_s
            one, five = [
                [spent(lambda job=job: trainer.run(job)).wall_s for _ in range(2 if scale.quick else 25)]
                for job in (job, longer)
            ]
    step_s = (median(five) - median(one)) / 4
    said = "a job of one step less a step (a quarter of what a job of five takes longer), 25 of each; wall time"
    return [
        Figure(name="between_rounds", value=1e3 * (median(one) - step_s), unit="ms", below=100, note=said),
        Figure(name="first_round", value=1e3 * cold_s, unit="ms", note="with torch loaded and the ranks forked"),
    ]


PARTS: dict[str, Callable[[Scale], list[Figure]]] = {
    "alone": alone,
    "two": two,
    "proximal": proximal,
    "warm": warm,
    "memory": lambda scale: engine_memory.measure(
        scale.folder, engine_memory.QUICK if scale.quick else engine_memory.FULL
    ),
    "gpu": lambda scale: engine_gpu.measure(scale.folder, quick=scale.quick, make_job=make_job),
}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one object on one line")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the page's table")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="every part small: it shows that it runs, not how fast")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where models lie meanwhile [%(default)s]")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # one of the processes of the part `two`
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
