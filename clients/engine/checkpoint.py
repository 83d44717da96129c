"""A training's state on disk, so that a job whose processes were killed goes on, and ends in the same bits.

    <folder>/<step>.<rank>.<SHA-256>.safetensors    one file per rank; rank 0's also holds what all have in common, and
                                                    each rank's all of its own where they train apart

Where the model is split, each rank's file has its part of it, and of the optimizer's state.

A file gets its name when it is on disk whole, and its name says what its bytes must be. A step counts once every rank
has its file of it; the one before is deleted after that. Inside lie tensors, and the tensor `state` is JSON: nothing
is unpickled, and what does not fit the job is deleted and not read on.

Not kept is what a task holds itself, and what draws random numbers in loader processes (`workers`): such a job goes on
as well, with other random choices than the undisturbed one. A task that draws from the global generators of torch,
numpy and Python in the rank itself is bit-identical.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...protocol.errors import BadUpdate
from ...protocol.tensors import Layout, TensorSpec, read_layout, write_chunks
from ..durable import sync_folder
from ..job import Job
from .optimization import Stepper
from .packing import packed, unpacked
from .ranks import Ranks
from .sources import Stream
from .state import NAMES, map_tensors, tensor_bytes

log = logging.getLogger(__name__)

FORMAT = 2  # of the files; another one is not read


class Tensors(Protocol):
    """What is kept of a model: an nn.Module, or a rank's part of one."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(kw_only=True, slots=True)
class Tally:
    """How far a training has come on one rank: batches done, and what was summed up on the way.

    metrics: those of the incoming model, over all ranks, which are measured once, before the first step.
    """

    loss_sum: Tensor
    step: int = 0
    loss_count: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is whole on every rank. own: this rank's tensors; shared: rank 0's, or its own of one apart."""

    step: int
    state: dict[str, Any]
    own: dict[str, Tensor]
    shared: dict[str, Tensor]
    metrics: dict[str, tuple[float, float]]


class Checkpoints:
    """A job's checkpoints on one rank; `find` and `write` are collectives, called by all ranks at the same step.

    Files are written by a thread, from a copy that is taken between two steps: training waits for the copy only. A
    disk that fails costs the checkpoint and never the job.

    parts: each rank has another part of the model, and keeps it itself.
    """

    def __init__(self, job: Job, ranks: Ranks, *, parts: bool = False) -> None:
        self.ranks, self._parts = ranks, parts
        self.on = job.checkpoint is not None and job.checkpoint_s > 0 and job.kind == "train"
        self._folder = job.checkpoint or Path()
        self._every_s = job.checkpoint_s
        self._apart, self._parts = job.parallel.local, parts
        self._job = {"format": FORMAT, "digest": job.digest, "world": ranks.world, "device": ranks.device.type}
        # A site may say these in place of the run, whose settings are what the digest is of.
        self._job |= {"micro_batch": job.train.micro_batch, "parallel": job.parallel.model_dump()}
        self._begun = monotonic()
        self._whole = -1  # the newest step whose file of this rank is on disk
        self._writer: threading.Thread | None = None
        self._saved: Saved | None = None
        self._stream: Stream | None = None
        if self.on:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def _holds_model(self) -> bool:
        """Whether this rank's file holds parameters and what the optimizer knows of them."""
        return self._apart or self._parts or self.ranks.rank == 0

    def due(self) -> bool:
        return monotonic() - self._begun >= self._every_s

    def close(self) -> None:
        """Wait for the file that is being written; nothing touches the folder afterwards."""
        if self._writer is not None:
            self._writer.join()

    # Reading

    def find(self, module: Tensors, examples: int) -> Saved | None:
        """The last step that every rank has whole, None where there is none; all other files are deleted.

        examples: to train on, over all ranks; a data set that grew or shrank since is another job's.
        """
        if not self.on:
            return None
        self._job["examples"] = examples
        mine = {}
        for path in sorted(self._folder.glob(f"*.{self.ranks.rank}.*.safetensors")):
            try:
                mine[int(path.name.split(".")[0])] = self._read(path, module)
            except (BadUpdate, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint ignored", extra={"file": path.name, "why": str(error)})
        step = int(self.ranks.least(max(mine, default=-1)))
        owner = self.ranks.rank if self._parts else 0
        shared = next(iter(self._folder.glob(f"{_number(step)}.{owner}.*.safetensors")), None) if step in mine else None
        found = bool(self.ranks.least(float(shared is not None)))
        for path in self._folder.iterdir() if self.ranks.rank == 0 else ():  # nobody reads the others any more
            if not found or not path.name.startswith(f"{_number(step)}."):
                path.unlink(missing_ok=True)
        if not found or shared is None:
            return None
        self._whole = step
        state, own = mine[step]
        metrics = {name: (float(total), float(count)) for name, (total, count) in state["metrics"].items()}
        common = own if self._apart else map_tensors(shared, read_layout(shared))
        self._saved = Saved(step, state, own, common, metrics)
        return self._saved

    def _read(self, path: Path, module: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != path.name.split(".")[2]:
                raise ValueError("it was damaged on disk")
        tensors = map_tensors(path, read_layout(path))
        state = json.loads(tensors["state"].numpy().tobytes())
        for name, wanted in (self._job | {"rank": self.ranks.rank}).items():
            if state[name] != wanted:
                raise ValueError(f"it is of another job: {name} is {state[name]}, and here {wanted}")
        for name, tensor in _of_rank(module, whole=self._holds_model).items():
            if name not in tensors or tensors[name].numel() * tensors[name].element_size() != tensor.nbytes:
                raise ValueError(f"{name} has another size")
        return state, tensors

    def begin(
        self, module: Tensors, stepper: Stepper, metrics: dict[str, tuple[float, float]], dataset: Dataset[Any]
    ) -> Tally:
        """The tally to begin training with: of nothing, or of what was found, once all is put back to where it was.

        module, stepper: made ready for the first step. metrics: see Tally. dataset: to train on; of a stream that can
        say where it is the place is kept as well.
        """
        saved, self._saved, self._begun = self._saved, None, monotonic()
        self._stream = dataset if isinstance(dataset, Stream) else None
        if self._stream is not None:
            self._stream.resume(_stream_state(saved) if saved is not None else None)
        if saved is not None:
            return self._restore(saved, module, stepper)
        return Tally(loss_sum=torch.zeros((), dtype=torch.float64, device=self.ranks.device), metrics=metrics)

    def _restore(self, saved: Saved, module: Tensors, stepper: Stepper) -> Tally:
        device, state = self.ranks.device, saved.state
        with torch.no_grad():
            for name, tensor in _of_rank(module, whole=True).items():
                found = (saved.own if name.startswith("buffer.") else saved.shared)[name]
                if found.dtype != tensor.dtype:
                    found = found.clone().view(tensor.dtype)  # the copy is aligned, which the file's bytes need not be
                tensor.copy_(found.view(tensor.shape))
        shared = json.loads(saved.shared["state"].numpy().tobytes())
        numbers, host = shared["optimizer"], set(shared["host"])
        for index, parameter in enumerate(stepper.parameters):
            entries = {key: numbers[name] for name in numbers for key in _keys(name, index)}
            for name, tensor in saved.shared.items():
                for key in _keys(name, index):
                    entries[key] = tensor.clone().to("cpu" if name in host else parameter.device)
            if entries:
                stepper.optimizer.state[parameter] = entries
        for name, tensor in stepper.kept.items():
            tensor.copy_(saved.own[f"kept.{name}"])
        stepper.scaler.load_state_dict(shared["scaler"])
        stepper.taken = state["taken"]
        torch.default_generator.set_state(saved.own["random.torch"].clone())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved.own["random.cuda"].clone(), device)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, words, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(words, np.uint32), position, has_gauss, cached))
        total = torch.tensor(state["loss_sum"], dtype=torch.float64, device=device)
        log.info("training goes on from a checkpoint", extra={"rank": self.ranks.rank, "step": saved.step})
        return Tally(step=saved.step, loss_sum=total, loss_count=state["loss_count"], metrics=saved.metrics)

    # Writing

    def write(self, tally: Tally, module: Tensors, stepper: Stepper) -> None:
        """Copy all that decides the rest of the job and write it in the background; called between two steps."""
        self._begun = monotonic()
        idle = self._writer is None or not self._writer.is_alive()
        if not self.ranks.least(float(idle)):
            return  # a disk slower than this pace: the file that is under way is good enough
        whole = int(self.ranks.least(float(self._whole)))
        try:
            tensors, state = self._copy(tally, module, stepper)
        except TypeError as error:  # the same on every rank
            log.warning("this training cannot be kept", extra={"why": str(error)})
            self.on = False
            return
        work = (tally.step, whole, tensors, state)
        self._writer = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._writer.start()

    def _copy(self, tally: Tally, module: Tensors, stepper: Stepper) -> tuple[dict[str, Tensor], dict[str, Any]]:
        device, rank = self.ranks.device, self.ranks.rank
        kind, words, *rest = np.random.get_state()
        state: dict[str, Any] = self._job | {
            "rank": rank,
            "taken": stepper.taken,
            "loss_sum": float(tally.loss_sum),
            "loss_count": tally.loss_count,
            "metrics": tally.metrics,
            "python": random.getstate(),
            "numpy": [kind, [int(w) for w in words], *rest],
        }
        tensors = {"random.torch": torch.default_generator.get_state()}
        if device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
        tensors |= _of_rank(module, whole=self._holds_model)
        tensors |= {f"kept.{name}": tensor for name, tensor in stepper.kept.items()}
        if self._stream is not None and (place := self._stream.state()) is not None:
            try:
                state["stream"], found = packed(place, "stream")
                tensors |= found
            except TypeError as error:
                log.warning("the stream's place is not kept", extra={"why": str(error)})
                self._stream = None
        if self._holds_model:
            numbers: dict[str, Any] = {}
            host: list[str] = []
            for index, parameter in enumerate(stepper.parameters):
                for key, value in stepper.optimizer.state.get(parameter, {}).items():
                    name = f"optimizer.{index}.{key}"
                    if isinstance(value, Tensor):
                        tensors[name] = value
                        host += [name] if value.device.type == "cpu" else []
                    elif isinstance(value, (int, float, str, type(None))):
                        numbers[name] = value
                    else:
                        raise TypeError(f"the optimizer keeps a {type(value).__name__} as {key!r}")
            state |= {"optimizer": numbers, "host": host, "scaler": stepper.scaler.state_dict()}
        return {name: _plain(t.detach().to("cpu", copy=True)) for name, t in tensors.items()}, state

    def _write(self, step: int, whole: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        rank = self.ranks.rank
        temporary = self._folder / f".{_number(step)}.{rank}.tmp"
        began = monotonic()
        try:
            tensors["state"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            layout = Layout(tuple(TensorSpec(n, NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()))
            with temporary.open("wb") as raw:
                file = _Hashing(raw)
                write_chunks(file, layout, (c for t in layout.tensors for c in tensor_bytes(tensors[t.name])))  # pyright: ignore[reportArgumentType]: write() is all that is used
                raw.flush()
                os.fsync(raw.fileno())
            temporary.replace(self._folder / f"{_number(step)}.{rank}.{file.sha256.hexdigest()}.safetensors")
            sync_folder(self._folder)
            self._whole = step
            for path in self._folder.glob(f"*.{rank}.*.safetensors"):
                if int(path.name.split(".")[0]) < whole:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("checkpoint not written", extra={"step": step, "why": str(error)})
            temporary.unlink(missing_ok=True)
        else:
            took_s = round(monotonic() - began, 2)
            log.debug("checkpoint written", extra={"rank": rank, "step": step, "took_s": took_s})


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256, self._file = hashlib.sha256(), file

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def _of_rank(module: Tensors, *, whole: bool) -> dict[str, Tensor]:
    """What a rank's file holds of the model: its own buffers, which differ; parameters only where they are its to keep.

    Those that do not train are where the job begins: in the task's model, or in the version's file.
    """
    found: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}
    if whole:
        split = not isinstance(module, nn.Module)  # a part of a weight has no such mark; it gives those that train
        found |= {f"parameter.{name}": p for name, p in module.named_parameters() if split or p.requires_grad}
    return found


def _stream_state(saved: Saved) -> tuple[int, Any] | None:
    """What the stream of this rank gave as its state; None where it gave none."""
    return unpacked(saved.state["stream"], saved.own) if "stream" in saved.state else None


def _plain(tensor: Tensor) -> Tensor:
    """A tensor that safetensors can name: complex numbers and the like, which only buffers hold, go as their bytes."""
    return tensor if tensor.dtype in NAMES else tensor.contiguous().reshape(-1).view(torch.uint8)


def _keys(name: str, index: int) -> list[str]:
    prefix = f"optimizer.{index}."
    return [name.removeprefix(prefix)] if name.startswith(prefix) else []


def _number(step: int) -> str:
    return f"{step:012}"
