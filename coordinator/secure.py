"""Secure aggregation as this coordinator runs it: the protocol's server, rebuilt from rows whenever it is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..privacy import bodies
from ..privacy.auxiliary import Block
from ..privacy.context import Context
from ..privacy.dp.plan import round_encoding
from ..privacy.dp.ring import Encoding
from ..privacy.graph import neighbours, short, standing
from ..privacy.server import ServerSession
from ..privacy.terms import block_of, context_of
from ..protocol.messages import AnswerKind, Assignment, Kind, SecureTerms
from ..protocol.tensors import Layout
from ..protocol.thresholds import fewest
from .rounds import State
from .store.attempts import Attempt


def assignment(attempt: Attempt, client: str, fence: int) -> Assignment:
    """What this client is told of its part."""
    recipe, key = attempt.recipe, attempt.key
    terms = None
    if attempt.threshold:
        terms = SecureTerms(
            cohort=attempt.cohort,
            threshold=attempt.threshold,
            degree=degree(attempt),
            min_clients=recipe.fewest,
            clip_value=recipe.secure.clip_value,
            ring_bits=recipe.secure.ring_bits,
            total_weight=attempt.total_weight,
        )
    return Assignment(
        id=key.assignment(client),
        fence=fence,
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        kind=Kind(attempt.kind),
        model=attempt.base,
        model_bytes=attempt.base_bytes,
        secure=terms,
        dp=attempt.dp,
        **recipe.told,
    )


def block(attempt: Attempt, layout: Layout) -> Block:
    """The auxiliary block of this attempt: weight, metrics, integers."""
    return block_of(*_told(attempt, layout))


def context(attempt: Attempt, layout: Layout) -> Context:
    """Everything that a mask of this attempt depends on."""
    return context_of(*_told(attempt, layout))


def dp_encoding(attempt: Attempt, layout: Layout) -> Encoding:
    """How the clients of this attempt made integers of their clipped updates."""
    return round_encoding(*_told(attempt, layout))


def _told(attempt: Attempt, layout: Layout) -> tuple[Assignment, Layout, SecureTerms]:
    told = assignment(attempt, attempt.cohort[0], 1)
    assert told.secure is not None
    return told, layout, told.secure


def session(attempt: Attempt, layout: Layout, identities: Mapping[str, bytes]) -> ServerSession:
    return ServerSession(context(attempt, layout), identities)


def degree(attempt: Attempt) -> int:
    """Neighbours of a client in the attempt's graph of masks; 0: everybody.

    It follows from the recipe and the size of the cohort. An attempt that an earlier release began, which knew no
    other graph, has another threshold in its row and stays complete.
    """
    graph = attempt.recipe.mask_graph(len(attempt.cohort))
    return graph.degree if graph.threshold == attempt.threshold else 0


def needed(attempt: Attempt) -> int:
    """The fewest clients with which the attempt goes on."""
    if not attempt.threshold:
        return attempt.recipe.fewest
    return fewest(len(attempt.cohort), degree(attempt), attempt.threshold, attempt.recipe.fewest)


def lost_secrets(attempt: Attempt, there: Collection[str]) -> list[str]:
    """Clients a secret of which the sum needs and can no longer have, if nobody but those `there` goes on.

    Where everybody masks with everybody, counting the clients says the same, and nothing is looked for here.
    """
    k, t, deals = degree(attempt), attempt.threshold, attempt.answers(AnswerKind.SHARES)
    if not k or not deals:
        return []
    deal = bodies.load_shares(next(iter(deals.values())), k + 1)  # at the door each was found to name the one session
    near = neighbours(bytes.fromhex(deal.fields["session"]), attempt.answers(AnswerKind.ADVERT), k)
    if attempt.state == State.SHARES:
        return short(near, deals, there, t)  # a client that sees so few of its neighbours share goes no further
    if attempt.state == State.AGREEING:
        there = set(there).difference(short(near, there, there, t))  # for lack of signatures these will not reveal
    return short(near, standing(near, deals, [p.client for p in attempt.uploaded]), there, t)
