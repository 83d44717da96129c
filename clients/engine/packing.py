"""A state of plain values, as loaders give it, as JSON and tensors: nothing is pickled, all comes back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .state import NAMES


def packed(value: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """The value for JSON, and the tensors in it under names that begin with the prefix.

    Takes None, bool, int, float, str, bytes, tensors, and lists, tuples and dicts by words or numbers of such; raises
    TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return {"bytes": value.hex()}
            case Tensor() if value.dtype in NAMES:
                name = f"{prefix}.{len(tensors)}"
                tensors[name] = value
                return {"tensor": name}
            case list():
                return [pack(one) for one in value]
            case tuple():
                return {"tuple": [pack(one) for one in value]}
            case dict() if all(isinstance(key, (str, int)) for key in value):
                return {"dict": [[key, pack(one)] for key, one in value.items()]}
            case _:
                raise TypeError(f"a {type(value).__name__} is neither a plain value nor a tensor")

    return pack(value), tensors


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` was given."""
    match value:
        case list():
            return [unpacked(one, tensors) for one in value]
        case {"bytes": str(digits)}:
            return bytes.fromhex(digits)
        case {"tensor": str(name)}:
            return tensors[name].clone()
        case {"tuple": list(inner)}:
            return tuple(unpacked(one, tensors) for one in inner)
        case {"dict": list(items)}:
            return {key: unpacked(one, tensors) for key, one in items}
        case _:
            return value
