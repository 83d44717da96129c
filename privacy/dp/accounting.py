"""What the uses of noisy mechanisms add up to: a ledger of events in, one epsilon out, with all that it rests on.

Two accountants: "rdp" (Rényi, Mironov et al. 2019, arXiv:1908.10530) answers in milliseconds and is shown while a run
goes on; "pld" (privacy loss distributions, Doroshenko et al. 2022, arXiv:2207.04380) is tighter, takes seconds, and is
for a run that has ended. Both come from dp-accounting, which is imported when the first epsilon is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from ...protocol.errors import OperatorError

Unit = Literal["client", "example"]
Accountant = Literal["rdp", "pld"]
Sampling = Literal["none", "poisson", "without_replacement"]
Relation = Literal["add_or_remove", "replace"]

PLD_STEP = 1e-4  # width of a privacy loss's bin; the epsilon is rounded up by less than this
PLD_BINS = 1e5  # bins below the epsilon; where it is so large that nobody minds, they are wider instead of more


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`count` uses of the Gaussian mechanism on a sum of clipped contributions, one per unit of privacy.

    noise_multiplier: standard deviation of the noise, in units of the bound C of *one contribution's* L2 norm. That
    holds for both relations: where one contribution is replaced, the sum may move by 2 C, and the accounting knows it.
    sampling: who was in the sum, and nobody was told: "none" everybody; "poisson" each with probability `rate`;
    "without_replacement" a uniform choice of `taken` out of `of`.
    relation: what makes two data sets neighbours: one unit more or less, or one unit replaced by another.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0
    taken: int = 0
    of: int = 0
    relation: Relation = "add_or_remove"
    count: int = 1
    kind: Literal["gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: a finite number of 0 or more is needed")
        if self.count < 1:
            raise ValueError(f"count = {self.count}: an event happened at least once")
        if not 0 < self.rate <= 1 or (self.sampling != "poisson" and self.rate != 1):
            raise ValueError(
                f"rate = {self.rate} with sampling {self.sampling!r}: it is Poisson's, above 0 and up to 1"
            )
        if self.sampling == "without_replacement":
            if not 1 <= self.taken <= self.of:
                raise ValueError(f"{self.taken} of {self.of} without replacement: at least 1, at most all")
            if self.relation != "replace":
                raise ValueError('a choice of fixed size is accounted for with relation = "replace" only')
        elif self.taken or self.of:
            raise ValueError('taken and of belong to sampling = "without_replacement"')

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes and `from_json` reads; what has its default is left out."""
        plain = Event(noise_multiplier=self.noise_multiplier)
        values = {name: getattr(self, name) for name in self.__slots__}
        always = ("kind", "noise_multiplier", "count")
        return {name: v for name, v in values.items() if name in always or v != getattr(plain, name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Event:
        """Raises ValueError or TypeError for what `to_json` does not write."""
        if values.get("kind") != "gaussian":
            raise ValueError(f"an event of kind {values.get('kind')!r} is not known to this release")
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Epsilon:
    """An epsilon with all without which it says nothing. `value` is infinite where no noise was added."""

    value: float
    delta: float
    unit: Unit
    accountant: Accountant
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes; an infinite epsilon is null, for JSON has no infinity."""
        value = self.value if math.isfinite(self.value) else None
        return {
            "value": value,
            "delta": self.delta,
            "unit": self.unit,
            "accountant": self.accountant,
            "assumptions": list(self.assumptions),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Epsilon:
        value = math.inf if values["value"] is None else float(values["value"])
        read: dict[str, Any] = {"value": value, "assumptions": tuple(values["assumptions"])}
        return cls(**{**values, **read})


def epsilon(
    events: Iterable[Event],
    delta: float,
    accountant: Accountant = "rdp",
    *,
    unit: Unit,
    assumptions: Iterable[str] = (),
) -> Epsilon:
    """The epsilon of all events together, whatever their order; kept for the next call with the same ledger.

    unit: whose contribution each event's bound is for: a client's whole update, or one example's gradient.
    assumptions: what the mechanism rests on besides; those of the accounting itself are added.
    Raises OperatorError for a ledger that the accountant cannot take: PLD knows no sampling without replacement, RDP
    no Poisson sampling under "replace", and neither two relations in one ledger.
    """
    if not 0 < delta < 1:
        raise OperatorError(f"delta = {delta}: a number between 0 and 1 is needed")
    ledger = _ledger(events)
    return Epsilon(
        value=_value(ledger, delta, accountant),
        delta=delta,
        unit=unit,
        accountant=accountant,
        assumptions=(*assumptions, *_assumptions(ledger, unit)),
    )


def rounds_within(event: Event, budget: float, delta: float, *, most: int, spent: Iterable[Event] = ()) -> int:
    """How often `event` may happen after `spent`, at most `most` times, so that RDP's epsilon stays within `budget`."""
    before = tuple(spent)

    def fits(n: int) -> bool:
        more = (replace(event, count=n * event.count),) if n else ()
        return _value(_ledger((*before, *more)), delta, "rdp") <= budget

    low, high = 0, most  # the epsilon only grows with n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _ledger(events: Iterable[Event]) -> tuple[Event, ...]:
    """The events in one order, equal ones joined: composition does not depend on either, and caches like it so.

    n uses without sampling are exactly one with 1 / sqrt(n) of the noise, also where their noise differs.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        counts[replace(event, count=1)] += event.count
    relations: set[Relation] = {event.relation for event in counts}
    if len(relations) > 1:
        raise OperatorError(f"one ledger has one neighbouring relation, this one has {' and '.join(sorted(relations))}")
    plain = {e: n for e, n in counts.items() if e.sampling == "none" or (e.sampling == "poisson" and e.rate == 1)}
    rest = [replace(event, count=n) for event, n in counts.items() if event not in plain]
    if plain:
        silent = any(not e.noise_multiplier for e in plain)
        precision = math.fsum(n / e.noise_multiplier**2 for e, n in plain.items()) if not silent else math.inf
        rest.append(Event(noise_multiplier=1 / math.sqrt(precision), relation=relations.pop()))
    return tuple(sorted(rest, key=lambda e: repr(e)))


@lru_cache(maxsize=1024)
def _value(ledger: tuple[Event, ...], delta: float, accountant: Accountant) -> float:
    if not ledger:
        return 0.0
    if any(not event.noise_multiplier for event in ledger):
        return math.inf
    _check(ledger, accountant)
    with _quietly():
        found = _rdp(ledger, delta) if accountant == "rdp" else _pld(ledger, delta)
    return max(0.0, found)


def _check(ledger: tuple[Event, ...], accountant: Accountant) -> None:
    for event in ledger:
        if accountant == "pld" and event.sampling == "without_replacement":
            raise OperatorError('sampling without replacement has no PLD accounting: use accountant = "rdp"')
        if accountant == "rdp" and event.sampling == "poisson" and event.relation == "replace":
            raise OperatorError('Poisson sampling under "replace" has no RDP accounting: use accountant = "pld"')


def _rdp(ledger: tuple[Event, ...], delta: float) -> float:
    from dp_accounting import rdp

    # dp-accounting's RDP takes the noise relative to the sum's own sensitivity: 2 C where one unit is replaced.
    accountant = rdp.RdpAccountant(neighboring_relation=_relation(ledger))
    for event in ledger:
        accountant.compose(_dp_event(replace(event, noise_multiplier=_relative(event))))
    return accountant.get_epsilon(delta)


def _pld(ledger: tuple[Event, ...], delta: float) -> float:
    from dp_accounting import pld

    # Its PLD, unlike its RDP, takes the noise relative to C, and doubles the sensitivity itself.
    rough = _rdp(tuple(replace(e, relation="add_or_remove", noise_multiplier=_relative(e)) for e in ledger), delta)
    step = max(PLD_STEP, rough / PLD_BINS)
    accountant = pld.PLDAccountant(_relation(ledger), value_discretization_interval=step)
    for event in ledger:
        accountant.compose(_dp_event(event))
    return accountant.get_epsilon(delta)


def _relative(event: Event) -> float:
    """The noise in units of how far the sum moves between neighbours."""
    return event.noise_multiplier / (2 if event.relation == "replace" else 1)


def _relation(ledger: tuple[Event, ...]) -> Any:
    from dp_accounting import NeighboringRelation

    replaced = ledger[0].relation == "replace"
    return NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE


def _dp_event(event: Event) -> Any:
    import dp_accounting as dp

    noisy: Any = dp.GaussianDpEvent(event.noise_multiplier)
    if event.sampling == "poisson":
        noisy = dp.PoissonSampledDpEvent(event.rate, noisy)
    elif event.sampling == "without_replacement":
        noisy = dp.SampledWithoutReplacementDpEvent(event.of, event.taken, noisy)
    return dp.SelfComposedDpEvent(noisy, event.count) if event.count > 1 else noisy


@contextmanager
def _quietly() -> Generator[None]:
    """dp-accounting warns through absl of every Rényi order that it leaves out; the others give the epsilon."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _assumptions(ledger: tuple[Event, ...], unit: Unit) -> tuple[str, ...]:
    if not ledger:
        return ()
    whose = {"client": "one client's whole participation", "example": "one training example"}[unit]
    replaced = ledger[0].relation == "replace"
    said = [f"neighbours differ in {whose}: " + ("replaced by another" if replaced else "present or absent")]
    if any(event.sampling != "none" for event in ledger):
        said.append("who was sampled stays secret, also from those who are sampled")
    return tuple(said)
