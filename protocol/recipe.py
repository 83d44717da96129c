"""A recipe: what a run does, as an admin or researcher writes it (TOML), the API takes it (JSON) and SQL keeps it."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from .errors import OperatorError
from .thresholds import MaskGraph, default_threshold, fewest, holders, mask_graph

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class Section(BaseModel):
    """A table of a recipe: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def without_defaults(section: BaseModel, values: dict[str, Any], *names: str) -> dict[str, Any]:
    """What a section writes, without those of these fields that have their default."""
    plain = {name for name in names if getattr(section, name) == type(section).model_fields[name].default}
    return {name: value for name, value in values.items() if name not in plain}


class Cohort(Section):
    """Who is asked in a round."""

    size: int = Field(default=0, ge=0, le=100_000, description="clients asked in a round; 0 asks all that are online")
    min: int = Field(
        default=3, ge=1, le=100_000, description="fewest clients with which a round may start or be summed"
    )
    over_select: float = Field(
        default=1.0, ge=1, le=10, description="ask so many times `size`; a round closes when `size` have delivered"
    )
    patience_s: float = Field(
        default=60.0, gt=0, le=86_400, description="a client that is not heard for so long is dropped"
    )
    attempts: int = Field(default=3, ge=1, le=20, description="times a round is tried before the run fails")

    @property
    def asked(self) -> int:
        """Clients asked in a round; 0: all that are online."""
        return math.ceil(self.size * self.over_select)

    @property
    def goal(self) -> int:
        """Updates with which a round closes though others may still come; 0: it waits for everybody."""
        return self.size if self.over_select > 1 else 0


class Strategy(Section):
    """How updates combine and how the server moves. FedAvg is `mu = 0` with SGD of rate 1, FedProx one number more."""

    name: Literal["fedavg", "fedprox"] = "fedavg"
    mu: float = Field(default=0.0, ge=0, le=1e3, description="weight of FedProx's proximal term")
    server: str = Field(default="SGD", pattern=r"^[A-Za-z]{1,32}$", description="any optimizer of torch.optim")
    server_lr: float = Field(default=1.0, gt=0, le=1e3)
    server_options: dict[str, float | bool] = Field(default_factory=dict, description="e.g. {momentum = 0.9}")
    weighting: Literal["examples", "uniform"] = "examples"
    max_weight: int = Field(
        default=65_536, ge=1, le=1 << 31, description="an update never weighs more than so many examples"
    )
    combine: Literal["mean", "median", "trimmed_mean", "krum"] = Field(
        default="mean", description="what is made of the updates; all but the mean bound what a poisoned one can do"
    )
    trim: float = Field(
        default=0.2, gt=0, lt=0.5, description="trimmed_mean: share of the values that is cut at each end"
    )
    byzantine: int = Field(default=0, ge=0, le=100_000, description="krum: updates that may be poisoned")
    selected: int = Field(default=1, ge=1, le=100_000, description="krum: updates to average; more than 1: multi-Krum")

    @property
    def weight_cap(self) -> int:
        """The most that an update can weigh; the masked fixed point is as fine as this is small."""
        return 1 if self.weighting == "uniform" else self.max_weight

    @model_validator(mode="after")
    def _named_as_it_is(self) -> Strategy:
        if self.name == "fedavg" and self.mu:
            raise ValueError('mu belongs to FedProx: set name = "fedprox" or mu = 0')
        return self


class Train(Section):
    """What a client does locally."""

    epochs: int = Field(default=1, ge=1, le=10_000)
    batch_size: int = Field(
        default=32, ge=1, le=1 << 20, description="per optimizer step, over all processes of a client"
    )
    micro_batch: int = Field(
        default=0, ge=0, le=1 << 20, description="gradient accumulation in pieces of so many; 0: no pieces"
    )
    optimizer: str = Field(default="SGD", pattern=r"^[A-Za-z]{1,32}$", description="any optimizer of torch.optim")
    lr: float = Field(default=0.01, gt=0, le=1e3)
    optimizer_options: dict[str, float | bool] = Field(default_factory=dict)
    clip_norm: float = Field(default=0.0, ge=0, description="clip the gradient of a step to this norm; 0: never")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    wire: Literal["fp32", "bf16"] = Field(
        default="fp32", description="how a plain update travels: bf16 is half the bytes, at a relative error of 0.2 %"
    )

    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `wire` where it is fp32: agents of release 0.1.0 refuse a setting that they do not know."""
        return without_defaults(self, write(self), "wire")


RINGS = (16, 24, 32)  # bits of an element of a masked update
CLIPPED = 1e-3  # of all values: where more are cut to clip_value, somebody is told
ROUNDING = 0.01  # of the mean: the same for the error that the fixed point leaves in it
LEAST_BITS = 8  # of a value, sign and all: below, the rounding is as large as the update
SMALLEST_SUM = 3  # in a sum of two, each reads the other's update; of two groups' means, none is the middle one


def ring_room(n: int, ring_bits: int) -> int:
    """Bits of one value, with its sign, in a ring that holds the sum of n."""
    return ring_bits - n.bit_length()


class Secure(Section):
    """Secure aggregation: the coordinator learns the sum and nothing else."""

    on: bool = True
    threshold: int = Field(
        default=0, ge=0, le=100_000, description="shares that unmask; 0: two thirds of those dealt, or computed"
    )
    clip_value: float = Field(
        default=8.0, gt=0, le=1e6, description="largest value of an update; what is clipped is counted"
    )

    ring_bits: Literal[16, 24, 32] = Field(
        default=32,
        description="bits of a value on the wire: 24 saves a quarter of an upload, 16 half of it, where "
        "clip_value and strategy.max_weight are close to what occurs",
    )
    degree: int = Field(
        default=0,
        ge=0,
        le=10_000,
        multiple_of=2,
        description="clients that each shares masks with; 0: all of up to 50, or where threshold is set, else computed",
    )
    corrupt: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of the clients that may be the coordinator's, where degree is 0"
    )
    dropout: float = Field(default=0.1, ge=0, lt=0.5, description="share of the clients that may drop out, likewise")
    groups: int = Field(
        default=0, ge=0, le=10_000, description="sum inside so many groups, combine the groups' means; 0: one sum"
    )

    def graph(self, n: int, *, spare: float = 0.0) -> MaskGraph:
        """With how many each of n clients masks, and how many shares unmask; what is set here wins.

        spare: the share of the clients that the round is closed without.
        """
        if not self.degree and not self.threshold:
            return mask_graph(n, self.corrupt, max(self.dropout, spare))
        degree = self.degree if self.degree < n - 1 else 0
        return MaskGraph(degree, self.threshold or default_threshold(holders(n, degree)))

    @property
    def fewest_groups(self) -> int:
        """Groups with which a round goes on: more than half of them, and three, or there is no middle one."""
        return max(SMALLEST_SUM, self.groups // 2 + 1)


class Dp(Section):
    """Differential privacy: how much of one client, or of one example, may show in what comes out."""

    mode: Literal["off", "central", "distributed", "local"] = Field(
        default="off",
        description="central: the coordinator adds the noise; distributed: every client a part of it, inside the "
        "masks; local: DP-SGD at each client, for its own examples",
    )
    clip_norm: float = Field(
        default=1.0,
        ge=1e-6,
        le=1e6,
        description="L2 bound of a client's update; in local mode of an example's gradient",
    )
    noise_multiplier: float = Field(
        default=1.0, ge=0, le=1e4, description="standard deviation of the noise in the sum, in units of clip_norm"
    )
    delta: float = Field(default=1e-5, gt=0, lt=1)
    budget: float = Field(default=0.0, ge=0, description="the run ends before its epsilon exceeds this; 0: no bound")
    colluders: int = Field(
        default=0, ge=0, le=100_000, description="distributed: clients whose part of the noise does not count"
    )
    adaptive: bool = Field(default=False, description="move clip_norm to the quantile `quantile` of the updates' norms")
    quantile: float = Field(default=0.5, gt=0, lt=1)
    clip_lr: float = Field(default=0.2, gt=0, le=10, description="how fast an adaptive clip_norm moves")
    bit_noise: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="deviation of the noise in the count of updates below clip_norm; 0: a twentieth of cohort.size",
    )

    @property
    def of_clients(self) -> bool:
        """Whether a client's whole update is what is protected."""
        return self.mode in ("central", "distributed")

    @property
    def update_noise(self) -> float:
        """The noise multiplier of the updates' sum: more than noise_multiplier where the adaptive count needs a part.

        Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", theorem 1,
        arXiv:1905.03871.
        """
        if not self.adaptive:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2) ** -0.5


class Recipe(Section):
    """A run, whole. Every default is written into the run's row, so that a later release cannot change a run."""

    name: Name
    task: Name
    rounds: int = Field(default=10, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    metrics: tuple[Name, ...] = ("loss", "accuracy")
    cohort: Cohort = Cohort()
    strategy: Strategy = Strategy()
    train: Train = Train()
    secure: Secure = Secure()
    dp: Dp = Dp()

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
        lines = [f"{'.'.join(map(str, e['loc'])) or where}: {e['msg']}" for e in error.errors()]
        raise OperatorError(f"{where}: " + "; ".join(lines)) from None


def load_recipe(path: Path, **changes: Any) -> Recipe:
    """Read a TOML recipe; `changes` (dotted with `__`, as in `train__lr`) override what the file says."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise OperatorError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None
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
