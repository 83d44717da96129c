"""The server's move: from a version and the mean update to the next version, with any optimizer of torch.optim.

Needs torch: the coordinator imports this file in its worker process only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..protocol.encoding import canonical_json, sha256_hex
from ..protocol.errors import OperatorError
from ..protocol.sections import Strategy
from ..protocol.tensors import (
    DTYPES,
    FLOATS,
    INTEGERS,
    Layout,
    TensorSpec,
    check_file,
    map_file,
    read_layout,
    write_file,
)
from .optimizers import build

# D = floating-point elements of the model, A = its integer elements

Array = np.ndarray[Any, Any]
_STATE_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
_IDENTITY = "optimizer"  # names the tensor that says which optimizer a state belongs to; no parameter's key has no "/"


def server_step(
    version: Path,
    layout: Layout,
    mean: Mapping[str, Array],
    strategy: Strategy,
    state: Path | None,
    out_version: Path,
    out_state: Path | None,
) -> bool:
    """Write the version that follows from `version` and the cohort's mean update; true when a state was written too.

    layout: of the model. mean: by name, every tensor that travels: int64 for integers, float64 for floats, or float32
    where the model has no F64 tensor (what `weighted_mean` and `unflatten` give). state: what the last step of this
    run wrote, None before the first.

    - Parameters: their gradient is the negative mean, and the optimizer steps once. Arithmetic is float32, float64 for
      F64 tensors: the mean is rounded to it, F16 and BF16 values are widened to it, and the result is rounded to the
      version's own dtype (to nearest, ties to even). With SGD of rate 1 the new value is therefore w + mean in that
      arithmetic. Nothing finer than the version's dtype is kept from round to round.
    - Buffers of floating point: the same w + mean, whatever the optimizer; running statistics are no gradients.
    - Integers: the rounded mean is added, and kept inside the range of the version's dtype.
    - BOOL tensors are kept.

    The optimizer's moments persist in `out_state`, a canonical safetensors file; an optimizer that keeps none writes
    none. Raises OperatorError for an optimizer or options that torch does not have, a state of another optimizer, and
    a step whose result is not finite; nothing is written then.
    Source: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 1, arXiv:2003.00295.
    """
    check_file(version, layout)
    _check_mean(mean, layout)
    old = map_file(version, layout)
    floats = [t for t in layout.tensors if t.dtype in FLOATS]
    weights = {t.name: nn.Parameter(_widen(old[t.name], t.dtype)) for t in floats}
    for t in floats:
        gradient = np.negative(np.asarray(mean[t.name], _master(t.dtype)))
        weights[t.name].grad = torch.from_numpy(np.asarray(gradient))  # of a scalar numpy makes no array
    trained = {t.name: weights[t.name] for t in floats if t.name not in layout.buffers and t.numel}
    moments = _step(trained, strategy, state)
    with torch.no_grad():
        for t in floats:
            if t.name in layout.buffers:
                weights[t.name].sub_(weights[t.name].grad)  # pyright: ignore[reportArgumentType]  # set above
    new: dict[str, Array] = {t.name: _narrow(weights[t.name].detach(), t) for t in floats}
    for t in layout.tensors:
        if t.dtype in INTEGERS:
            new[t.name] = _shifted(old[t.name], mean[t.name])
        elif t.dtype not in FLOATS:
            new[t.name] = old[t.name]
    if moments and out_state is None:
        raise ValueError(f"{strategy.server} keeps a state, and no place was named for it")
    if moments and out_state is not None:
        _write_state(out_state, moments, strategy)
    write_file(out_version, new, layout)
    return bool(moments)


def unflatten(floats_D: Array, integers_A: Array, layout: Layout) -> dict[str, Array]:
    """A mean as `server_step` takes it, from two flat vectors in the order of `layout.update()`.

    floats_D: (D,) float64 or float32, every F64, then every F32 element of the update. integers_A: (A,) its I64
    elements.
    """
    update = layout.update()
    flat = {True: floats_D, False: np.asarray(integers_A, np.int64)}
    if flat[True].shape != (layout.float_numel,) or flat[False].shape != (layout.integer_numel,):
        raise ValueError(
            f"vectors of {flat[True].shape} and {flat[False].shape}, "
            f"the layout has {layout.float_numel} floats and {layout.integer_numel} integers"
        )
    at = {True: 0, False: 0}
    found: dict[str, Array] = {}
    for t in update.tensors:
        kind = t.dtype in FLOATS
        found[t.name] = flat[kind][at[kind] : at[kind] + t.numel].reshape(t.shape)
        at[kind] += t.numel
    return found


def _step(trained: dict[str, nn.Parameter], strategy: Strategy, state: Path | None) -> dict[str, torch.Tensor]:
    """Step the optimizer once over the parameters, in place; returns its state by `key/parameter`."""
    if not trained:
        return {}
    if strategy.server == "SGD" and not strategy.server_options and state is None:
        # What torch.optim.SGD would do, without what its first step imports: torch._dynamo, 2.8 s of a coordinator's
        # first round and of each one after a restart.
        with torch.no_grad():
            for weight in trained.values():
                weight.add_(weight.grad, alpha=-strategy.server_lr)  # pyright: ignore[reportArgumentType]  # set above
        return {}
    optimizer = build(strategy.server, trained.values(), strategy.server_lr, strategy.server_options)
    if state is not None:
        for key, tensor in _read_state(state, strategy).items():
            kind, _, name = key.partition("/")
            if name not in trained:
                raise OperatorError(f"the optimizer's state names {name!r}, which the model does not train")
            # set directly: load_state_dict would widen the scalars of F64 models and so change the next step
            optimizer.state[trained[name]][kind] = tensor
    try:
        optimizer.step()
    except (KeyError, RuntimeError) as error:
        raise OperatorError(f"torch.optim.{strategy.server} cannot step: {error}") from None
    kept = ((f"{kind}/{name}", v) for name, p in trained.items() for kind, v in optimizer.state[p].items())
    return {key: value for key, value in kept if isinstance(value, torch.Tensor)}


def _identity(strategy: Strategy) -> Array:
    """32 bytes that differ between optimizers and options; the rate may change between the rounds of a run."""
    settings = canonical_json([strategy.server, {k: float(v) for k, v in strategy.server_options.items()}])
    return np.frombuffer(bytes.fromhex(sha256_hex(settings)), np.uint8)


def _write_state(path: Path, moments: dict[str, torch.Tensor], strategy: Strategy) -> None:
    specs = [TensorSpec(key, _STATE_DTYPES[v.dtype], tuple(v.shape)) for key, v in moments.items()]
    layout = Layout((*specs, TensorSpec(_IDENTITY, "U8", (32,))))
    write_file(path, {key: v.detach().numpy() for key, v in moments.items()} | {_IDENTITY: _identity(strategy)}, layout)


def _read_state(path: Path, strategy: Strategy) -> dict[str, torch.Tensor]:
    arrays = map_file(path, read_layout(path))
    identity = arrays.pop(_IDENTITY, None)
    if identity is None or not np.array_equal(identity, _identity(strategy)):
        raise OperatorError(f"{path.name} is the state of another optimizer than {strategy.server} with these options")
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}


def _check_mean(mean: Mapping[str, Array], layout: Layout) -> None:
    shapes = {t.name: t.shape for t in layout.update().tensors}
    if {name: tuple(a.shape) for name, a in mean.items()} != shapes:
        raise ValueError("the mean does not have the tensors of an update to this model")


def _master(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float64) if dtype == "F64" else np.dtype(np.float32)


def _widen(array: Array, dtype: str) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype(_master(dtype)))


def _narrow(tensor: torch.Tensor, spec: TensorSpec) -> Array:
    kept = tensor.to(torch.bfloat16) if spec.dtype == "BF16" else tensor
    if spec.dtype == "F16":
        kept = tensor.to(torch.float16)
    if kept.numel() and not math.isfinite(float(kept.abs().max())):
        raise OperatorError(
            f"the server's step makes {spec.name!r} infinite or NaN: lower server_lr or the clients' lr"
        )
    if spec.dtype == "BF16":
        return kept.contiguous().view(torch.int16).numpy().view(np.uint16)
    return kept.numpy().astype(DTYPES[spec.dtype], copy=False)


def _shifted(array: Array, delta: Array) -> Array:
    """array + delta without wrapping around, inside the range of the array's dtype."""
    limits, widest = np.iinfo(array.dtype), np.iinfo(np.int64)
    wide, more = np.atleast_1d(array).astype(np.int64), np.atleast_1d(delta)
    moved = wide + more
    wrapped = ((wide ^ moved) & (more ^ moved)) < 0  # the sum's sign is that of neither
    moved = np.where(wrapped, np.where(wide < 0, widest.min, widest.max), moved)
    return np.clip(moved, limits.min, limits.max).astype(array.dtype).reshape(array.shape)
