"""Models as files and back, and the file of an update: trained minus incoming, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ...protocol.errors import BadUpdate, OperatorError
from ...protocol.tensors import Layout, TensorSpec, check_file, read_layout, write_chunks
from ..task import Task
from .randomness import derive_seed, seeded

CHUNK = 1 << 18  # elements that are converted at a time: 1 MiB of F32, so that a large embedding is never held twice
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `module.state_dict()`, detached but not copied, tied ones under their first name only.

    Raises OperatorError for what cannot travel: extra state that is no tensor, tensors that overlap in part, dtypes
    without a name on the wire.
    """
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise OperatorError(f"{name!r} of the model's state is a {type(value).__name__}; only tensors can travel")
        if value.dtype not in NAMES:
            raise OperatorError(f"{name!r} of the model is {value.dtype}; these travel: {', '.join(map(str, NAMES))}")
        if "," in name:
            raise OperatorError(f"the name {name!r} has a comma, which separates names in a model's file")
        found[name] = value
    aliases: set[str] = set()
    spans = sorted(((*_span(t), name) for name, t in found.items() if t.numel()), key=lambda span: span[:2])
    order = list(found)
    for (start, end, one), (next_start, next_end, other) in pairwise(spans):
        if next_start >= end:
            continue
        a, b = found[one], found[other]
        if (start, end, a.shape, a.stride(), a.dtype) != (next_start, next_end, b.shape, b.stride(), b.dtype):
            raise OperatorError(f"{one!r} and {other!r} of the model share some of their memory: tie whole tensors")
        aliases.add(max(one, other, key=order.index))
    return {name: tensor for name, tensor in found.items() if name not in aliases}


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def layout_of(module: nn.Module) -> Layout:
    """The layout of this model's file; `buffers` names all its persistent buffers."""
    tensors = named_tensors(module)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    specs = (TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    return Layout(tuple(specs), frozenset(buffers & tensors.keys()))


def write_model(module: nn.Module, path: Path) -> Layout:
    """Write a model as a canonical safetensors file and return its layout; non-persistent buffers stay behind."""
    layout, tensors = layout_of(module), named_tensors(module)
    with _whole(path) as file:
        write_chunks(file, layout, (c for t in layout.tensors for c in tensor_bytes(tensors[t.name])))
    return layout


def read_model(module: nn.Module, path: Path) -> Layout:
    """Copy a file's tensors into the model and return the layout.

    Raises BadUpdate when the file is not a canonical model file, OperatorError when it holds another model than this
    one: names, shapes and dtypes must agree exactly, nothing is filled in.
    """
    read_layout(path)
    layout = layout_of(module)
    try:
        check_file(path, layout)
    except BadUpdate as error:
        raise OperatorError(
            f"the run's model does not fit the task's: {error.detail}. "
            "Every client needs the version of the task, with the options, that the run was started with"
        ) from None
    incoming = map_tensors(path, layout)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            tensor.copy_(incoming[name])
    return layout


def initial_model(task: Task, seed: int, path: Path) -> Layout:
    """Write the model that a run starts from, the same for the same seed."""
    with seeded(derive_seed("initial", seed), torch.device("cpu")):
        module = task.model()
    return write_model(module, path)


def map_tensors(path: Path, layout: Layout) -> dict[str, Tensor]:
    """A checked file's tensors over the mapped file: pages are read when touched, writing changes a private copy."""
    offset = len(layout.header())
    raw = torch.from_file(str(path), shared=False, size=layout.file_bytes, dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for t in layout.tensors:
        found[t.name] = raw[offset : offset + t.nbytes].view(TYPES[t.dtype]).view(t.shape)
        offset += t.nbytes
    return found


def write_update(trained: Mapping[str, Tensor], model: Path, path: Path) -> Layout:
    """Write trained minus incoming as `Layout.update()` lays it out: F32 (F64 stays), I64, without BOOL.

    trained: by name, as `named_tensors` gives them. model: the file that training started from; it is mapped, so
    nothing more than a chunk is held beside the model.
    Raises OperatorError, and writes nothing, when a value is not finite: such an update could not be counted.
    """
    before = read_layout(model)
    incoming, layout = map_tensors(model, before), before.update()

    def chunks() -> Iterator[memoryview]:
        for t in layout.tensors:
            wire = TYPES[t.dtype]
            pairs = zip(_split(trained[t.name]), _split(incoming[t.name]), strict=True)
            for after_D, before_D in pairs:
                delta_D = after_D.cpu().to(wire) - before_D.to(wire)
                if not delta_D.isfinite().all():
                    raise diverged(t.name)
                yield from tensor_bytes(delta_D)

    with _whole(path) as file:
        write_chunks(file, layout, chunks())
    return layout


def diverged(name: str) -> OperatorError:
    """What is said of an update whose tensor of this name is not finite."""
    return OperatorError(
        f"training ended in NaN or infinity ({name!r}): lower train.lr, set train.clip_norm, "
        "or look for such values in the data"
    )


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.detach().reshape(-1).split(CHUNK) if tensor.numel() else ()


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes as a file takes them, a chunk at a time."""
    for chunk_D in _split(tensor):
        yield chunk_D.cpu().contiguous().view(torch.uint8).numpy().data


@contextmanager
def _whole(path: Path) -> Generator[BinaryIO]:
    """A file that gets its name only when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
