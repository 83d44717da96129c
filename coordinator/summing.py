"""From a frozen cohort to the next version: a pure function of rows and blobs, so it may run any number of times.

It runs in the coordinator's worker process, which alone imports torch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..aggregation.weighted_sum import Contribution, check_finite, ring_sum, weighted_mean
from ..privacy.auxiliary import Totals
from ..privacy.dp.mechanisms import is_unclipped
from ..privacy.dp.release import release
from ..privacy.dp.ring import BIT
from ..privacy.fixed_point import decode
from ..protocol.errors import BadUpdate, InternalError
from ..protocol.messages import TRAIN_LOSS, AnswerKind, Kind
from ..protocol.tensors import Layout, read_layout
from . import secure
from .blobs import Blobs
from .store.attempts import Attempt, Outcome

Array = np.ndarray[Any, Any]
Sums = dict[str, tuple[float, float]]  # metric -> (sum, count)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The cohort's mean update, by tensor as `server_step` takes it, and its metrics."""

    tensors: dict[str, Array]
    metrics: Sums
    facts: dict[str, float] = field(default_factory=dict[str, float])
    clip_norm: float | None = None  # of the next round, where it is adaptive


def aggregate(attempt: Attempt, identities: Mapping[str, bytes], blobs: Blobs) -> Outcome:
    """Sum the attempt's updates, step the server, write the new version as a blob.

    Raises BadUpdate or PrivacyRefusal, with nothing written, when no version can come of it.
    """
    layout = read_layout(blobs.path(attempt.base))
    combine = _masked if attempt.threshold else _plain
    with _files(attempt, blobs) as path_of:
        mean = combine(attempt, identities, layout, path_of)
    number = attempt.key.round
    trained = {name: pair for name, pair in mean.metrics.items() if name == TRAIN_LOSS and pair[1] > 0}
    measured = {name: pair for name, pair in mean.metrics.items() if name != TRAIN_LOSS and pair[1] > 0}
    metrics = {number - 1: measured, number: trained}
    if attempt.kind == Kind.EVALUATE:
        return Outcome(sha256=None, bytes=0, optimizer=None, metrics={number - 1: measured}, facts=mean.facts)
    sha256, size, optimizer = _step(attempt, layout, mean, blobs)
    made = Outcome(sha256=sha256, bytes=size, optimizer=optimizer, metrics=metrics, facts=mean.facts)
    return replace(made, clip_norm=mean.clip_norm)


@contextmanager
def _files(attempt: Attempt, blobs: Blobs) -> Generator[dict[str, Path]]:
    """The file of each client's update."""
    with tempfile.TemporaryDirectory(prefix="murmur-sum-") as folder:
        found: dict[str, Path] = {}
        for part in attempt.uploaded:
            sha256 = part.update or ""
            if sha256 in attempt.inline:
                found[part.client] = Path(folder, sha256)
                found[part.client].write_bytes(attempt.inline[sha256])
            else:
                found[part.client] = blobs.path(sha256)
        yield found


def _step(attempt: Attempt, layout: Layout, mean: Mean, blobs: Blobs) -> tuple[str, int, str | None]:
    from ..aggregation.server import server_step  # imports torch

    state = blobs.path(attempt.optimizer) if attempt.optimizer else None
    strategy, base = attempt.recipe.strategy, blobs.path(attempt.base)
    with blobs.new() as version, blobs.new() as moments:
        kept = server_step(base, layout, mean.tensors, strategy, state, version, moments)
        return blobs.adopt(version), layout.file_bytes, blobs.adopt(moments) if kept else None


def _plain(attempt: Attempt, _: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path]) -> Mean:
    parts = attempt.uploaded
    metrics: Sums = {}
    for part in parts:
        for name, total in (part.metrics or {}).items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total["sum"], before[1] + total["count"])
    if attempt.kind == Kind.EVALUATE:
        return Mean(tensors={}, metrics=metrics)
    given = [Contribution(client=p.client, path=path_of[p.client], weight=p.weight or 0.0) for p in parts]
    if not any(c.weight for c in given):
        raise BadUpdate("no client trained on a single example")
    wire = layout.update(attempt.recipe.train.wire)
    tensors = weighted_mean(given, wire)
    if not attempt.dp.of_clients:
        return Mean(tensors=tensors, metrics=metrics)
    sums = [tensors[t.name].reshape(-1) for t in wire.tensors]
    for piece in sums:
        piece *= math.fsum(c.weight for c in given)
    bits = 0.0
    if attempt.dp.adaptive:
        bits = sum(is_unclipped(check_finite(c.path, wire), attempt.dp.clip_norm) - 0.5 for c in given)
    return _released(attempt, sums, bits, tensors, metrics)


def _released(attempt: Attempt, sums: list[Array], bits: float, tensors: dict[str, Array], metrics: Sums) -> Mean:
    """What may be published of the sum of clipped updates; `tensors` are views into `sums`."""
    following, facts = release(sums, bits, attempt.dp, denominator=attempt.recipe.cohort.size)
    return Mean(tensors=tensors, metrics=metrics, facts=facts, clip_norm=following)


def _masked(attempt: Attempt, identities: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path]) -> Mean:
    session, block = secure.session(attempt, layout, identities), secure.block(attempt, layout)
    context = secure.context(attempt, layout)
    ring, aux = ring_sum([path_of[part.client] for part in attempt.uploaded], context.dim, context.aux)
    adverts, shares = attempt.answers(AnswerKind.ADVERT), attempt.answers(AnswerKind.SHARES)
    uploaded = [part.client for part in attempt.uploaded]
    session.unmask(
        adverts=adverts,
        shares=shares,
        survivors=session.survivors(adverts, shares, uploaded),
        reveals=attempt.answers(AnswerKind.REVEAL),
        ring_sum=ring,
        aux_sum=aux,
    )
    totals = block.decode(aux)
    _check(totals, len(uploaded))
    if attempt.kind == Kind.EVALUATE:
        return Mean(tensors={}, metrics=dict(totals.metrics))
    if totals.weight == 0:
        raise BadUpdate("no client trained on a single example")
    from ..aggregation.server import unflatten  # imports torch
    from ..aggregation.weighted_sum import round_half_even

    if attempt.dp.of_clients:
        sum_D = secure.dp_encoding(attempt, layout).decode(ring)
        tensors = unflatten(sum_D, totals.integers, layout)
        return _released(attempt, [sum_D], totals.clipped / BIT, tensors, dict(totals.metrics))
    facts = {"clipped": totals.clipped / max(context.dim * len(uploaded), 1)}

    floats = decode(ring, clip_value=context.clip_value, max_weight=context.max_weight, n=len(context.cohort))
    floats /= totals.weight
    tensors = unflatten(floats, round_half_even(totals.integers, totals.weight), layout)
    return Mean(tensors=tensors, metrics=dict(totals.metrics), facts=facts)


def _check(totals: Totals, uploaded: int) -> None:
    if totals.clients != uploaded:
        raise InternalError(f"the unmasked sum counts {totals.clients} clients, {uploaded} uploaded: it is not theirs")
