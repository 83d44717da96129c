"""The round's table, row by row and hole by hole."""

import itertools
from pathlib import Path

import pytest

from murmur.coordinator.rounds import (
    NEXT,
    TERMINAL,
    Abandoned,
    Event,
    KeysIn,
    MaskedUpdatesIn,
    PlainCohortChosen,
    ResultPublished,
    SecureCohortChosen,
    SharesIn,
    SharesRevealed,
    SignaturesIn,
    State,
    UpdatesIn,
    advance,
    diagram,
)
from murmur.protocol.errors import IllegalTransition

EVENTS: list[Event] = [
    PlainCohortChosen(),
    SecureCohortChosen(),
    KeysIn(),
    SharesIn(),
    UpdatesIn(),
    MaskedUpdatesIn(),
    SignaturesIn(),
    SharesRevealed(),
    ResultPublished(),
    Abandoned("why"),
]


def walk(*events: Event) -> State:
    state = State.SELECTING
    for event in events:
        state = advance(state, event)
    return state


def test_a_plain_round_is_committed_in_three_steps():
    assert walk(PlainCohortChosen(), UpdatesIn(), ResultPublished()) == State.COMMITTED


def test_a_masked_round_is_committed_in_seven_steps():
    events = [SecureCohortChosen(), KeysIn(), SharesIn(), MaskedUpdatesIn(), SignaturesIn(), SharesRevealed()]
    assert walk(*events, ResultPublished()) == State.COMMITTED


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, EVENTS)), ids=str)
def test_every_row_leads_on_and_every_hole_is_refused(state: State, event: Event):
    if (state, type(event)) in NEXT:
        assert advance(state, event) == NEXT[state, type(event)]
    else:
        with pytest.raises(IllegalTransition, match=type(event).__name__):
            advance(state, event)


def test_nothing_follows_an_end_and_everything_else_can_be_abandoned():
    assert not [state for state, _ in NEXT if state in TERMINAL]
    assert {state for state, event in NEXT if event is Abandoned} == set(State) - TERMINAL


def test_a_masked_round_cannot_be_summed_before_the_shares_are_revealed():
    reaching = {(state, event) for (state, event), after in NEXT.items() if after == State.AGGREGATING}
    assert reaching == {(State.COLLECTING, UpdatesIn), (State.REVEALING, SharesRevealed)}


def test_the_diagram_has_a_line_for_each_row():
    assert diagram().count(" --> ") == len(NEXT) + 3  # and one into selecting, two out of the ends


def test_the_documentation_shows_the_table():
    page = (Path(__file__).parents[2] / "docs" / "rounds.md").read_text()
    assert diagram() in page
