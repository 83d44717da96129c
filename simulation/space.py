"""What a search varies: ranges and choices for the settings of a recipe, by their dotted names as in `train.lr`."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe, changed, parse_recipe
from ..protocol.sections import Section

Value = int | float | str | bool
_RANGE = re.compile(r"\s*([-+.\deE]+)\s*\.\.\s*([-+.\deE]+?)\s*(?::\s*(log|[.\deE+-]+)\s*)?")
_FIXED = {"name", "task", "seed", "metrics", "dp.mode", "dp.delta", "dp.budget"}


class Suggests(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_categorical(self, name: str, choices: Sequence[Value], /) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, /, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, /, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both included; `log`: each factor of ten is as likely as the next; step 0: any."""

    low: float
    high: float
    log: bool = False
    step: float = 0.0
    whole: bool = False

    @property
    def ends(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def suggest(self, trial: Suggests, name: str) -> Value:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step or None, log=self.log)


@dataclass(frozen=True, slots=True)
class Choices:
    """One of these values."""

    options: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.options

    def suggest(self, trial: Suggests, name: str) -> Value:
        return trial.suggest_categorical(name, self.options)


Space = Mapping[str, Range | Choices]


def parse_space(given: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[Space, dict[str, Any]]:
    """A space, and the base recipe's values with what has one value only.

    given: by name, or in tables as TOML nests them: "1e-3..1e-1:log", "8..64:8" (a step), a list of choices, a value.
    Raises OperatorError for a setting that a recipe does not have, or an end or a choice that it does not take.
    """
    space: dict[str, Range | Choices] = {}
    values = deepcopy(dict(base))
    for name, said in _flat(given):
        found = _dimension(name, said)
        if found is None:
            values = with_changes(values, {name: said})
        else:
            space[name] = found
    if not space:
        raise OperatorError("there is nothing to search: say what varies, as in --set train.lr=1e-3..1e-1:log")
    for name, dimension in space.items():
        if name in _FIXED:
            raise OperatorError(f"{name} is the same in every trial, or they could not be compared or added up")
        for end in dimension.ends:
            parse_recipe(with_changes(values, {name: end}), where=f"{name} = {end!r}")
    return space, values


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with these in place, by dotted names; what was given stays as it is."""
    return changed(deepcopy(dict(values)), {name.replace(".", "__"): value for name, value in changes.items()})


def grid(space: Space) -> list[dict[str, Value]]:
    """Every point of a space that has choices only; none where it has a range."""
    if not all(isinstance(dimension, Choices) for dimension in space.values()):
        return []
    return [dict(zip(space, point, strict=True)) for point in product(*(d.ends for d in space.values()))]


def _flat(given: Mapping[str, Any], prefix: str = "") -> Generator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _dimension(name: str, said: Any) -> Range | Choices | None:
    kind = _kind(name)
    if isinstance(said, list) and name != "metrics":
        options = tuple(dict.fromkeys(said)) if all(isinstance(v, Value) for v in said) else ()
        if len(options) < 2:
            raise OperatorError(f"{name}: a list of two or more numbers or words to choose from is needed, not {said}")
        return Choices(options)
    if not isinstance(said, str) or not (found := _RANGE.fullmatch(said)):
        return None
    try:
        low, high = float(found[1]), float(found[2])
        step = 0.0 if found[3] in (None, "log") else float(found[3])
    except ValueError:
        raise OperatorError(
            f"{name}: {said!r} is no range: write 1e-3..1e-1, with :log or a step as in 8..64:8"
        ) from None
    log, whole = found[3] == "log", kind is int
    if not low < high or (log and low <= 0) or step < 0:
        raise OperatorError(f"{name}: {said!r} goes from a smaller to a larger number, with :log above 0")
    if whole and not (low.is_integer() and high.is_integer() and step.is_integer()):
        raise OperatorError(f"{name} is a whole number: {said!r} is not between two of them")
    return Range(low, high, log, step, whole)


def _kind(name: str) -> Any:
    """The type of a recipe's setting; None inside a table that takes any key, as train.optimizer_options does."""
    section: Any = Recipe
    for at, part in enumerate(parts := name.split(".")):
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
        if part not in section.model_fields:
            where = ".".join(parts[:at]) or "a recipe"
            raise OperatorError(f"{name}: there is no {part!r} in {where}; it has {', '.join(section.model_fields)}")
        section = section.model_fields[part].annotation
    return section
