"""A recipe: what a run does, as an admin or researcher writes it (TOML), the API takes it (JSON) and SQL keeps it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from .errors import OperatorError
from .mistakes import mistakes
from .sections import LEAST_BITS, SMALLEST_SUM, Cohort, Dp, Name, Parallel, Section, Secure, Strategy, Train, ring_room
from .thresholds import MaskGraph, fewest


class Recipe(Section):
    """A run, whole. Every default is written into the run's row, so that a later release cannot change a run."""

    name: Name = Field(description="of the run, as people see it")
    task: Name = Field(description="what is trained, by the name under which the organizations have it installed")
    rounds: int = Field(default=10, ge=1, le=1_000_000, description="after which the run has finished")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of cohorts, batches and the first model")
    metrics: tuple[Name, ...] = Field(default=("loss", "accuracy"), description="what clients report of the task's own")
    cohort: Cohort = Cohort()
    strategy: Strategy = Strategy()
    train: Train = Train()
    parallel: Parallel = Parallel()
    secure: Secure = Secure()
    dp: Dp = Dp()

    @property
    def told(self) -> dict[str, Any]:
        """What every assignment of the run says of it, by the fields of `Assignment`."""
        return {
            "task": self.task,
            "train": self.train,
            "mu": self.strategy.mu,
            "weighting": self.strategy.weighting,
            "max_weight": self.strategy.weight_cap,
            "metrics": self.metrics,
            "seed": self.seed,
            "patience_s": self.cohort.patience_s,
            "parallel": self.parallel,
            "algorithm": self.strategy.algorithm,
        }

    @property
    def asked(self) -> int:
        """Clients asked in a round; 0: all that are online. A small ring bounds how many that may be."""
        if self.cohort.asked or not self.secure.on:
            return self.cohort.asked
        return (1 << (self.secure.ring_bits - LEAST_BITS)) - 1

    @property
    def bounds_total_weight(self) -> bool:
        """Whether masked rounds after the first are quantized by a bound on the sum of the weights.

        Not where every update weighs 1, where noise is added in units of the ring, or where groups are summed apart.
        """
        return self.strategy.weight_cap > 1 and self.dp.mode == "off" and not self.secure.groups

    def dp_of_round(self, clip_norm: float | None = None) -> Dp:
        """What the clients of a round are told: all in numbers. clip_norm: the round's, where it is adaptive."""
        if self.dp.mode == "off":
            return Dp()
        told = {"clip_norm": clip_norm or self.dp.clip_norm}
        if self.dp.adaptive and not self.dp.bit_noise:
            told["bit_noise"] = self.cohort.size / 20
        return self.dp.model_copy(update=told)

    @model_validator(mode="after")
    def _draws_by_lot(self) -> Recipe:
        for name in ("balanced", "mixture"):
            if self.dp.mode == "local" and getattr(self.train, name) != Train.model_fields[name].default:
                raise ValueError(
                    f'dp.mode = "local" draws every example with the same chance, which train.{name} would break: '
                    "leave it out"
                )
        return self

    @model_validator(mode="after")
    def _can_be_private(self) -> Recipe:
        dp = self.dp
        if not dp.of_clients:
            return self
        mode = f'dp.mode = "{dp.mode}"'
        if not dp.noise_multiplier:
            raise ValueError(f"{mode} needs dp.noise_multiplier above 0: without noise there is no privacy")
        if self.strategy.weighting != "uniform":
            raise ValueError(f'{mode} bounds each client alike: set strategy.weighting = "uniform"')
        if not self.cohort.size:
            raise ValueError(f"{mode} divides by a fixed number, not by how many were there: set cohort.size to it")
        if self.train.wire != "fp32":
            raise ValueError(f'{mode} needs train.wire = "fp32": rounding to bf16 would break the bound of the norm')
        if self.train.keep_zeros:
            raise ValueError(f"{mode} adds noise to every value, zeros as well: set train.keep_zeros = false")
        if self.secure.groups:
            raise ValueError(f"{mode} protects one sum over all clients: set secure.groups = 0")
        if dp.mode == "distributed" and not self.secure.on:
            raise ValueError(f"{mode} adds the noise inside the masks: set secure.on = true")
        if dp.mode == "distributed" and dp.colluders >= self.cohort.min:
            raise ValueError(
                f"dp.colluders = {dp.colluders} of a cohort.min of {self.cohort.min}: somebody must be left"
            )
        count_noise = self.dp_of_round().bit_noise
        if dp.adaptive and dp.noise_multiplier >= 2 * count_noise:
            raise ValueError(
                f"dp.noise_multiplier = {dp.noise_multiplier:g} cannot be reached while the count of clipped updates "
                f"has noise of {count_noise:g}: set dp.bit_noise above {dp.noise_multiplier / 2:g}, or dp.adaptive = "
                "false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_trained(self) -> Recipe:
        name, train = self.strategy.name, self.train
        if train.distill.weight and self.dp.mode == "local":
            raise ValueError('train.distill is not for dp.mode = "local": leave one of them out')
        if self.strategy.algorithm == "plain":
            return self
        said = f'strategy.name = "{name}"'
        if train.optimizer != "SGD":
            raise ValueError(
                f"{said} is exact with SGD only, whose steps add up to what was learned: {train.optimizer} has other "
                'steps. Set train.optimizer = "SGD", or strategy.name = "fedavg"'
            )
        if self.strategy.combine != "mean":
            raise ValueError(f'{said} needs the mean of all updates: set strategy.combine = "mean"')
        if name == "fednova" and self.dp.mode != "off":
            raise ValueError(f'{said} tells how many steps were taken, without noise: set dp.mode = "off"')
        if name == "scaffold":
            self._check_scaffold(said)
        return self

    def _check_scaffold(self, said: str) -> None:
        reads = f"{said} reads the mean gradient off the update"
        if self.parallel.local:
            raise ValueError(
                f'{reads}, to which each process\'s steps must be the same: set parallel.reduce = "allreduce"'
            )
        if self.train.optimizer_options.get("momentum"):
            raise ValueError(f"{reads}, which momentum blurs: leave it out")
        if self.train.clip_norm:
            raise ValueError(f"{reads}, which clipping bends: set train.clip_norm = 0")
        if self.dp.of_clients:
            raise ValueError(
                f'{said} sends control variates beside the update, and dp.mode = "{self.dp.mode}" would cover only '
                'the update: set strategy.name = "fedavg" or dp.mode = "off"'
            )
        size, population = self.cohort.size, self.strategy.population
        if size and population < size:
            raise ValueError(
                f"{said} asks {size} clients in a round and must know of how many: set strategy.population to the "
                "number of clients that take part in the run"
            )

    @model_validator(mode="after")
    def _can_be_exchanged(self) -> Recipe:
        if self.dp.mode == "local" and self.parallel.reduce != "allreduce":
            raise ValueError(
                'dp.mode = "local" sums bounded gradients itself, and only exactly: set parallel.reduce = "allreduce"'
            )
        return self

    @model_validator(mode="after")
    def _can_be_masked(self) -> Recipe:
        smallest = min(self.cohort.min, self.cohort.size or self.cohort.min)
        if self.secure.on and smallest < SMALLEST_SUM:
            raise ValueError(
                "secure aggregation needs cohort.min of 3 or more: with two, each reads the other's update"
            )
        if self.cohort.size and self.cohort.min > self.cohort.size:
            raise ValueError(f"cohort.min = {self.cohort.min} is more than cohort.size = {self.cohort.size}")
        if self.secure.on and self.train.wire != "fp32":
            raise ValueError('train.wire = "bf16" is for plain runs: a masked update is made of whole numbers')
        if (
            self.secure.on
            and ring_room(asked := max(self.cohort.asked, self.cohort.min), self.secure.ring_bits) < LEAST_BITS
        ):
            raise ValueError(
                f"secure.ring_bits = {self.secure.ring_bits} is too small for {asked} clients: their sum leaves "
                f"{ring_room(asked, self.secure.ring_bits)} bits of a value, {LEAST_BITS} are needed"
            )
        if self.cohort.over_select > 1 and not self.cohort.size:
            raise ValueError("cohort.over_select needs cohort.size: the number of updates that a round is closed with")
        if self.secure.on and self.cohort.goal:
            asked, goal = self.cohort.asked, self.cohort.goal
            needed = fewest(asked, *self.mask_graph(asked), self.cohort.min)
            if needed > goal:
                less = self.cohort.over_select * goal / needed
                raise ValueError(
                    f"of {asked} clients asked, {needed} are needed to unmask, but the round would close with "
                    f"{goal}: lower cohort.over_select to {less:.2f} or so, or set secure.threshold"
                )
        return self

    def mask_graph(self, n: int) -> MaskGraph:
        """How n clients mask: both sides of a round, and a coordinator that restarts, find the same."""
        cohort = self.cohort
        return self.secure.graph(n, spare=1 - cohort.goal / cohort.asked if cohort.goal else 0.0)

    @model_validator(mode="after")
    def _can_be_combined(self) -> Recipe:
        strategy, fewest = self.strategy, self.cohort.min
        if strategy.combine != "mean" and self.secure.on and not self.secure.groups:
            raise ValueError(
                f'strategy.combine = "{strategy.combine}" looks at single updates, which secure aggregation hides: set '
                "secure.groups = 5 or so, to sum inside groups and combine their means, or secure.on = false"
            )
        if strategy.combine != "mean" and self.dp.mode in ("central", "distributed"):
            raise ValueError(
                f'dp.mode = "{self.dp.mode}" reckons its noise for a sum: set strategy.combine = "mean", or dp.mode = '
                '"local"'
            )
        krum = 2 * strategy.byzantine + 3
        if strategy.combine == "krum" and fewest < max(krum, strategy.byzantine + strategy.selected):
            raise ValueError(
                f"krum among strategy.byzantine = {strategy.byzantine} needs {krum} updates, and no more than "
                f"n - byzantine of n can be selected: cohort.min = {fewest} is too few"
            )
        if self.secure.groups:
            self._check_groups()
        return self

    def _check_groups(self) -> None:
        groups, fewest = self.secure.groups, self.cohort.min
        if not self.secure.on:
            raise ValueError("secure.groups is for masked runs; with secure.on = false single updates are combined")
        if self.strategy.combine not in ("median", "trimmed_mean"):
            raise ValueError(
                f'secure.groups with strategy.combine = "{self.strategy.combine}" would tell more and protect from '
                'nothing: set combine = "median" or "trimmed_mean", or secure.groups = 0'
            )
        if groups < SMALLEST_SUM:
            raise ValueError(f"secure.groups = {groups}: with fewer than {SMALLEST_SUM}, none is the middle one")
        if fewest < SMALLEST_SUM * groups:
            raise ValueError(
                f"secure.groups = {groups} needs cohort.min of {SMALLEST_SUM * groups} or more, {SMALLEST_SUM} clients "
                f"in each group: it is {fewest}"
            )
        if self.secure.threshold or self.cohort.over_select > 1:
            raise ValueError(
                "secure.groups leaves secure.threshold at 0 and cohort.over_select at 1: each group has a threshold of "
                "its own, and waits for its own clients"
            )

    @property
    def fewest(self) -> int:
        """The fewest updates that may be in one sum: of the cohort, or of a group of it."""
        return self.cohort.min // (self.secure.groups or 1)


def parse_recipe(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Check a recipe's values; raises OperatorError that names each wrong key and what it takes."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise OperatorError(f"{where}: " + "; ".join(map(str, mistakes(error, Recipe)))) from None


def load_recipe(path: Path, **changes: Any) -> Recipe:
    """Read a TOML recipe; `changes` (dotted with `__`, as in `train__lr`) override what the file says."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise OperatorError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None
    values.pop("tune", None)  # what `murmur tune` varies: no part of a run
    return parse_recipe(changed(values, changes), where=str(path))


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with changes in place, whose keys name a table and its key as in `train__lr`."""
    for dotted, value in changes.items():
        *tables, key = dotted.split("__")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise OperatorError(f"{name} is a table of a recipe, not {table!r}")
        table[key] = value
    return values
