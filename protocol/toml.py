"""Values as TOML text, which Python's standard library reads and does not write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .errors import OperatorError


def document(values: Mapping[str, Any]) -> str:
    """A file of these values: the plain ones first, then a table for each mapping, and for each mapping in one."""
    return "\n".join(_lines(values, "")).strip("\n") + "\n"


def _lines(values: Mapping[str, Any], table: str) -> list[str]:
    inner = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    rows = [f"{key(k)} = {value(v)}" for k, v in values.items() if k not in inner]
    lines = ["", f"[{table}]", *rows] if table and (rows or not inner) else rows
    for name, mapping in inner.items():
        lines += _lines(mapping, f"{table}.{key(name)}" if table else key(name))
    return lines


def key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else value(name)


def value(given: Any) -> str:
    """One value; raises OperatorError for what TOML does not have."""
    match given:
        case bool():
            return "true" if given else "false"
        case int() | float():
            return repr(given)
        case str():
            return json.dumps(given, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(map(value, given)) + "]"
        case dict():
            return "{" + ", ".join(f"{key(k)} = {value(v)}" for k, v in given.items()) + "}"
        case _:
            raise OperatorError(f"TOML cannot hold {given!r}")
