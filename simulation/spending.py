"""What the trials of a search spend of differential privacy, together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..clients.ledger import ASSUMPTIONS
from ..privacy.dp.accounting import Epsilon, Event, epsilon
from ..privacy.dp.plan import epsilon_of
from ..protocol.recipe import Recipe

ALL_CLIENTS = "clients"  # whose events protect clients whole; the other ledgers are clients', for their own examples
ADAPTIVE = "later trials were chosen by what earlier ones gave; each trial's own noise was fixed before it began"

Spent = Mapping[str, tuple[Event, ...]]


def joined(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """The same events, equal ones as one with their count."""
    counts: Counter[Event] = Counter()
    for event in events:
        counts[replace(event, count=1)] += event.count
    return tuple(replace(event, count=n) for event, n in counts.items())


def together(*ledgers: Spent) -> dict[str, tuple[Event, ...]]:
    """What several trials have spent, added up by whose ledger it stands in."""
    names = sorted({whose for ledger in ledgers for whose in ledger})
    return {whose: joined(tuple(e for ledger in ledgers for e in ledger.get(whose, ()))) for whose in names}


def epsilons(recipe: Recipe, spent: Spent) -> dict[str, Epsilon]:
    """What ledgers come to at the recipe's delta, by RDP, whose composition may be adaptive.

    Source: Feldman and Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter", theorem 4.3, arXiv:2008.11193.
    """
    found: dict[str, Epsilon] = {}
    for whose, events in spent.items():
        if whose == ALL_CLIENTS:
            said = epsilon_of(recipe, events)
        else:
            said = epsilon(events, recipe.dp.delta, unit="example", assumptions=ASSUMPTIONS)
        found[whose] = replace(said, assumptions=(*said.assumptions, ADAPTIVE))
    return found


def written(spent: Spent) -> dict[str, Any]:
    """A value that `json.dumps` takes."""
    return {whose: [e.to_json() for e in joined(events)] for whose, events in spent.items()}


def read_spent(attributes: Mapping[str, Any]) -> Spent:
    """What `written` made of it, among a trial's attributes."""
    kept: Mapping[str, Any] = attributes.get("spent", {})
    return {whose: tuple(Event.from_json(e) for e in events) for whose, events in kept.items()}
