"""What a process holds of a model that is sharded over two: anonymous memory above what it had before, in models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import initial_model, write_update
from murmur.clients.job import Job
from murmur.protocol.sections import Parallel, Train

from .report import Figure

WIDTH = 1000
QUICK, FULL = 5, 100  # layers of 4 MB


class Deep:
    """So many layers of a million weights, in blocks of one."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [*model.children()]

    def data(self, split: str) -> TensorDataset | None:
        rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
        return TensorDataset(rows, rows) if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()


class Watched:
    """The most anonymous memory of this process, over what it has at the start; looked at every 2 ms.

    Pages of mapped files are not in it: they are one in the machine and can be dropped.
    """

    def __init__(self) -> None:
        self.before = self.most = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, _anonymous())

    def of(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Bytes, and what the work gave."""
        self._thread.start()
        try:
            found = work()
        finally:
            self._over.set()
            self._thread.join()
        return max(self.most, _anonymous()) - self.before, found


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("no RssAnon in /proc/self/status: this is measured on Linux")


def measure(folder: Path, layers: int = FULL) -> list[Figure]:
    """Of the process that has more, in times the model: its part loaded, a step trained, the update written."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        initial_model(Deep(layers), 7, Path(own) / "model")
        command = [sys.executable, "-m", "benchmarks.engine_memory", own, str(layers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ranks = [
            subprocess.Popen([*command, str(r)], env=environment, stdout=subprocess.PIPE, text=True) for r in range(2)
        ]
        told = [json.loads(rank.communicate()[0]) for rank in ranks]
    model = 4 * layers * WIDTH**2
    most = {name: max(one[name] for one in told) / model for name in told[0]}
    said = f"{model / 1e6:.0f} MB over 2 processes (shard = 2), the larger of the two; anonymous memory above the start"
    return [
        Figure(name="memory_loaded", value=most["load"], unit="models", note=said),
        Figure(name="memory_trained", value=most["train"], unit="models", note="with the gradients"),
        Figure(name="memory_gathered", value=most["gather"], unit="models", below=1.0, note=said),
        Figure(name="memory_most", value=most["all"], unit="models", below=1.5, note="a whole job, SGD"),
    ]


def _as_rank(folder: Path, layers: int, rank: int) -> dict[str, float]:
    torch.set_num_threads(1)
    task, session = Deep(layers), Session(Ranks.join(rank, 2, folder / "rendezvous"))
    job = Job(
        id="bench",
        kind="train",
        model=folder / "model",
        update=folder / "update",
        train=Train(batch_size=8, lr=1e-6, steps=1),
        mu=0.0,
        metrics=(),
        seed=3,
        round=1,
        client="bench",
        parallel=Parallel(shard=2),
    )

    def gather() -> None:
        trained = session.trained(job)
        if rank == 0:
            write_update(trained, job.model, job.update)
        session.ranks.sum([0.0])

    start = _anonymous()
    load, _ = Watched().of(lambda: session.load(task, job))
    loaded = _anonymous() - start
    train, _ = Watched().of(lambda: run_job(task, job, session=session))
    after = _anonymous() - start
    gathered, _ = Watched().of(gather)
    return {"load": load, "train": loaded + train, "gather": after + gathered, "all": max(load, loaded + train)}


if __name__ == "__main__":
    print(json.dumps(_as_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
