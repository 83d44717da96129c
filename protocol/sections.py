"""The tables of a recipe, each with its settings and what they take."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .errors import OperatorError
from .thresholds import MaskGraph, default_threshold, holders, mask_graph

Algorithm = Literal["plain", "scaffold", "fednova"]
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
    """How updates combine and how the server moves. FedAvg is `mu = 0` with SGD of rate 1, FedProx one number more.

    SCAFFOLD and FedNova say what clients do locally, and need the server's help (`aggregation.local`).
    """

    name: Literal["fedavg", "fedprox", "scaffold", "fednova"] = "fedavg"
    mu: float = Field(default=0.0, ge=0, le=1e3, description="weight of FedProx's proximal term")
    population: int = Field(
        default=0, ge=0, le=1 << 31, description="scaffold: clients that cohorts are drawn from; 0: a cohort is all"
    )
    server: str = Field(default="SGD", pattern=r"^[A-Za-z]{1,32}$", description="any optimizer of torch.optim")
    server_lr: float = Field(default=1.0, gt=0, le=1e3, description="1 with SGD takes the clients' mean as it is")
    server_options: dict[str, float | bool] = Field(default_factory=dict, description="e.g. {momentum = 0.9}")
    weighting: Literal["examples", "uniform"] = Field(default="examples", description="what an update weighs by")
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
    flower: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9_.-]{0,63})?$",
        description='an installed strategy of Flower\'s that moves the server, e.g. "fedyogi"; in place of `server`',
    )
    flower_options: dict[str, bool | int | float | str] = Field(
        default={}, description="arguments with which it is made, e.g. {eta = 0.1}"
    )

    @property
    def algorithm(self) -> Algorithm:
        """What clients are told to do; with the proximal term or without, they train plainly."""
        return self.name if self.name in ("scaffold", "fednova") else "plain"

    @property
    def weight_cap(self) -> int:
        """The most that an update can weigh; the masked fixed point is as fine as this is small."""
        return 1 if self.weighting == "uniform" else self.max_weight

    @model_validator(mode="after")
    def _named_as_it_is(self) -> Strategy:
        if self.name != "fedprox" and self.mu:
            raise ValueError('mu belongs to FedProx: set name = "fedprox" or mu = 0')
        if self.name != "scaffold" and self.population:
            raise ValueError('population belongs to SCAFFOLD: set name = "scaffold" or population = 0')
        if self.flower and (self.server, self.server_lr, self.server_options) != ("SGD", 1.0, {}):
            raise ValueError("flower moves the server: leave server, server_lr and server_options out")
        if self.flower_options and not self.flower:
            raise ValueError('flower_options are of a Flower strategy: name it, as in flower = "fedyogi"')
        return self

    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write(self), "flower", "flower_options")


class Mixture(Section):
    """How a client draws from several data sets, where its task's data is a dict of them."""

    mode: Literal["mixed", "round-robin"] = Field(
        default="mixed", description="mixed: every batch from all of them; round-robin: they take turns, a batch each"
    )
    weights: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        default_factory=dict, description="share of the drawn examples by data set; empty: by their sizes"
    )
    temperature: float = Field(
        default=1.0, ge=1, le=1e6, description="shares by size to the power of 1 / temperature: large makes them equal"
    )
    batch_sizes: dict[str, Annotated[int, Field(ge=1, le=1 << 20)]] = Field(
        default_factory=dict, description="round-robin: in place of batch_size, by data set"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Mixture:
        if self.weights and self.temperature != 1:
            raise ValueError("weights and temperature both say the shares: set one of them")
        if self.batch_sizes and self.mode == "mixed":
            raise ValueError('batch_sizes are of data sets that take turns: set mode = "round-robin", or weights')
        return self


class Distill(Section):
    """Distillation from the round's model: a client's model is also trained toward what that model answers."""

    weight: float = Field(default=0.0, ge=0, le=1e3, description="of the divergence beside the task's loss; 0: none")
    temperature: float = Field(default=1.0, gt=0, le=100, description="by which both models' logits are divided")


class Train(Section):
    """What a client does locally."""

    epochs: int = Field(default=1, ge=1, le=10_000, description="passes over a client's own data in a round")
    steps: int = Field(
        default=0, ge=0, le=1_000_000, description="optimizer steps in place of epochs; 0: whole epochs are trained"
    )
    batch_size: int = Field(
        default=32, ge=1, le=1 << 20, description="per optimizer step, over all processes of a client"
    )
    micro_batch: Annotated[int, Field(ge=0, le=1 << 20)] | Literal["auto"] = Field(
        default=0,
        description='gradient accumulation in pieces of so many; 0: no pieces; "auto": halved when memory runs out',
    )
    optimizer: str = Field(default="SGD", pattern=r"^[A-Za-z]{1,32}$", description="any optimizer of torch.optim")
    lr: float = Field(default=0.01, gt=0, le=1e3, description="learning rate of the clients' optimizer")
    optimizer_options: dict[str, float | bool] = Field(default_factory=dict, description="e.g. {momentum = 0.9}")
    clip_norm: float = Field(default=0.0, ge=0, description="clip the gradient of a step to this norm; 0: never")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool | Literal["inductor", "aot_eager", "eager"] = Field(
        default=False, description="train the model as a static graph; true: torch.compile's own backend, inductor"
    )
    wire: Literal["fp32", "bf16"] = Field(
        default="fp32", description="how a plain update travels: bf16 is half the bytes, at a relative error of 0.2 %"
    )
    balanced: bool = Field(default=False, description="draw as many examples of each class that a client has")
    mixture: Mixture = Mixture()
    qat: bool = Field(default=False, description="train weights that lose little when they are exported as int8")
    keep_zeros: bool = Field(default=False, description="weights that are zero in a round's model stay zero in it")
    distill: Distill = Distill()

    @property
    def piece(self) -> int:
        """Examples of a piece at most: a whole batch where none is asked for, or "auto" has not found a number yet."""
        return self.batch_size if self.micro_batch == "auto" else self.micro_batch or self.batch_size

    def batches_of(self, examples: int) -> int:
        """Batches of an epoch over so many examples."""
        return -(-examples // self.batch_size)

    def steps_over(self, examples: int) -> int:
        """Optimizer steps of a round over so many examples."""
        return self.steps or self.epochs * self.batches_of(examples)

    @model_validator(mode="after")
    def _has_one_length(self) -> Train:
        if self.steps and self.epochs != type(self).model_fields["epochs"].default:
            raise ValueError("train.steps takes the place of train.epochs: set one of them")
        return self

    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what has its default: agents of release 0.1.0 refuse a setting that they do not know."""
        new = ("balanced", "mixture", "qat", "keep_zeros", "distill", "steps", "compile")
        return without_defaults(self, write(self), "wire", *new)


class Parallel(Section):
    """How a client spreads a training over its processes; a site's own table takes the place of a recipe's.

    The product of `data`, `shard`, `tensor` and `pipeline` is the number of processes; what is computed is the same for
    all of these, up to the order of sums. reduce: "allreduce", "bf16", "fp16" and "powersgd" sum gradients at every
    step; with "local-sgd", "gossip" (in a ring) and "gossip-pairs" each process trains a model of its own between two
    averages.
    """

    data: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="replicas of the model, each with its part of every batch; 0: as many as there are processes for",
    )
    reduce: Literal["allreduce", "bf16", "fp16", "powersgd", "local-sgd", "gossip", "gossip-pairs"] = Field(
        default="allreduce", description="how replicas keep together: what they exchange, and how often"
    )
    sync_every: int = Field(
        default=8, ge=1, le=1_000_000, description="local-sgd and gossip: optimizer steps between two averages"
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

    @property
    def local(self) -> bool:
        """Whether replicas go apart between two averages."""
        return self.reduce in ("local-sgd", "gossip", "gossip-pairs")

    @property
    def model(self) -> int:
        """Processes that hold one replica together; 1: only the data are spread."""
        return self.shard * self.tensor * self.pipeline

    @model_validator(mode="after")
    def _fits_together(self) -> Parallel:
        if not self.local and self.sync_every != type(self).model_fields["sync_every"].default:
            raise ValueError(
                f'parallel.sync_every is for local-sgd and gossip: reduce = "{self.reduce}" exchanges gradients at '
                "every step"
            )
        if self.model > 1 and self.reduce != "allreduce":
            raise ValueError(
                f'parallel.reduce = "{self.reduce}" is between processes that have the whole model each: set shard, '
                'tensor and pipeline to 1, or reduce = "allreduce"'
            )
        if self.offload and self.shard == 1:
            raise ValueError("offload moves what is sharded: set shard to 2 or more, or offload = false")
        if self.activation_checkpoint and self.pipeline > 1 and self.schedule == "zero-bubble":
            raise ValueError(
                "zero-bubble takes a gradient in two halves, which a checkpoint cannot give: set schedule = "
                '"1f1b", or activation_checkpoint = false'
            )
        return self

    @model_serializer(mode="wrap")
    def _as_earlier_agents_know_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write(self), *(name for name in type(self).model_fields if name != "data"))

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
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which epsilon is told")
    budget: float = Field(default=0.0, ge=0, description="the run ends before its epsilon exceeds this; 0: no bound")
    colluders: int = Field(
        default=0, ge=0, le=100_000, description="distributed: clients whose part of the noise does not count"
    )
    adaptive: bool = Field(default=False, description="move clip_norm to the quantile `quantile` of the updates' norms")
    quantile: float = Field(default=0.5, gt=0, lt=1, description="share of the updates that is not clipped")
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
