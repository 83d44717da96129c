"""Models as files and back, and the file of an update: trained minus incoming, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ...aggregation.local import controls, with_controls
from ...protocol.errors import BadUpdate, OperatorError
from ...protocol.tensors import FLOATS, Layout, TensorSpec, check_file, read_layout, write_chunks
from ..task import Task, at_home, optional
from .parts import Parts, divide, local_of
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
    first = tensor.data_ptr()
    if tensor.is_meta:  # all of them lie at 0: each storage gets an address space of its own
        first = (tensor.untyped_storage()._cdata << 48) + tensor.storage_offset() * tensor.element_size()  # pyright: ignore[reportPrivateUsage]: its identity has no public name
    return first, first + reach * tensor.element_size()


def parts_of(module: nn.Module, local: Iterable[str] = ()) -> Parts:
    """What of the model travels, is frozen, and stays at the site; local: patterns as of `Task.local`.

    Hashes what is frozen: who needs it more than once keeps it. Raises as `named_tensors` and `divide` do.
    """
    return divide(module, named_tensors(module), local)


def layout_of(module: nn.Module, parts: Parts | None = None) -> Layout:
    """The layout of this model's file: what travels of it; `buffers` names the persistent buffers among that."""
    tensors, parts = named_tensors(module), parts or parts_of(module)
    return _layout_of({name: tensors[name] for name in parts.travels}, parts.buffers, parts.base)


def _layout_of(tensors: Mapping[str, Tensor], buffers: frozenset[str], base: str = "") -> Layout:
    if unknown := next((name for name, t in tensors.items() if t.dtype not in NAMES), None):
        raise OperatorError(
            f"{unknown!r} of the model is {tensors[unknown].dtype}; these travel: {', '.join(map(str, NAMES))}"
        )
    specs = (TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    return Layout(tuple(specs), buffers & tensors.keys(), base)


def write_model(module: nn.Module, path: Path, parts: Parts | None = None) -> Layout:
    """Write what travels of a model as a canonical safetensors file and return its layout."""
    return _write(layout_of(module, parts), named_tensors(module), path)


def _write(layout: Layout, tensors: Mapping[str, Tensor], path: Path) -> Layout:
    with whole_file(path) as file:
        write_chunks(file, layout, (c for t in layout.tensors for c in tensor_bytes(tensors[t.name])))
    return layout


def read_model(module: nn.Module, path: Path, parts: Parts | None = None) -> Layout:
    """Copy a file's tensors into the model and return the layout; control variates beside them stay where they are.

    Raises BadUpdate when the file is not a canonical model file, OperatorError when it holds another model than this
    one, or goes with another base: names, shapes, dtypes and the digest of what is frozen must agree exactly, nothing
    is filled in.
    """
    found = read_layout(path)
    parts = (parts or parts_of(module)).fitting(found)
    layout = layout_of(module, parts)
    expected = check_model(layout, path)
    incoming, tensors = map_tensors(path, expected), named_tensors(module)
    with torch.no_grad():
        for t in layout.tensors:
            tensors[t.name].copy_(incoming[t.name])
    return layout


def check_model(layout: Layout, path: Path) -> Layout:
    """The layout of a file that holds a model of this layout, perhaps with control variates; raises as `read_model`."""
    found = read_layout(path)
    expected = with_controls(layout) if controls(found) else layout
    if found.base != layout.base and replace(found, base=layout.base) == expected:
        raise OperatorError(
            f"the run's frozen base has the SHA-256 {found.base or '(none)'}, this site's {layout.base or '(none)'}: "
            "every site needs the same. Compare the file that the task builds it from, the task's options, and what "
            "the task freezes"
        )
    try:
        check_file(path, expected)
    except BadUpdate as error:
        raise OperatorError(
            f"the run's model does not fit the task's: {error.detail}. "
            "Every client needs the version of the task, with the options, that the run was started with"
        ) from None
    return expected


def initial_model(task: Task, seed: int, path: Path) -> Layout:
    """Write the model that a run starts from, the same for the same seed.

    Raises OperatorError where nothing of it travels, and for a frozen part that comes out differently each time: no
    two sites would have the same.
    """
    with at_home(task), seeded(derive_seed("initial", seed), torch.device("cpu")):
        if (first := optional(task, "first")) is not None:
            tensors, buffers = first()
            return write_tensors(tensors, path, buffers)
        module = task.model()
    parts = parts_of(module, local_of(task))
    if not parts.travels:
        raise OperatorError("nothing of the task's model would travel: all of it is frozen, or stays at the site")
    layout = write_model(module, path, parts)
    if parts.frozen:
        del module
        again = parts_of(built(task), local_of(task))
        if again.base != parts.base:
            path.unlink()
            raise OperatorError(
                "the frozen part of the task's model is another one each time that model() builds it: load it from a "
                "file (murmur.load_base), or draw it from a generator with a seed of its own"
            )
    return layout


def built(task: Task, device: torch.device | None = None, seed: str = "model") -> nn.Module:
    """The task's model as every site builds it: what it draws beside its file must be the same everywhere."""
    with at_home(task), seeded(derive_seed(seed), device or torch.device("cpu")):
        module: Any = task.model()
    if not isinstance(module, nn.Module):
        raise OperatorError(f"the task's model() gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def map_tensors(path: Path, layout: Layout) -> dict[str, Tensor]:
    """A checked file's tensors over the mapped file: pages are read when touched, writing changes a private copy."""
    offset = len(layout.header())
    raw = torch.from_file(str(path), shared=False, size=layout.file_bytes, dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for t in layout.tensors:
        found[t.name] = raw[offset : offset + t.nbytes].view(TYPES[t.dtype]).view(t.shape)
        offset += t.nbytes
    return found


def write_tensors(tensors: Mapping[str, Tensor], path: Path, buffers: frozenset[str] = frozenset()) -> Layout:
    """Write tensors as a canonical safetensors file; buffers: names of those that are no parameters."""
    return _write(_layout_of(tensors, buffers), tensors, path)


def write_update(trained: Mapping[str, Tensor], model: Path, path: Path, *, scale: float = 1.0) -> Layout:
    """Write trained minus incoming as `Layout.update()` lays it out: F32 (F64 stays), I64, without BOOL.

    trained: by name, as `named_tensors` gives them. model: the file that training started from; it is mapped, so
    nothing more than a chunk is held beside the model. scale: of what parameters have moved by.
    Raises OperatorError, and writes nothing, when a value is not finite: such an update could not be counted.
    """
    before = read_layout(model)
    layout = before.update()
    moved = deltas(trained, map_tensors(model, before), layout, scale=scale, unscaled=before.buffers)
    with whole_file(path) as file:
        write_chunks(file, layout, (c for _, _, delta_D in moved for c in tensor_bytes(delta_D)))
    return layout


def deltas(
    trained: Mapping[str, Tensor],
    incoming: Mapping[str, Tensor],
    wire: Layout,
    *,
    scale: float = 1.0,
    unscaled: frozenset[str] = frozenset(),
    chunk: int = CHUNK,
) -> Iterator[tuple[str, slice, Tensor]]:
    """What `write_update` writes, in pieces of at most `chunk` elements: name, part of the flat tensor, difference.

    wire: layout of the update. scale: of all floats but those named in `unscaled`. Raises OperatorError at a value
    that is not finite.
    """
    for t in wire.tensors:
        dtype, first = TYPES[t.dtype], 0
        scaled = scale != 1 and t.dtype in FLOATS and t.name not in unscaled
        pairs = zip(_split(trained[t.name], chunk), _split(incoming[t.name], chunk), strict=True)
        for after_D, before_D in pairs:
            delta_D = after_D.cpu().to(dtype) - before_D.to(dtype)
            if scaled:
                delta_D *= scale
            # The sum of a part with NaN or infinity is neither finite, and is found 20 times faster on a CPU.
            if not math.isfinite(delta_D.sum()) and not delta_D.isfinite().all():
                raise diverged(t.name)
            yield t.name, slice(first, first + len(delta_D)), delta_D
            first += len(delta_D)


def diverged(name: str) -> OperatorError:
    """What is said of an update whose tensor of this name is not finite."""
    return OperatorError(
        f"training ended in NaN or infinity ({name!r}): lower train.lr, set train.clip_norm, "
        "or look for such values in the data"
    )


def _split(tensor: Tensor, chunk: int = CHUNK) -> tuple[Tensor, ...]:
    flat = tensor.detach().reshape(-1)
    if 0 < tensor.numel() <= chunk:
        return (flat,)
    return flat.split(chunk) if tensor.numel() else ()


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes as a file takes them, a chunk at a time."""
    for chunk_D in _split(tensor):
        yield chunk_D.cpu().contiguous().view(torch.uint8).numpy().data


@contextmanager
def whole_file(path: Path) -> Generator[BinaryIO]:
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
