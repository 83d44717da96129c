"""`murmur model export`: a version made smaller, with what that loses; as ONNX; as a folder for a model hub."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from murmur.coordinating import Data, Json, connected
from murmur.options import values
from murmur.output import USAGE, fail, out, print_json, print_table, told

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written. zeros: share of the weights; before, after: the task's figures, empty without a task."""

    file: Path
    version: str
    original_bytes: int
    bytes: int
    zeros: float
    before: Metrics
    after: Metrics


def export(
    version: Annotated[
        str,
        typer.Argument(help="NAME@ALIAS, RUN@N, NAME or RUN for its newest, a SHA-256, or a .safetensors file here"),
    ],
    to: Annotated[Path | None, typer.Option("--out", help="file to write (safetensors, or ONNX)")] = None,
    prune: Annotated[float, typer.Option(min=0, max=0.99, help="share of the weights to make zero")] = 0.0,
    int8: Annotated[bool, typer.Option("--int8", help="weights in 8 bits, with a scale per channel")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="all numbers in bfloat16")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="the task's model as ONNX, compared with it on data")] = False,
    hf: Annotated[Path | None, typer.Option("--hf", help="new folder for weights, card and config")] = None,
    license_: Annotated[str, typer.Option("--license", help="in the card of --hf: apache-2.0")] = "",
    task: Annotated[
        str, typer.Option(help="module:Class or file.py:Class: its model, and its test data for figures")
    ] = "",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value given to the task")] = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Write a version smaller, as ONNX or as a model hub's folder, and say what it costs or how it compares."""
    small = bool(prune or int8 or bf16)
    if small + onnx + (hf is not None) != 1:
        fail("say how, one of: --prune 0.5 with or without --int8 or --bf16, --onnx, or --hf FOLDER", USAGE)
    if int8 and bf16:
        fail("--int8 or --bf16: weights are one of them", USAGE)
    if (to is None) != (hf is not None):
        fail("--hf names its folder itself" if to else "say where to: --out FILE", USAGE)
    if onnx and not task:
        fail("--onnx needs --task: a version has weights, the task knows what is computed with them", USAGE)
    own = values(option)
    with told(), tempfile.TemporaryDirectory() as folder:
        original = Path(version)
        if hf is not None:
            return _write_folder(version, Path(folder) / "original", hf, license_, task, own, data, json_)
        assert to is not None
        if not original.is_file():
            original = Path(folder) / "original.safetensors"
            version = _pull(version, original, data)
        if onnx:
            return _write_onnx(version, original, to, task, own, json_)
        done = compress(original, to, prune=prune, int8=int8, bf16=bf16, task=task, options=own, of=version)
    _tell(done, json_)


def _pull(version: str, path: Path, data: Path | None) -> str:
    from murmur.runs import find_version

    with connected(data) as client:
        found = find_version(client, version)
        client.pull(found.sha256, path)
    return f"{found.run}@{found.n}"


def _write_folder(
    version: str,
    original: Path,
    to: Path,
    licence: str,
    task: str,
    options: dict[str, Any],
    data: Path | None,
    as_json: bool,
) -> None:
    from murmur.clients.task import load_task
    from murmur.hub import write_folder
    from murmur.runs import find_version

    with connected(data) as client:
        found = find_version(client, version)
        lineage, card = client.lineage(found.run, found.n), client.card(found.run, found.n, license=licence)
        client.pull(found.sha256, original)
    write_folder(original, lineage, card, to, task=load_task(task, options) if task else None)
    if as_json:
        return print_json({"folder": str(to), "version": f"{found.run}@{found.n}", "sha256": found.sha256})
    out.print(f"{found.run}@{found.n} is in [bold]{to}[/]: weights that load back equal, card and config")


def _write_onnx(version: str, original: Path, to: Path, task: str, options: dict[str, Any], as_json: bool) -> None:
    import hashlib

    from murmur.clients.task import load_task
    from murmur.onnx_export import write_onnx

    facts = {"murmur.version": version, "murmur.sha256": hashlib.sha256(original.read_bytes()).hexdigest()}
    done = write_onnx(load_task(task, options), original, to, facts=facts)
    if as_json:
        return print_json(asdict(done) | {"version": version})
    out.print(
        f"{version} is in [bold]{to}[/]: {done.bytes} bytes; on {done.rows} rows its outputs and the model's differ by "
        f"{done.difference:.1g} of the largest one",
        soft_wrap=True,
    )


def compress(
    original: Path,
    to: Path,
    *,
    prune: float = 0.0,
    int8: bool = False,
    bf16: bool = False,
    task: str = "",
    options: dict[str, Any] | None = None,
    of: str = "",
) -> Export:
    """Write a model's file smaller; with a task, both are measured on its test data.

    Raises BadUpdate for a file that is none of ours, OperatorError for a task that does not fit it or has no test data.
    """
    from murmur.clients.engine.compression import (
        narrowed,
        pruned,
        quantized,
        read_tensors,
        weights,
    )
    from murmur.clients.engine.state import write_tensors

    tensors, buffers = read_tensors(original)
    if prune:
        tensors = pruned(tensors, buffers, prune)
    small = quantized(tensors, buffers) if int8 else narrowed(tensors) if bf16 else tensors
    size = write_tensors(small, to, buffers).file_bytes
    kept, _ = read_tensors(to)
    named = [kept[name] for name in weights(kept, buffers)]
    zeros = sum(int((t == 0).sum()) for t in named) / max(1, sum(t.numel() for t in named))
    before, after = (measure(path, task, options or {}) if task else {} for path in (original, to))
    return Export(
        file=to, version=of or str(original), original_bytes=original.stat().st_size, bytes=size, zeros=zeros,
        before=before, after=after,
    )  # fmt: skip


def measure(path: Path, task: str, options: dict[str, Any]) -> Metrics:
    """What a task's test data says of a model's file, exported ones as well: its loss and its own metrics, as means."""
    from murmur.clients.engine.compression import read_tensors
    from murmur.clients.engine.loop import run_job
    from murmur.clients.engine.state import initial_model, map_tensors, write_tensors
    from murmur.clients.job import Job
    from murmur.clients.task import load_task
    from murmur.protocol.errors import OperatorError
    from murmur.protocol.sections import Train
    from murmur.protocol.tensors import read_layout

    own = load_task(task, options)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        wanted = map_tensors(model, initial_model(own, 0, model))
        tensors, _ = read_tensors(path)
        widened = {n: t.to(wanted[n].dtype) if n in wanted and t.is_floating_point() else t for n, t in tensors.items()}
        write_tensors(widened, model, read_layout(model).buffers)
        job = Job(
            id="measure", kind="evaluate", model=model, update=Path(folder) / "none", train=Train(batch_size=256),
            mu=0.0, metrics=("loss", "accuracy"), seed=0, round=0, client="export",
        )  # fmt: skip
        result = run_job(own, job)
    if not result.metrics:
        raise OperatorError("the task has no test data here: nothing can be measured")
    return {name: total / count for name, (total, count) in result.metrics.items()}


def _tell(done: Export, as_json: bool) -> None:
    if as_json:
        return print_json(asdict(done))
    share = done.bytes / done.original_bytes
    out.print(f"{done.version} is in [bold]{done.file}[/]: {done.bytes} bytes, {share:.2f} of the original's", end="")
    out.print(f", {done.zeros:.1%} of the weights are zero" if done.zeros else "")
    if done.before:
        rows = ((name, done.before[name], done.after.get(name)) for name in done.before)
        print_table("On the task's test data", ("", "original", "exported"), rows)
