"""What the agent asks its trainer for, and what comes back: plain data, which needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..protocol.errors import MurmurError
from ..protocol.sections import Algorithm, Dp, Parallel, Train


class Cancelled(MurmurError):
    """The job was called off by its own side; nothing was written, and the ranks wait for the next job."""

    code, status, title = "cancelled", 409, "The job was cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One client's work on one version: evaluate it, and train from it unless `kind` says otherwise.

    kind: "inspect" does neither and gives the number of training examples.

    model: safetensors file of the round's version; update: where the trained difference is written.
    metrics: names of what is measured on the split "test"; the task computes all but `loss`.
    seed, round, client: together they fix every random choice, so the same job gives the same bytes again.
    checkpoint: folder where its state is kept every checkpoint_s seconds (0: never), and looked for at its start;
    digest: of all that decides the result, so that only the same job goes on from there.
    dp: in mode "local" it trains by DP-SGD; batches and noise are then secret, and no two trainings the same.
    own: what the client kept of this run from its last round, if anything; `own_after`: where it writes what it keeps.
    parallel: how its processes share the work; what it says of their number was obeyed by whoever started them.
    algorithm: what is done beside plain steps; with mu, the proximal pull.
    train_s: seconds of training after which what there is is sent, after one step at least; 0: all of it.
    expected: training examples that the site's ledger was charged for, 0 where it was not; others are refused.
    """

    id: str
    kind: Literal["train", "evaluate", "inspect"]
    model: Path
    update: Path
    train: Train
    mu: float
    metrics: tuple[str, ...]
    seed: int
    round: int
    client: str
    checkpoint: Path | None = None
    checkpoint_s: float = 0.0
    digest: str = ""
    dp: Dp = field(default_factory=Dp)
    expected: int = 0
    parallel: Parallel = field(default_factory=Parallel)
    own: Path | None = None
    algorithm: Algorithm = "plain"
    train_s: float = 0.0

    @property
    def own_after(self) -> Path:
        return self.update.with_name("own")

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes and `from_json` reads."""
        values = {name: getattr(self, name) for name in self.__slots__}
        optional = {name: str(values[name]) if values[name] else None for name in ("checkpoint", "own")}
        paths = {"model": str(self.model), "update": str(self.update), **optional}
        sections = {
            "train": self.train.model_dump(),
            "dp": self.dp.model_dump(),
            "parallel": self.parallel.model_dump(),
        }
        return values | paths | sections

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        read: dict[str, Any] = {
            "model": Path(values["model"]),
            "update": Path(values["update"]),
            **{name: Path(values[name]) if values[name] else None for name in ("checkpoint", "own")},
            "train": Train.model_validate(values["train"]),
            "dp": Dp.model_validate(values["dp"]),
            "parallel": Parallel.model_validate(values["parallel"]),
            "metrics": tuple(values["metrics"]),
        }
        return cls(**{**values, **read})


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a job gave.

    update: the written file, None for an evaluation. examples: training examples (test examples for an evaluation),
    each counted once whatever the epochs. steps: optimizer steps taken; those that fp16 skipped are not among them.
    metrics: (sum, count) of the incoming model on "test", and `train_loss` over the training itself.
    effective_steps: what FedNova divided the update by, 0 without it.
    """

    update: Path | None
    examples: int
    steps: int
    metrics: dict[str, tuple[float, float]]
    seconds: float
    effective_steps: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"update": str(self.update) if self.update else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        update = values["update"]
        read: dict[str, Any] = {
            "update": Path(update) if update else None,
            "metrics": {name: (float(total), float(count)) for name, (total, count) in values["metrics"].items()},
        }
        return cls(**{**values, **read})


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A sign of life: batches done, of evaluation and training together, out of all that the job has.

    loss: mean per example since the last one, of this rank's batches. examples_per_s: over all ranks.
    """

    step: int
    steps: int
    loss: float
    examples_per_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        return cls(**values)
