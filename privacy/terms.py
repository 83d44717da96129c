"""What both sides of a masked round derive from its assignment: one function, or the masks would not cancel."""

from __future__ import annotations

from ..protocol.messages import Assignment, Kind, SecureTerms
from ..protocol.tensors import Layout
from .auxiliary import Block
from .context import Context


def block_of(assignment: Assignment, layout: Layout, terms: SecureTerms) -> Block:
    """The auxiliary block of an assignment; layout: the model's."""
    integers = layout.integer_numel if assignment.kind is Kind.TRAIN else 0
    return Block(metrics=assignment.reported, integers=integers, clients=len(terms.cohort))


def context_of(assignment: Assignment, layout: Layout, terms: SecureTerms) -> Context:
    """The terms that the keys are derived from; layout: that of the model file that lies here."""
    return Context(
        run=assignment.run,
        round=assignment.round,
        attempt=assignment.attempt,
        kind=assignment.kind,
        model_sha256=assignment.model,
        layout_sha256=layout.digest(),
        settings_sha256=assignment.settings_sha256(),
        dim=layout.float_numel if assignment.kind is Kind.TRAIN else 0,
        aux=block_of(assignment, layout, terms).size,
        cohort=terms.cohort,
        threshold=terms.threshold,
        min_clients=terms.min_clients,
        clip_value=terms.clip_value,
        max_weight=assignment.max_weight,
        ring_bits=terms.ring_bits,
        degree=terms.degree,
        total_weight=terms.total_weight,
    )
