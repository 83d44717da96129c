"""A version as an ONNX file, compared with the model it was made from."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from murmur.clients.engine.batches import load
from murmur.clients.engine.own import load_model
from murmur.clients.engine.sources import read, sizes
from murmur.clients.task import Task, at_home, optional
from murmur.protocol.errors import OperatorError

NEEDED = ("onnx", "onnxscript", "onnxruntime")
ROWS = 4  # of data that the model is traced with; batches of other sizes are compared
TOLERANCE = 1e-4  # of the largest output: float32 kernels of two libraries differ in the last digits
PROTOBUF_BYTES = 1 << 30  # above, weights lie beside the file: protobuf ends at 2 GiB


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxFile:
    """difference: the largest one between the outputs of file and model, of the largest output, over `rows` rows."""

    file: Path
    bytes: int
    difference: float
    rows: int


def write_onnx(task: Task, version: Path, to: Path, *, facts: dict[str, str] | None = None) -> OnnxFile:
    """Write the task's model with a version's tensors as ONNX, for batches of any size, and run both on data.

    facts: go into the file's metadata. Raises OperatorError for a missing extra, for a task without data, for a model
    that cannot be exported, and for a file that computes something else; then nothing is written.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OperatorError(f"{', '.join(missing)} is not installed: pip install 'murmur[onnx]'")
    model = load_model(task, version)
    with at_home(task), _quiet():
        inputs = _rows(task)
        leaves = pytree.tree_leaves(inputs)
        any_size = pytree.tree_map(lambda t: {0: torch.export.Dim.AUTO} if t.ndim else None, inputs)
        try:
            program = torch.onnx.export(
                model, (inputs,), dynamo=True, dynamic_shapes=(any_size,), optimize=True, verbose=False
            )
        except Exception as error:  # whatever the model does that cannot be exported, in torch's own words
            said = str(error).strip().partition("\n")[0]
            raise OperatorError(f"the model cannot be exported as ONNX: {type(error).__name__}: {said}") from error
        assert program is not None  # it is None only for the exporter of old
        for name, value in (facts or {}).items():
            program.model.metadata_props[name] = value
        large = sum(t.nbytes for t in model.state_dict().values()) > PROTOBUF_BYTES
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as folder:
            file = Path(folder) / to.name
            program.save(file, external_data=large)
            difference = _compare(model, inputs, file)
            written = sorted(Path(folder).iterdir(), reverse=True)  # weights beside the file first
            size = sum(part.stat().st_size for part in written)
            for part in written:
                part.replace(to.with_name(part.name))
    return OnnxFile(file=to, bytes=size, difference=difference, rows=len(leaves[0]))


def _rows(task: Task) -> Any:
    """The inputs of a few rows of the task's data, collated as in training."""
    data = read(task, "test") or read(task, "train")
    count = min(ROWS, sum(sizes(data))) if data else 0
    if data is None or count < 2:
        raise OperatorError("the task has no two rows of data here: ONNX needs an example of the model's inputs")
    inputs, _ = next(load(data, [torch.arange(count)], collate=optional(task, "collate")))
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise OperatorError("the model's inputs are not all tensors: ONNX takes tensors only")
    return inputs


def _compare(model: nn.Module, inputs: Any, file: Path) -> float:
    """The largest difference over batches of two sizes, of the largest output; OperatorError above TOLERANCE."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    largest = 0.0
    for size in (len(pytree.tree_leaves(inputs)[0]), 1):
        batch = pytree.tree_map(lambda t, n=size: t[:n] if t.ndim else t, inputs)
        given = {name: t.numpy() for name, t in zip(names, pytree.tree_leaves(batch), strict=True)}
        try:
            with torch.no_grad():
                wanted = [t for t in pytree.tree_leaves(model(batch)) if isinstance(t, Tensor)]
            found = [torch.from_numpy(values) for values in session.run(None, given)]
        except Exception as error:  # the model's own, or onnxruntime's, which have no common class
            raise OperatorError(
                f"a batch of {size} does not pass through model and file: the model fixes the size of its batches"
            ) from error
        largest = max(largest, *(_difference(ours, theirs) for ours, theirs in zip(wanted, found, strict=True)))
    if not largest <= TOLERANCE:
        raise OperatorError(f"the exported file differs from the model by {largest:.2g} of its outputs: not written")
    return largest


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise OperatorError(f"the exported file gives {tuple(theirs.shape)} where the model gives {tuple(ours.shape)}")
    largest = ours.abs().amax().clamp(min=1e-12)
    return ((theirs.double() - ours.double()).abs().amax() / largest).item()


@contextmanager
def _quiet() -> Generator[None]:
    """The exporter's own notices, about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
