"""A recipe as a form: sections and fields from its JSON schema, and what was filled in as a recipe's values again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from ..protocol import toml
from ..protocol.errors import OperatorError
from ..protocol.mistakes import Mistake, mistakes
from ..protocol.recipe import Recipe
from .words import heading

OPEN = ("", "cohort", "train", "secure", "dp")  # sections that stand open at first: what most runs set
TITLES = {
    "": "Run",
    "cohort": "Who takes part",
    "strategy": "How updates combine",
    "train": "Local training",
    "parallel": "Processes of a client",
    "secure": "Secure aggregation",
    "dp": "Differential privacy",
    "train.mixture": "Local training: several data sets",
    "train.distill": "Local training: distillation",
}


NAMES = {  # of settings whose names are short for more
    "lr": "Learning rate",
    "server_lr": "Server learning rate",
    "clip_lr": "Clip learning rate",
    "min": "Fewest clients",
    "size": "Clients asked",
    "patience_s": "Patience, seconds",
    "qat": "Quantization-aware",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A setting. `kind` is text, number, choice or toml; `default` and `choices` are as the field shows them.

    raw: what is typed is the value; else it is read as TOML, so that 24 is a number and {momentum = 0.9} a table.
    """

    path: tuple[str, ...]
    help: str
    kind: str
    default: str = ""
    choices: tuple[str, ...] = ()
    raw: bool = False
    required: bool = False

    @property
    def title(self) -> str:
        return NAMES.get(self.name) or heading(self.name)

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def name(self) -> str:
        return self.path[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class FormSection:
    """A table of a recipe; `key` is empty for what stands above all tables."""

    key: str
    title: str
    help: str
    fields: tuple[Field, ...]


@cache
def sections() -> tuple[FormSection, ...]:
    """The sections of the form, in the order of the recipe."""
    schema = Recipe.model_json_schema()
    return tuple(_sections(schema, schema["$defs"], ()))


def _sections(table: Mapping[str, Any], defs: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[FormSection]:
    fields: list[Field] = []
    inner: list[tuple[str, Mapping[str, Any]]] = []
    for name, said in table["properties"].items():
        if "$ref" in said:
            inner.append((name, defs[said["$ref"].rpartition("/")[2]]))
        else:
            fields.append(_field((*path, name), said, required=name in table.get("required", ())))
    key = ".".join(path)
    about = table.get("description", "").partition("\n")[0] if path else ""
    yield FormSection(key=key, title=TITLES.get(key, key), help=about, fields=tuple(fields))
    for name, below in inner:
        yield from _sections(below, defs, (*path, name))


def _field(path: tuple[str, ...], said: Mapping[str, Any], *, required: bool) -> Field:
    kind, values = said.get("type"), said.get("enum", [True, False] if said.get("type") == "boolean" else [])
    raw = kind == "string"
    default = said.get("default", {} if kind == "object" else "")
    return Field(
        path=path,
        help=said.get("description", ""),
        kind="choice" if values else "text" if raw else "number" if kind in ("integer", "number") else "toml",
        default="" if default == "" else _shown(default, raw=raw),
        choices=tuple(_shown(v, raw=raw) for v in values),
        raw=raw,
        required=required,
    )


def _shown(value: Any, *, raw: bool) -> str:
    return str(value) if raw else toml.value(value)


def filled(values: Mapping[str, Any]) -> dict[str, str]:
    """What each field shows for a recipe's values, whole or in part."""
    found: dict[str, str] = {}
    for field in _fields():
        at: Any = values
        for name in field.path:
            at = at.get(name) if isinstance(at, Mapping) else None
        found[field.key] = field.default if at is None else _shown(at, raw=field.raw)
    return found


def values_of(given: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's values from the fields as they were sent, without those that have their default or are empty."""
    values: dict[str, Any] = {}
    for field in _fields():
        text = given.get(field.key, "").strip()
        if not text or text == field.default:
            continue
        table = values
        for name in field.path[:-1]:
            table = table.setdefault(name, {})
        table[field.name] = text if field.raw else _read(text)
    return values


def _read(text: str) -> Any:
    """A value as TOML has it; what is none stays text, of which the recipe then says what it takes."""
    try:
        read = tomllib.loads(f"value = {text}")
        toml.value(read)  # a date is none of a recipe's values
    except (ValueError, RecursionError, OperatorError):
        return [t.strip() for t in text.split(",")] if "," in text and "=" not in text else text
    return read["value"] if len(read) == 1 else text


def of_toml(text: str) -> dict[str, Any]:
    """The values of a recipe's text, as `load_recipe` reads a file. Raises ValueError, saying where it is not TOML."""
    values = tomllib.loads(text)
    values.pop("tune", None)
    return values


def as_toml(values: Mapping[str, Any]) -> str:
    """A recipe's text, with what differs from its default."""
    return toml.document(values) if values else ""


def checked(values: dict[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    """The recipe, or all that is wrong with these values."""
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        return None, mistakes(error, Recipe)


def by_field(found: Iterable[Mistake]) -> dict[str, list[str]]:
    """What is wrong, by the field to say it at; under "" what belongs to none.

    A rule about several settings is said at the first that its words name.
    """
    keys = {f.key for f in _fields()}
    said: dict[str, list[str]] = {}
    for mistake in found:
        said.setdefault(_place(mistake, keys), []).append(mistake.said)
    return said


def _place(mistake: Mistake, keys: set[str]) -> str:
    for length in range(len(mistake.path), 0, -1):  # a value of several kinds is named with the kind behind it
        if (key := ".".join(mistake.path[:length])) in keys:
            return key
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", mistake.said)
    return next((key for word in words for key in (word, f"{mistake.key}.{word}") if "." in key and key in keys), "")


@cache
def _fields() -> tuple[Field, ...]:
    return tuple(f for s in sections() for f in s.fields)
