"""The messages between agents and the coordinator; a field that is not known is refused on both sides.

An agent enrols once, exchanges a signed request for a short-lived token, and polls. What it gets is an `Assignment`:
one client's part of one attempt at a round. From then on the two hold a conversation about it: the coordinator's next
word is a `Step`, long-polled; the agent's are signed posts. A plain round needs only the upload; under secure
aggregation the steps carry the bodies that `privacy.secagg` makes and reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from .encoding import canonical_json, sha256_hex
from .sections import Algorithm, Dp, Name, Parallel, Train, without_defaults

TRAIN_LOSS = "train_loss"  # the one metric that every task has: the mean loss over the local training
POLL_HEADER = "Murmur-Poll"  # of a poll: which process of the agent asks, for which time, as in 3f2a9c01b7d4e6f8.17
INLINE_HEADER = "Murmur-Inline"  # of the answer to a poll: updates of so many bytes may come inside `Complete`
INLINE_BYTES = 16 << 10
KNOWS_HEADER = "Murmur-Knows"  # of a poll: names, set off by commas, of what this agent can do that 0.1.0 could not
TOTAL_WEIGHT = "total_weight"  # such a name: it quantizes by a bound on the sum of the weights
LOCAL_STEPS = "local_steps"  # FedNova's effective steps of the local training, a mean by weight
OF_TRAINING = (TRAIN_LOSS, LOCAL_STEPS)  # measured while training, all others on the incoming model
Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # what SQL takes
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=4096)]
Ref = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,200}$")]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Kind(StrEnum):
    """What an assignment asks for: an update and metrics, or metrics alone."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class StepKind(StrEnum):
    """The coordinator's words in the conversation about an assignment, in their order."""

    ROSTER = "roster"  # secure: every advert; the agent answers with `shares`
    INBOX = "inbox"  # secure: the shares meant for this client; the agent may now upload
    SURVIVORS = "survivors"  # secure: whose upload is in; the agent answers with `agree`
    REVEAL = "reveal"  # secure: the signatures on it; the agent answers with `reveal`
    DONE = "done"  # counted; nothing more to do
    GONE = "gone"  # the attempt ended without this client; `reason` says why


class AnswerKind(StrEnum):
    """The agent's words; each is accepted once, the same bytes again are answered as the first time."""

    ADVERT = "advert"
    SHARES = "shares"
    AGREE = "agree"
    REVEAL = "reveal"


class AgentInfo(Message):
    """What an agent says of itself; shown to admins, used for nothing else."""

    version: Text
    tasks: tuple[Name, ...] = ()
    gpus: tuple[Text, ...] = ()
    cpus: int = Field(default=1, ge=1, le=65_536)


class Enrol(Message):
    """Signed by the key that it carries (proof of possession)."""

    token: str = Field(min_length=16, max_length=128)
    name: Name
    public_key: str = Field(max_length=64, description="base64 of the 32 bytes of an Ed25519 public key")
    info: AgentInfo


class Enrolled(Message):
    client: Name
    state: Literal["pending", "active"]
    fingerprint: Text


class Token(Message):
    token: str
    expires_s: float


class Poll(Message):
    """Ask for work. `busy` names the assignments that the agent still works on, with how far each has come."""

    info: AgentInfo
    busy: dict[Ref, Progress] = {}


class Progress(Message):
    """Sign of life of an assignment: whatever counts up, so that a standstill can be told from slowness."""

    phase: Literal["waiting", "downloading", "training", "uploading"]
    step: Count = 0
    steps: Count = 0
    bytes: Count = 0


class SecureTerms(Message):
    """What secure aggregation of this attempt is bound to; part of the key derivation on both sides."""

    cohort: tuple[Name, ...]
    threshold: int = Field(ge=2)
    min_clients: int = Field(ge=2)
    clip_value: float = Field(gt=0)
    ring_bits: Literal[16, 24, 32] = 32
    total_weight: int = Field(default=0, ge=0, le=1 << 62, description="of the cohort at most; 0: no such bound")
    degree: int = Field(default=0, ge=0, description="neighbours of a client in the graph of masks; 0: everybody")

    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_them(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what has its default: agents of release 0.1.0 refuse a term that they do not know."""
        return without_defaults(self, write(self), "ring_bits", "total_weight", "degree")


class Assignment(Message):
    """One client's part of one attempt at a round."""

    id: Ref
    fence: int = Field(
        ge=1, description="grows with each time the assignment is handed out; an older holder is refused"
    )
    run: Ref
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    kind: Kind
    task: Name
    model: Digest
    model_bytes: int = Field(ge=1)
    train: Train
    mu: float = Field(ge=0)
    weighting: Literal["examples", "uniform"]
    max_weight: int = Field(ge=1, description="an update weighs no more than this, masked or not")
    metrics: tuple[Name, ...]
    seed: int
    patience_s: float
    secure: SecureTerms | None
    dp: Dp = Dp()
    parallel: Parallel = Parallel()
    algorithm: Algorithm = "plain"

    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write(self), "dp", "parallel", "algorithm")

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the metrics that an agent reports, in the order of a masked round's auxiliary block."""
        return (*(OF_TRAINING if self.algorithm == "fednova" else (TRAIN_LOSS,)), *self.metrics)

    def settings(self) -> dict[str, Any]:
        """All that decides what is computed on this model, as JSON has it."""
        settings: dict[str, Any] = {
            "train": self.train.model_dump(mode="json"),
            "mu": self.mu,
            "weighting": self.weighting,
            "metrics": list(self.metrics),
            "seed": self.seed,
        }
        for name, section in (("dp", self.dp), ("parallel", self.parallel)):
            if section != type(section)():  # release 0.1.0 knew none, and its digests must stay what they were
                settings[name] = section.model_dump(mode="json")
        return settings | ({"algorithm": self.algorithm} if self.algorithm != "plain" else {})

    def settings_sha256(self) -> str:
        """Digest of the settings; both sides bind the masks to it."""
        return settings_digest(self.settings())


def settings_digest(settings: Mapping[str, Any]) -> str:
    return sha256_hex(canonical_json(settings))


class Work(Message):
    """Answer to a poll: perhaps an assignment, the ones among `busy` that are void, and when to come back."""

    assignment: Assignment | None = None
    void: tuple[Ref, ...] = ()
    next_poll_s: float = 0.0


class Step(Message):
    kind: StepKind
    body: str = Field(default="", description="canonical JSON made by privacy.secagg, empty for done and gone")
    reason: Text = ""


class UploadOffer(Message):
    fence: int = Field(ge=1, lt=1 << 63)
    sha256: Digest
    size: int = Field(ge=1, lt=1 << 63)


class UploadState(Message):
    """Where the upload goes on; `offset == size` when the coordinator has all of it."""

    offset: int = Field(ge=0)
    size: int = Field(ge=0)


class Total(Message):
    """A metric as a pair, so that it adds over batches, processes and clients; the mean is `sum / count`."""

    sum: float
    count: float = Field(ge=0)


class Complete(Message):
    """Names the uploaded update. In a masked round weight and metrics lie inside the masks and are absent here."""

    fence: int = Field(ge=1, lt=1 << 63)
    sha256: Digest
    weight: float | None = Field(default=None, ge=0, le=1 << 31)
    metrics: dict[Name, Total] | None = None
    data: str | None = Field(
        default=None,
        max_length=INLINE_BYTES * 4 // 3 + 4,
        description="base64 of the update itself, where it is small and the coordinator says that it takes it so",
    )


class Failure(Message):
    """The agent cannot deliver: an error in the task, a refusal by its policy. The agent lives on."""

    fence: int = Field(ge=1, lt=1 << 63)
    code: Ref
    detail: Text


class Accepted(Message):
    """Said only after the fact is on disk."""

    accepted: Literal[True] = True
