"""The settings of a world on a virtual clock: how fast clients are, when they are there, and what happens to them."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..protocol.errors import OperatorError
from ..protocol.mistakes import mistakes
from ..protocol.recipe import Recipe, changed
from ..protocol.sections import Section

DAY_H = 24.0


class Spread(Section):
    """A quantity that differs between clients: log-normal around its median."""

    median: float = Field(gt=0, le=1e12)
    spread: float = Field(default=0.0, ge=0, le=5, description="standard deviation of its logarithm; 0: all alike")

    def at(self, quantile: float) -> float:
        """The value that a share `quantile`, in (0, 1), of all clients lies below."""
        return self.median * math.exp(self.spread * NormalDist().inv_cdf(quantile))


class Online(Section):
    """When a client can be asked: one stretch of each day, which begins at about the same hour at all."""

    begins_h: float = Field(default=0.0, ge=0, lt=DAY_H, description="hour of the day at which it begins, on average")
    hours: float = Field(default=DAY_H, gt=0, le=DAY_H, description="its length; 24: always there")
    spread_h: float = Field(default=0.0, ge=0, le=DAY_H, description="standard deviation of its begin among clients")


class Buffered(Section):
    """Asynchronous rounds: a version follows whenever `size` updates have come, from whatever version they began.

    Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639.
    """

    size: int = Field(default=10, ge=1, le=100_000, description="updates that make a version")
    exponent: float = Field(
        default=0.5, ge=0, le=10, description="an update that is s versions late counts 1 / (1 + s)^exponent"
    )
    most_stale: int = Field(default=0, ge=0, description="updates later than so many versions are refused; 0: none is")

    def discount(self, staleness: int) -> float:
        """What an update counts that began so many versions ago."""
        return (1 + staleness) ** -self.exponent


class World(Section):
    """Where virtual clients live. By default all are alike, always there, and nothing goes wrong."""

    examples_per_s: Spread = Field(default=Spread(median=100), description="examples that a client trains in a second")
    down_mbit_s: Spread = Field(default=Spread(median=100), description="to the client, 10^6 bits a second")
    up_mbit_s: Spread = Field(default=Spread(median=100), description="from the client")
    online: Online = Online()
    starts_h: float = Field(default=0.0, ge=0, description="hour at which the run starts")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="chance that a client leaves in the midst of a round's work"
    )
    crashes_per_h: float = Field(default=0.0, ge=0, le=1000, description="of training, on average")
    restart_s: float = Field(default=60.0, ge=0, description="from a crash until training goes on")
    checkpoint_s: float = Field(
        default=60.0, gt=0, description="of training that a crash costs at most; in masked rounds it costs the round"
    )
    stragglers: float = Field(
        default=0.0, ge=0, le=1, description="share of a cohort that gets through a part of its work only"
    )
    partial: Literal["by-strategy", "keep", "drop"] = Field(
        default="by-strategy", description="an update after a part of the work: FedProx keeps it, others drop it"
    )
    deadline_s: float = Field(default=0.0, ge=0, description="after which a round closes; 0: never")
    buffered: Buffered | None = Field(default=None, description="asynchronous rounds; absent: synchronous ones")
    trace: str = Field(default="", description="CSV of clients, which takes the distributions' place")
    period_h: float = Field(default=DAY_H, gt=0, description="hours after which a trace's windows come again")

    @model_validator(mode="after")
    def _waits_for_somebody(self) -> World:
        if self.buffered and (self.stragglers or self.deadline_s):
            raise ValueError(
                "asynchronous rounds wait for nobody: leave out stragglers and deadline_s, or leave out buffered"
            )
        return self

    def keeps_partial(self, recipe: Recipe) -> bool:
        """Whether an update after a part of the work counts.

        Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", section 5.2, arXiv:1812.06127.
        """
        if self.partial == "by-strategy":
            return recipe.strategy.name == "fedprox"
        return self.partial == "keep"

    def check(self, recipe: Recipe) -> None:
        """Raise OperatorError for a recipe whose rounds cannot be lived through here."""
        secure, strategy = recipe.secure, recipe.strategy
        if secure.on and secure.groups:
            raise OperatorError("secure.groups is not simulated in a world: set it to 0, or leave the world out")
        if self.stragglers and self.keeps_partial(recipe) and (recipe.train.steps or recipe.train.epochs) < 2:
            raise OperatorError(
                "world.stragglers do a part of their work: set train.epochs (or train.steps) to 2 or more"
            )
        if self.buffered is None:
            return
        why = ""
        if secure.on:
            why = (
                "in a masked sum all begin from one version and end together: set secure.on = false (--plain), or "
                "leave out world.buffered and over-select instead (cohort.over_select)"
            )
        elif strategy.combine != "mean":
            why = f'strategy.combine = "{strategy.combine}" compares updates to one version: set it to "mean"'
        elif strategy.flower:
            why = f'strategy.flower = "{strategy.flower}" is told of updates to one version: use fedavg or fedprox'
        elif strategy.algorithm != "plain":
            why = f'strategy.name = "{strategy.name}" relates updates to their round: use fedavg or fedprox'
        elif recipe.dp.of_clients:
            why = f'dp.mode = "{recipe.dp.mode}" reckons its noise for one cohort: use "local", or "off"'
        if why:
            raise OperatorError(f"asynchronous rounds (world.buffered) cannot do this: {why}")


def _around(median: float, spread: float) -> dict[str, float]:
    return {"median": median, "spread": spread}


# Assumptions of ours, but for the phones' drop-out: Bonawitz et al. 2019, "Towards Federated Learning at Scale",
# section 9, arXiv:1902.01046, saw 6 to 10 % and devices that take part at night, on a charger.
PRESETS: dict[str, dict[str, Any]] = {
    "hospitals": {
        "examples_per_s": _around(200, 0.7),
        "down_mbit_s": _around(200, 0.5),
        "up_mbit_s": _around(100, 0.5),
        "dropout": 0.01,
        "crashes_per_h": 0.01,
        "restart_s": 120,
    },
    "laptops": {
        "examples_per_s": _around(100, 0.5),
        "down_mbit_s": _around(50, 0.7),
        "up_mbit_s": _around(20, 0.7),
        "online": {"begins_h": 9, "hours": 8, "spread_h": 1},
        "starts_h": 9,
        "dropout": 0.05,
    },
    "phones": {
        "examples_per_s": _around(40, 0.8),
        "down_mbit_s": _around(20, 0.8),
        "up_mbit_s": _around(5, 0.8),
        "online": {"begins_h": 22, "hours": 8, "spread_h": 2},
        "starts_h": 22,
        "dropout": 0.08,
    },
}


def parse_world(values: Mapping[str, Any], *, where: str = "world") -> World:
    """Check a world's values; `like` names a preset that they change.

    Raises OperatorError that names each wrong key.
    """
    given = dict(values)
    if like := given.pop("like", None):
        if like not in PRESETS:
            raise OperatorError(f"{where}: there is no world {like!r} to be like; there are {', '.join(PRESETS)}")
        given = _over(PRESETS[like], given)
    try:
        return World.model_validate(given)
    except ValidationError as error:
        raise OperatorError(f"{where}: " + "; ".join(map(str, mistakes(error, World)))) from None


def load_world(given: World | Mapping[str, Any] | Path | str, changes: Mapping[str, Any] | None = None) -> World:
    """A world from a preset's name, a TOML file, or its values; a file's trace lies beside it.

    changes: as of `load_recipe`, dotted with `__`: {"buffered__size": 5}.
    """
    if isinstance(given, World):
        values, where = given.model_dump(exclude_none=True), "world"
    elif isinstance(given, Mapping):
        values, where = dict(given), "world"
    elif str(given) in PRESETS:
        values, where = {"like": str(given)}, "world"
    else:
        values, where = _read(Path(given).expanduser()), str(given)
    if changes:
        values = changed({**_over(PRESETS.get(values.pop("like", ""), {}), values)}, dict(changes))
    return parse_world(values, where=where)


def _read(path: Path) -> dict[str, Any]:
    if not path.suffix and not path.exists():
        raise OperatorError(f"there is no world {str(path)!r}: name one of {', '.join(PRESETS)}, or a TOML file")
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise OperatorError(f"cannot read the world {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None
    if isinstance(values.get("trace"), str) and values["trace"]:
        values["trace"] = str(path.parent.resolve() / values["trace"])
    return values


def _over(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` over those of `base`, table by table."""
    found = dict(base)
    for name, value in above.items():
        below = found.get(name)
        found[name] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found
