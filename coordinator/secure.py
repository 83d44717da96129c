"""Secure aggregation as this coordinator runs it: the protocol's server, rebuilt from rows whenever it is needed."""

from __future__ import annotations

from collections.abc import Mapping

from ..privacy.auxiliary import Block
from ..privacy.context import Context
from ..privacy.server import ServerSession
from ..privacy.terms import block_of, context_of
from ..protocol.messages import Assignment, Kind, SecureTerms
from ..protocol.tensors import Layout
from .store.attempts import Attempt


def assignment(attempt: Attempt, client: str, fence: int) -> Assignment:
    """What this client is told of its part."""
    recipe, key = attempt.recipe, attempt.key
    terms = None
    if attempt.threshold:
        terms = SecureTerms(
            cohort=attempt.cohort,
            threshold=attempt.threshold,
            min_clients=recipe.cohort.min,
            clip_value=recipe.secure.clip_value,
        )
    return Assignment(
        id=key.assignment(client),
        fence=fence,
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        kind=Kind(attempt.kind),
        task=recipe.task,
        model=attempt.base,
        model_bytes=attempt.base_bytes,
        train=recipe.train,
        mu=recipe.strategy.mu,
        weighting=recipe.strategy.weighting,
        max_weight=recipe.strategy.weight_cap,
        metrics=recipe.metrics,
        seed=recipe.seed,
        patience_s=recipe.cohort.patience_s,
        secure=terms,
        dp=recipe.dp,
    )


def block(attempt: Attempt, layout: Layout) -> Block:
    """The auxiliary block of this attempt: weight, metrics, integers."""
    return block_of(*_told(attempt, layout))


def context(attempt: Attempt, layout: Layout) -> Context:
    """Everything that a mask of this attempt depends on."""
    return context_of(*_told(attempt, layout))


def _told(attempt: Attempt, layout: Layout) -> tuple[Assignment, Layout, SecureTerms]:
    told = assignment(attempt, attempt.cohort[0], 1)
    assert told.secure is not None
    return told, layout, told.secure


def session(attempt: Attempt, layout: Layout, identities: Mapping[str, bytes]) -> ServerSession:
    return ServerSession(context(attempt, layout), identities)
