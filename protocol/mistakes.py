"""What pydantic says of wrong settings, in words: each key by its dotted name, and the nearest one that there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong. path: the tables and the key that it is at; empty: it is about the whole."""

    path: tuple[str, ...]
    said: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.key}: {self.said}" if self.path else self.said


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
    """What is wrong with values for this model, all of it, in the order of the model's fields."""
    return [_mistake(found["loc"], found["type"], found["msg"], model) for found in error.errors()]


def in_one_line(errors: Sequence[Any], most: int = 5) -> str:
    """The first mistakes that pydantic tells of a request, as one line."""
    said = ((".".join(map(str, e["loc"])) or "body", e["msg"].removeprefix("Value error, ")) for e in errors[:most])
    return "; ".join(f"{where}: {what}" for where, what in said)


def _mistake(loc: tuple[str | int, ...], kind: str, message: str, model: type[BaseModel]) -> Mistake:
    path = tuple(map(str, loc))
    if kind == "extra_forbidden":
        *tables, key = path
        known = [name for name, field in _section(model, tables).model_fields.items() if not field.exclude]
        near = difflib.get_close_matches(key, known, n=1)
        return Mistake(
            path, "there is no such key; " + (f"{near[0]!r} is near" if near else f"there are {', '.join(known)}")
        )
    return Mistake(path, message.removeprefix("Value error, "))


def _section(model: type[BaseModel], tables: list[str]) -> type[BaseModel]:
    """The model of a table; a mapping's tables have the model of its values."""
    for table in tables:
        field = model.model_fields.get(table)
        if field is not None:
            model = next(_models(field.annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line, from 1, of a TOML text where a key stands, or else the nearest table above it that the text has."""
    table: tuple[str, ...] = ()
    best, found = 0, None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            here = table
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            here = (*table, *(part.strip("\"'") for part in key[1].split(".")))
        else:
            continue
        if len(here) > best and here == path[: len(here)]:
            best, found = len(here), number
    return found
