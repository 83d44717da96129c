"""Optimizers of torch.optim by name, with options as a recipe can write them: numbers and booleans."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..protocol.errors import OperatorError
from ..protocol.kernels import settle

settle()

# LBFGS evaluates the loss again inside a step, SparseAdam takes sparse gradients only.
_REFUSED = frozenset({"Optimizer", "LBFGS", "SparseAdam"})
# How torch computes a step, not what it computes; `maximize` would climb the loss.
_NOT_OPTIONS = frozenset({"params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize"})


def names() -> tuple[str, ...]:
    """Every optimizer of the installed torch that can be asked for."""
    kinds = ((name, getattr(torch.optim, name)) for name in dir(torch.optim))
    found = (n for n, k in kinds if isinstance(k, type) and issubclass(k, torch.optim.Optimizer))
    return tuple(sorted(n for n in found if n not in _REFUSED))


def build(
    name: str,
    params: Iterable[nn.Parameter],
    lr: float,
    options: Mapping[str, float | bool],
    *,
    foreach: bool | None = False,
) -> torch.optim.Optimizer:
    """An optimizer by its name in torch.optim.

    options: its own keyword arguments; one that takes several numbers is written with a digit for each, so that
    `betas=(0.9, 0.99)` is `beta1 = 0.9, beta2 = 0.99`; what is not given keeps torch's default.
    foreach: False steps tensor by tensor, which gives the same bits on every machine; None leaves it to torch.
    Raises OperatorError for a name or option that it does not have, with the nearest ones, and for values it refuses.
    """
    if name not in names():
        raise OperatorError(f"torch.optim has no {name!r} that can be used here{_near(name, names())}")
    kind = getattr(torch.optim, name)
    defaults = {k: p.default for k, p in inspect.signature(kind).parameters.items() if k not in _NOT_OPTIONS}
    chosen = _keywords(name, options, defaults)
    how = {"foreach": foreach} if "foreach" in inspect.signature(kind).parameters else {}
    try:
        return kind(list(params), lr=lr, **chosen, **how)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OperatorError(f"torch.optim.{name} refuses these settings: {error}") from None


def _keywords(name: str, options: Mapping[str, float | bool], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from flat options; defaults: the constructor's parameters with their default values."""
    chosen: dict[str, Any] = {}
    places = {option: (option, -1) for option, default in defaults.items() if isinstance(default, bool | int | float)}
    for parameter, default in defaults.items():
        if isinstance(default, tuple) and all(isinstance(v, int | float) for v in default):
            stem = parameter.removesuffix("s")
            places |= {f"{stem}{i + 1}": (parameter, i) for i in range(len(default))}
    for option, value in options.items():
        if option not in places:
            raise OperatorError(f"torch.optim.{name} has no option {option!r}{_near(option, sorted(places))}")
        parameter, index = places[option]
        if index >= 0:
            values = list(chosen.get(parameter, defaults[parameter]))
            values[index] = _number(name, option, value, 0.0)
            chosen[parameter] = tuple(values)
        else:
            chosen[parameter] = _number(name, option, value, defaults[parameter])
    return chosen


def _number(name: str, option: str, value: float | bool, default: float | bool) -> float | bool:
    """The value in the kind of its default: a boolean, a whole number where it is one, else a float."""
    if isinstance(value, bool) != isinstance(default, bool):
        wanted = "true or false" if isinstance(default, bool) else "a number"
        raise OperatorError(f"torch.optim.{name}: {option} takes {wanted}, not {value!r}")
    if isinstance(default, bool):
        return value
    return int(value) if isinstance(default, int) and float(value).is_integer() else float(value)


def _near(word: str, known: Iterable[str]) -> str:
    known = list(known)
    folded = {k.lower(): k for k in known}
    near = [folded[k] for k in difflib.get_close_matches(word.lower(), folded, n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"
