"""The tables of a recipe, each with its settings and what they take."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .errors import OperatorError
from .thresholds import MaskGraph, default_threshold, holders, mask_graph

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


class Parallel(Section):
    """How a client spreads a training over its processes; a site's own table takes the place of a recipe's.

    The product of `data`, `shard`, `tensor` and `pipeline` is the number of processes. What is computed is the same
    for every plan, up to the order of sums.
    """

    data: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="replicas of the model, each with its part of every batch; 0: as many as there are processes for",
    )
    shard: int = Field(
        default=1, ge=1, le=1024, description="processes among which a replica's weights, gradients and optimizer lie"
    )
    tensor: int = Field(default=1, ge=1, le=1024, description="processes that compute each large layer together")
    pipeline: int = Field(default=1, ge=1, le=1024, description="processes with consecutive layers each")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field(
        default="1f1b", description="order in which a pipeline takes its micro-batches"
    )
    offload: bool = Field(default=False, description="keep what `shard` splits in the machine's memory, not the GPU's")
    activation_checkpoint: bool = Field(
        default=False, description="keep each block's input only, and compute the rest again for the gradient"
    )

    @model_validator(mode="after")
    def _can_work(self) -> Parallel:
        if self.offload and self.shard == 1:
            raise ValueError("offload moves what is sharded: set shard to 2 or more, or offload = false")
        if self.activation_checkpoint and self.pipeline > 1 and self.schedule == "zero-bubble":
            raise ValueError(
                "zero-bubble takes a gradient in two halves, which a checkpoint cannot give: set schedule = "
                '"1f1b", or activation_checkpoint = false'
            )
        return self

    @property
    def model(self) -> int:
        """Processes that hold one replica together; 1: only the data are spread."""
        return self.shard * self.tensor * self.pipeline

    def world(self, processes: int) -> int:
        """How many processes train together at a site that has so many; raises OperatorError where it has too few."""
        needed = self.model * max(self.data, 1)
        if needed > processes:
            axes = {name: getattr(self, name) for name in ("data", "shard", "tensor", "pipeline")}
            asked = " * ".join(f"parallel.{name} = {n}" for name, n in axes.items() if n > 1)
            raise OperatorError(
                f"{asked} needs {'as many' if asked.count('=') == 1 else needed} processes, and this site has "
                f"{processes}: lower it, or set processes in client.toml"
            )
        world = needed if self.data else processes // self.model * self.model
        if self.schedule == "zero-bubble" and 1 < self.pipeline < world:
            raise OperatorError(
                "zero-bubble takes a gradient in two halves, which only a pipeline alone adds up: set data, shard and "
                'tensor to 1, or schedule = "interleaved"'
            )
        return world


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
