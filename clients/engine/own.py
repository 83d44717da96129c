"""What is in the file that a client keeps of a run from round to round (`clients/own.py`), and where it goes.

Names begin with what the tensors are: `local/` for the parts of the model that stay at the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...protocol.errors import BadUpdate, OperatorError
from ...protocol.tensors import read_layout
from ..job import Job
from ..task import Task
from .parts import Parts, local_of
from .state import built, map_tensors, named_tensors, parts_of, read_model, write_tensors

LOCAL = "local/"


def read_local(module: nn.Module, path: Path, parts: Parts) -> None:
    """Copy the parts that stay at the site from the client's own file into the model, where the file has any.

    Raises OperatorError when they are those of another model; nothing is filled in.
    """
    kept, tensors = read_own(path, LOCAL), named_tensors(module)
    wanted = {name: (tensors[name].dtype, tensors[name].shape) for name in parts.local}
    if not kept or not wanted:
        return
    if {name: (t.dtype, t.shape) for name, t in kept.items()} != wanted:
        raise OperatorError(
            "what this site has kept of the run's model does not fit the task's: give the task the model and the "
            f"`local` that the run was begun with (kept: {', '.join(kept)}; the task's: {', '.join(wanted)})"
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            tensors[name].copy_(tensor)


def read_own(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a client's own file (`clients/own.py`) whose names begin so, without the prefix; mapped."""
    try:
        kept = map_tensors(path, read_layout(path))
    except (BadUpdate, OSError) as error:
        raise OperatorError(f"what this site has kept of the run cannot be read: {error}") from None
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}


def write_own(job: Job, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors, their names prefixed, into the file that the client keeps; those of other prefixes stay in it.

    Raises OperatorError for values that are not finite: no round could begin with them.
    """
    source = job.own_after if job.own_after.exists() else job.own
    others = read_own(source, "") if source is not None else {}
    whole = {name: t for name, t in others.items() if not name.startswith(prefix)}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise OperatorError(f"training ended in NaN or infinity ({name!r}), in a part that stays at the site")
        whole[prefix + name] = tensor
    write_tensors(whole, job.own_after)


def load_model(task: Task, version: Path | str, own: Path | str | None = None) -> nn.Module:
    """A version as a model to use: built by the task, with the version's tensors, in evaluation mode.

    own: the site's own parts of that run, from its agent's folder own/; without it they are as the task builds them.
    Raises as `read_model` does.
    """
    module = built(task)
    parts = parts_of(module, local_of(task))
    read_model(module, Path(version), parts)
    if own is not None:
        read_local(module, Path(own), parts)
    return module.eval()
