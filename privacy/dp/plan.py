"""What a recipe's differential privacy comes to, before a run starts and while it goes on: one place for both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...protocol.errors import OperatorError
from ...protocol.messages import Assignment, SecureTerms
from ...protocol.recipe import Recipe
from ...protocol.sections import Dp
from ...protocol.tensors import Layout
from ...protocol.views import PrivacyView
from .accounting import Accountant, Epsilon, Event, epsilon, rounds_within
from .mechanisms import check_model
from .ring import Encoding, encoding_of

FEW = 10  # clients, up to which noise for whole organizations drowns what they teach


def event_of(dp: Dp) -> Event:
    """What one round's release spends. An adaptive count is paid for by `Dp.update_noise`, so it costs nothing more."""
    return Event(noise_multiplier=dp.noise_multiplier)


def epsilon_of(recipe: Recipe, events: Iterable[Event], accountant: Accountant = "rdp") -> Epsilon:
    """The epsilon of a run's ledger, with all that it rests on."""
    return epsilon(events, recipe.dp.delta, accountant, unit="client", assumptions=_assumptions(recipe))


def check_run(recipe: Recipe, layout: Layout) -> None:
    """Raise OperatorError, with the numbers and what to set, where a run's clients could not be protected as it says.

    layout: of the model. Checks what travels, the room in the ring, and the budget for all rounds.
    """
    dp = recipe.dp_of_round()
    if not dp.of_clients:
        return
    check_model(layout)
    if recipe.secure.on:
        for n in {recipe.cohort.min, recipe.cohort.asked}:  # the room in the ring falls, the honest share grows, with n
            fewest = max(recipe.mask_graph(n).threshold, recipe.fewest)
            bits = recipe.secure.ring_bits
            encoding_of(dp, n=n, fewest=fewest, dim=layout.float_numel, ring_bits=bits)
    if dp.budget:
        event = event_of(dp)
        fits = rounds_within(event, dp.budget, dp.delta, most=recipe.rounds)
        if fits < recipe.rounds:
            all_of_them = epsilon_of(recipe, [event] * recipe.rounds).value
            raise OperatorError(
                f"{recipe.rounds} rounds with dp.noise_multiplier = {dp.noise_multiplier:g} come to an epsilon of "
                f"{all_of_them:.3g} at delta {dp.delta:g}, dp.budget is {dp.budget:g}: {fits} rounds would fit"
            )


def over_budget(recipe: Recipe, spent: Iterable[Event]) -> str:
    """Why one more round must not be summed, in words; empty where it may."""
    dp = recipe.dp
    if not dp.budget:
        return ""
    after = epsilon_of(recipe, [*spent, event_of(dp)])
    if after.value <= dp.budget:
        return ""
    return (
        f"the privacy budget is spent: one more sum would bring epsilon to {after.value:.3g} "
        f"at delta {dp.delta:g}, dp.budget is {dp.budget:g}"
    )


def round_encoding(assignment: Assignment, layout: Layout, terms: SecureTerms) -> Encoding:
    """How the clients of a masked round make integers of their updates; layout: of the model that lies here.

    Raises OperatorError for a model that cannot be protected, or a ring without room.
    """
    check_model(layout)
    return encoding_of(
        assignment.dp,
        n=len(terms.cohort),
        fewest=max(terms.threshold, terms.min_clients),
        dim=layout.float_numel,
        ring_bits=terms.ring_bits,
    )


def view_of(recipe: Recipe, events: Sequence[Event], accountant: Accountant = "rdp") -> PrivacyView:
    """What a run's ledger comes to, as it is shown."""
    found = epsilon_of(recipe, events, accountant)
    spent = sum(event.count for event in events)
    return PrivacyView(**found.to_json(), budget=recipe.dp.budget, spent=spent, meaning=_meaning(recipe))


def _meaning(recipe: Recipe) -> str:
    said = (
        "Client-level: whoever sees the models learns little about what any one organization put into them, all of "
        "its data together. That it took part is no secret."
    )
    if recipe.cohort.size <= FEW:
        said += (
            f" With {recipe.cohort.size} clients the noise in the sum is {recipe.dp.noise_multiplier:g} times the "
            "largest update of one of them: an epsilon that means much leaves a model that is of little use. For few "
            'organizations protect their examples instead: dp.mode = "local".'
        )
    return said


def _assumptions(recipe: Recipe) -> tuple[str, ...]:
    dp = recipe.dp
    said = "the coordinator sees the sum without noise and is trusted to add it"
    if dp.mode == "distributed":
        said = "all clients in a sum add their part of the noise and keep it to themselves"
        if dp.colluders:
            said = f"all clients in a sum but {dp.colluders} add their part of the noise and keep it to themselves"
    clipped = "every client runs the agreed software, which clips its update"
    if not recipe.secure.on:
        clipped = "the coordinator sees single updates; it refuses those above the bound"
    covered = "it covers the models; the cohort's metrics and who took part are shown as they are"
    return (said, clipped, covered, "sampling is not counted in its favour")
