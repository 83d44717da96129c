"""The round as a state machine: what an attempt at a round may be doing, and what may happen next.

Everything durable about a round is the state of its newest attempt plus rows that only grow: answers, updates. The
conductor looks at the rows, finds the event that has come true, asks `advance` for the next state and writes it with
compare-and-set; so a coordinator that is killed anywhere starts again from the row and goes on.

The bracketed states belong to secure aggregation and run while clients train already:

    selecting → [keys → shares →] collecting → [agreeing → revealing →] aggregating → committed
    any of them but the last → failed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..protocol.errors import IllegalTransition


class State(StrEnum):
    SELECTING = "selecting"  # waiting until enough clients are online
    KEYS = "keys"  # clients sign and send this round's public keys
    SHARES = "shares"  # clients send each other shares of their mask seeds, through us, encrypted
    COLLECTING = "collecting"  # clients train and upload
    AGREEING = "agreeing"  # the uploaders sign who is in the sum
    REVEALING = "revealing"  # the uploaders send the shares that take the masks off the sum
    AGGREGATING = "aggregating"  # the cohort is frozen; the next version is a pure function of rows and blobs
    COMMITTED = "committed"
    FAILED = "failed"


TERMINAL = frozenset({State.COMMITTED, State.FAILED})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has come true about an attempt."""


class SecureCohortChosen(Event):
    pass


class PlainCohortChosen(Event):
    pass


class KeysIn(Event):
    """Everybody who is still there has sent keys, and they are enough."""


class SharesIn(Event):
    """Everybody who sent keys and is still there has shared, and they are enough."""


class UpdatesIn(Event):
    """Every plain update that may still come is here, and they are enough."""


class MaskedUpdatesIn(Event):
    """Every masked update that may still come is here, and they are enough."""


class SignaturesIn(Event):
    """Enough uploaders have signed the one list of who is in the sum."""


class SharesRevealed(Event):
    """A threshold of uploaders has sent the shares that unmask the sum."""


class ResultPublished(Event):
    """The version (or, after an evaluation, the metrics) of the round is written."""


@dataclass(frozen=True, slots=True)
class Abandoned(Event):
    """The attempt cannot end well; `reason` is shown as it is."""

    reason: str


NEXT: dict[tuple[State, type[Event]], State] = {
    (State.SELECTING, PlainCohortChosen): State.COLLECTING,
    (State.SELECTING, SecureCohortChosen): State.KEYS,
    (State.KEYS, KeysIn): State.SHARES,
    (State.SHARES, SharesIn): State.COLLECTING,
    (State.COLLECTING, UpdatesIn): State.AGGREGATING,
    (State.COLLECTING, MaskedUpdatesIn): State.AGREEING,
    (State.AGREEING, SignaturesIn): State.REVEALING,
    (State.REVEALING, SharesRevealed): State.AGGREGATING,
    (State.AGGREGATING, ResultPublished): State.COMMITTED,
    **{(state, Abandoned): State.FAILED for state in State if state not in TERMINAL},
}


def advance(state: State, event: Event) -> State:
    """The state after `event`; raises IllegalTransition, and nothing has changed, where the table has no row."""
    try:
        return NEXT[state, type(event)]
    except KeyError:
        raise IllegalTransition(f"{type(event).__name__} cannot happen to an attempt that is {state}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, for `docs/rounds.md`."""
    lines = ["stateDiagram-v2", "    [*] --> selecting"]
    lines += [f"    {a} --> {b}: {event.__name__}" for (a, event), b in NEXT.items() if event is not Abandoned]
    lines += [f"    {a} --> failed: Abandoned" for (a, event), _ in NEXT.items() if event is Abandoned]
    return "\n".join([*lines, "    committed --> [*]", "    failed --> [*]", ""])
