"""What one masked round is bound to.

Both sides build the same `Context`; its digest goes into every signature and every key. Two clients that were told
different models, layouts, settings or cohorts therefore derive different masks: their sum is noise, not a leak.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..protocol.encoding import canonical_json
from ..protocol.errors import PrivacyRefusal
from ..protocol.refusals import REASONS
from ..protocol.sections import LEAST_BITS, RINGS, ring_room
from ..protocol.thresholds import fewest, holders
from .fixed_point import Bounds


def refusal(reason: str, detail: str, *, clients: Sequence[str] = ()) -> PrivacyRefusal:
    """A refusal with a known reason; `clients` names those who caused it and stands in its facts."""
    assert reason in REASONS, reason
    error = PrivacyRefusal(reason, detail)
    if clients:
        error.facts["clients"] = list(clients)
    return error


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The terms of one attempt at a masked round; equal on both sides or nothing can be unmasked.

    dim, aux: elements of the ring vector and of the 64-bit auxiliary block.
    cohort: the ids of all clients asked, sorted as strings; threshold: shares that unmask; min_clients: the fewest
    updates that may be summed. clip_value, max_weight: bounds of one update's values and weight. ring_bits: 16, 24 or
    32 of a ring element. degree: neighbours of each client in the graph of masks; 0 is everybody. total_weight: what
    the weights may add up to; 0 where only max_weight bounds each of them.
    Raises PrivacyRefusal for terms under which a single update could be read, or that cannot be met.
    """

    run: str
    round: int
    attempt: int
    kind: str
    model_sha256: str
    layout_sha256: str
    settings_sha256: str
    dim: int
    aux: int
    cohort: tuple[str, ...]
    threshold: int
    min_clients: int
    clip_value: float
    max_weight: int
    ring_bits: int = 32
    degree: int = 0
    total_weight: int = 0

    def __post_init__(self) -> None:
        # 8 and 8.0 are the same bound and must have the same digest; so must a list and a tuple of ids.
        object.__setattr__(self, "clip_value", float(self.clip_value))
        object.__setattr__(self, "cohort", tuple(self.cohort))
        n = len(self.cohort)
        if list(self.cohort) != sorted(set(self.cohort)):
            raise refusal("cohort_order", "the cohort's ids must be different and sorted as strings")
        if n < 3:
            raise refusal("cohort_small", f"{n} clients in the cohort, at least 3 are needed")
        if self.degree < 0 or self.degree % 2:
            raise refusal("bad_terms", f"{self.degree} neighbours: a client has as many on either side")
        if 2 * self.threshold <= self.holders:
            detail = f"{self.threshold} of {self.holders} shares would unmask, more than half are needed"
            raise refusal("threshold_low", detail)
        if self.threshold > self.holders:
            raise refusal("threshold_high", f"{self.threshold} shares would be needed, {self.holders} are dealt")
        if not 2 <= self.min_clients <= n:
            raise refusal("min_clients_range", f"min_clients = {self.min_clients}, allowed are 2 to {n}")
        if self.dim < 0 or self.aux < 1:
            raise refusal("bad_terms", f"{self.dim} ring elements and {self.aux} auxiliary ones: 0 and 1 are the least")
        if not (math.isfinite(self.clip_value) and self.clip_value > 0 and self.max_weight >= 1):
            raise refusal(
                "bad_terms", f"clip_value = {self.clip_value}, max_weight = {self.max_weight}: both must be positive"
            )
        if self.ring_bits not in RINGS or self.total_weight < 0:
            raise refusal("bad_terms", f"a ring of {self.ring_bits} bits, weights of {self.total_weight} together")
        if (left := ring_room(n, self.ring_bits)) < LEAST_BITS:
            detail = f"{n} clients leave {left} bits of a value in a ring of {self.ring_bits}, {LEAST_BITS} are needed"
            raise refusal("bad_terms", detail)

    @property
    def bounds(self) -> Bounds:
        """What the fixed point depends on, as its functions take it."""
        return Bounds(
            clip_value=self.clip_value,
            max_weight=self.max_weight,
            n=len(self.cohort),
            ring_bits=self.ring_bits,
            total_weight=self.total_weight,
        )

    @property
    def holders(self) -> int:
        """Clients that hold a share of one client's secrets, itself among them."""
        return holders(len(self.cohort), self.degree)

    @property
    def fewest(self) -> int:
        """The fewest clients with which the round goes on: enough shares, and enough updates in the sum."""
        return fewest(len(self.cohort), self.degree, self.threshold, self.min_clients)

    def position(self, client: str) -> int:
        """The client's place in the cohort, from 1: where its shares lie on every polynomial."""
        return bisect_left(self.cohort, client) + 1

    def digest(self) -> bytes:
        """32 bytes that stand for these terms: the SHA-256 of their canonical JSON."""
        return hashlib.sha256(canonical_json(self.terms())).digest()

    def terms(self) -> dict[str, Any]:
        """The terms as JSON has them."""
        terms = asdict(self)
        for name, first in {"ring_bits": 32, "degree": 0, "total_weight": 0}.items():
            if terms[name] == first:  # release 0.1.0 knew no others, and its digests must stay what they were
                del terms[name]
        return terms
