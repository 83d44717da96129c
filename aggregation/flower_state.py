"""What a Flower strategy keeps from round to round, as a safetensors file: nothing of it is unpickled.

"values"            JSON: the strategy's name and options, and the attributes that it has come to
"m_t/0", "m_t/1"    their arrays

Attributes may be numbers, strings, arrays, Flower's records, lists, tuples and dicts of these, and objects that the
strategy has from the start, whose attributes are the same. Functions are not kept: a strategy newly made has them. Any
other attribute is refused, by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import OperatorError
from ..protocol.sections import Strategy
from ..protocol.tensors import DTYPES, Layout, TensorSpec, map_file, read_layout, write_file

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

Array = np.ndarray[Any, Any]
VALUES = "values"
DEEPEST = 16  # objects in objects: one that holds itself has no end
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}


def write_state(path: Path, rule: FlowerStrategy, strategy: Strategy) -> bool:
    """Write in what a strategy differs from one newly made; whether there is anything.

    Raises OperatorError for an attribute that cannot be kept.
    """
    from .flower import build

    arrays: dict[str, Array] = {}
    changes = _changes(build(strategy), rule, arrays, "")
    if not changes:
        return False
    arrays[VALUES] = np.frombuffer(json.dumps([_identity(strategy), changes]).encode(), np.uint8)
    write_file(path, arrays, Layout(tuple(TensorSpec(name, _NAMES[a.dtype], a.shape) for name, a in arrays.items())))
    return True


def read_state(path: Path, rule: FlowerStrategy, strategy: Strategy) -> None:
    """Bring a strategy newly made to what was kept; raises OperatorError for the state of another one."""
    arrays = map_file(path, read_layout(path))
    identity, changes = json.loads(arrays[VALUES].tobytes()) if VALUES in arrays else (None, {})
    if identity != _identity(strategy):
        raise OperatorError(f"{path.name} is not the state of the Flower strategy {strategy.flower!r} with its options")
    _change(rule, changes, arrays)


def _identity(strategy: Strategy) -> list[Any]:
    return [strategy.flower, strategy.flower_options]


def _changes(fresh: object, used: object, arrays: dict[str, Array], at: str) -> dict[str, Any]:
    """The attributes, as JSON and `arrays`, that an object has not had from the start."""
    if at.count("/") > DEEPEST:
        raise OperatorError(f"the Flower strategy cannot be kept from round to round: {at} holds itself")
    found: dict[str, Any] = {}
    for name, value in vars(used).items():
        first, path = vars(fresh).get(name), f"{at}{name}"
        if (callable(value) and callable(first)) or (isinstance(value, Enum) and value is first):
            continue
        now: dict[str, Array] = {}
        try:
            written = _written(value, path, now)
        except TypeError as error:
            if not hasattr(value, "__dict__") or type(value) is not type(first):
                raise OperatorError(
                    f"the Flower strategy cannot be kept from round to round: its {path} {error}. Numbers, strings, "
                    "arrays, and lists and dicts of these can"
                ) from None
            if inside := _changes(first, value, arrays, f"{path}/"):
                found[name] = {"inside": inside}
            continue
        if not _is_written(first, path, written, now):
            found[name] = written
            arrays |= now
    return found


def _is_written(value: Any, path: str, written: Any, arrays: Mapping[str, Array]) -> bool:
    """Whether this is what a value was written as."""
    others: dict[str, Array] = {}
    try:
        same = _written(value, path, others) == written
    except TypeError:
        return False
    return same and all(np.array_equal(arrays[name], other) for name, other in others.items())


def _written(value: Any, path: str, arrays: dict[str, Array]) -> Any:
    """A value as JSON; its arrays go to `arrays`. Raises TypeError for what cannot be kept."""
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

    if isinstance(value, FlowerArray):
        return {"flower": _written(value.numpy(), path, arrays)}
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype not in _NAMES:
            raise TypeError(f"is an array of {array.dtype}")
        arrays[path] = array
        return {"array" if isinstance(value, np.ndarray) else "scalar": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in (ArrayRecord, MetricRecord, ConfigRecord, dict):
        if type(value) is kind:
            rows = [[_written(one, f"{path}/{n}", arrays) for one in row] for n, row in enumerate(value.items())]
            return {kind.__name__: rows}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_written(one, f"{path}/{n}", arrays) for n, one in enumerate(value)]}
    raise TypeError(f"is a {type(value).__module__}.{type(value).__qualname__}")


def _change(target: object, changes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    for name, written in changes.items():
        if isinstance(written, dict) and "inside" in written:
            _change(vars(target)[name], written["inside"], arrays)
        else:
            vars(target)[name] = _read(written, arrays)


def _read(written: Any, arrays: Mapping[str, Array]) -> Any:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

    if not isinstance(written, dict):
        return written
    ((kind, value),) = written.items()
    if kind == "flower":
        return FlowerArray(_read(value, arrays))
    if kind == "array":
        return arrays[value].copy()
    if kind == "scalar":
        return arrays[value][()]
    if kind in ("list", "tuple"):
        values = [_read(one, arrays) for one in value]
        return values if kind == "list" else tuple(values)
    rows = {_read(key, arrays): _read(one, arrays) for key, one in value}
    records: dict[str, Any] = {"ArrayRecord": ArrayRecord, "MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord}
    return records[kind](rows) if kind in records else rows
