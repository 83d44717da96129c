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


def default_threshold(n: int) -> int:
    """Shares that unmask a round of n clients: two thirds and one.

    A lying coordinator with c clients on its side is held off while 2t > n + c, so up to (n - 1) // 3 of them; up to
    n - t clients may drop out.
    """
    return 2 * n // 3 + 1


class Secure(Section):
    """Secure aggregation: the coordinator learns the sum and nothing else."""

    on: bool = True
    threshold: int = Field(
        default=0, ge=0, le=100_000, description="shares that unmask; 0: two thirds of the cohort, plus one"
    )
    clip_value: float = Field(
        default=8.0, gt=0, le=1e6, description="largest value of an update; what is clipped is counted"
    )

    ring_bits: Literal[16, 24, 32] = Field(
        default=32, description="bits of a value on the wire: 24 saves a quarter of an upload, 16 half of it"
    )
    degree: int = Field(
        default=0, ge=0, le=10_000, description="clients that each shares masks with; 0: all of up to 50, else computed"
    )
    corrupt: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of the clients that may be the coordinator's, where degree is 0"
    )
    dropout: float = Field(default=0.1, ge=0, lt=0.5, description="share of the clients that may drop out, likewise")
    groups: int = Field(
        default=0, ge=0, le=10_000, description="sum inside so many groups, combine the groups' means; 0: one sum"
    )

    def threshold_of(self, n: int) -> int:
        """Shares that unmask in a cohort of n clients."""
        return self.threshold or default_threshold(n)


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
        if self.secure.on and smallest < 3:
            raise ValueError(
                "secure aggregation needs cohort.min of 3 or more: with two, each reads the other's update"
            )
        if self.cohort.size and self.cohort.min > self.cohort.size:
            raise ValueError(f"cohort.min = {self.cohort.min} is more than cohort.size = {self.cohort.size}")
        if self.secure.on and self.train.wire != "fp32":
            raise ValueError('train.wire = "bf16" is for plain runs: a masked update is made of whole numbers')
        if self.cohort.over_select > 1 and not self.cohort.size:
            raise ValueError("cohort.over_select needs cohort.size: the number of updates that a round is closed with")
        if self.secure.on and self.cohort.goal:
            asked = self.cohort.asked
            threshold = self.secure.threshold_of(asked)
            if threshold > self.cohort.goal:
                raise ValueError(
                    f"of {asked} clients asked, {threshold} are needed to unmask, but the round would close with "
                    f"{self.cohort.goal}: lower cohort.over_select to {self.cohort.goal / threshold:.2f} or so, or set "
                    "secure.threshold"
                )
        return self


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
