"""The engine on a GPU: what half precision and a static graph bring, what the card achieves, and what a bare loop does.

Figures of a model come in one row each: seconds of a step are what a job of many steps takes longer than one of few,
so that reading the model and writing the update, which do not grow with the steps, are not in them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.job import Job

from .engine_tasks import Gpt2Small, ResNet50
from .report import Figure, note

FEW, MANY = 5, 45  # steps of the two jobs
# Dense bf16 with fp32 accumulation, FLOP/s, as the makers' data sheets have it.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def measure(folder: Path, *, quick: bool, make_job: Callable[..., Job]) -> list[Figure]:
    """GPT-2-small and ResNet-50 on this machine's GPU; where there is none, one figure that says so."""
    if not torch.cuda.is_available():
        note("gpu: left out, torch finds no CUDA device here")
        return [Figure(name="gpu", value=None, unit="", note="torch finds no CUDA device here: not measured")]
    card = torch.cuda.get_device_name()
    figures: list[Figure] = []
    for name, task, batch in (("gpt2", Gpt2Small(256), 32), ("resnet50", ResNet50(512), 128)):
        note(f"{name} on {card} …")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            figures += _model(name, task, card, batch, Path(place), quick=quick, make_job=make_job)
    return figures


def _model(
    name: str, task: Any, card: str, batch: int, folder: Path, *, quick: bool, make_job: Callable[..., Job]
) -> list[Figure]:
    few, many = (1, 3) if quick else (FEW, MANY)
    job = make_job(task, folder, batch_size=batch, steps=few, precision="bf16")
    seconds: dict[str, float] = {}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    first_s = 0.0
    for label, settings in (("fp32", {"precision": "fp32"}), ("bf16", {}), ("compiled", {"compile": True})):
        session = Session(Ranks.alone("cuda:0"))

        def took_s(steps: int, settings: dict[str, Any] = settings, session: Session = session) -> float:
            train = job.train.model_copy(update={"steps": steps, **settings})
            begun = time.perf_counter()
            run_job(task, replace(job, train=train), session=session)
            torch.cuda.synchronize()
            return time.perf_counter() - begun

        first_s = took_s(few)  # of the last: with the compiler's time
        torch.cuda.reset_peak_memory_stats()
        seconds[label] = (took_s(many) - took_s(few)) / (many - few)
        seconds[f"{label} memory"] = torch.cuda.max_memory_allocated() / 1e9
        del session
        torch.cuda.empty_cache()
    bare_s = _bare(task, job, few, many)
    flops = _flops(task, batch)
    achieved = flops / seconds["bf16"]
    said = f"{card}, batches of {batch}, bf16 autocast; (a job of {many} steps less one of {few}) / {many - few}"
    peak = next((value for part, value in PEAK.items() if part in card), None)
    return [
        Figure(name=f"{name}_vs_bare", value=bare_s / seconds["bf16"], unit="x bare", at_least=0.95, note=said),
        Figure(name=f"{name}_amp", value=seconds["fp32"] / seconds["bf16"], unit="x fp32", at_least=2, note="tf32 off"),
        Figure(name=f"{name}_compile", value=seconds["bf16"] / seconds["compiled"], unit="x eager"),
        Figure(
            name=f"{name}_first_compiled", value=first_s, unit="s", note=f"{few} steps, the compiler's time in them"
        ),
        Figure(name=f"{name}_step", value=1e3 * seconds["bf16"], unit="ms"),
        Figure(name=f"{name}_examples", value=batch / seconds["bf16"], unit="/s"),
        Figure(name=f"{name}_tflops", value=achieved / 1e12, unit="TFLOP/s", note="forward and backward, by torch"),
        Figure(name=f"{name}_mfu", value=100 * achieved / peak if peak else None, unit="% of peak", note=card),
        Figure(name=f"{name}_memory", value=seconds["bf16 memory"], unit="GB", note="at most, of torch's allocator"),
        Figure(name=f"{name}_memory_fp32", value=seconds["fp32 memory"], unit="GB"),
    ]


def _bare(task: Any, job: Job, few: int, many: int) -> float:
    """Seconds of a step of a loop written by hand, in the same precision, from the same tensors on the host."""
    device = torch.device("cuda:0")
    model: nn.Module = task.model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.train.lr)
    inputs, target = task.data("train").tensors

    def took_s(steps: int) -> float:
        begun, done, epoch = time.perf_counter(), 0, 0
        while done < steps:
            for batch in epoch_order(job, epoch, len(inputs)).split(job.train.batch_size):
                x, y = inputs[batch].to(device), target[batch].to(device)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = task.loss(model(x), y) / y.numel()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
            epoch += 1
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    took_s(few)
    return (took_s(many) - took_s(few)) / (many - few)


def _flops(task: Any, batch: int) -> int:
    """Of a step, forward and backward, counted by torch over one example."""
    model = task.model().to("cuda:0")
    inputs, target = (t[:1].to("cuda:0") for t in task.data("train").tensors)
    model.eval()  # BatchNorm over one image's last layers is fine, and counts the same
    with FlopCounterMode(display=False) as counter:
        task.loss(model(inputs), target).backward()
    return batch * counter.get_total_flops()
