"""From a frozen cohort to the next version: a pure function of rows and blobs, so it may run any number of times.

It runs in the coordinator's worker process, which alone imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..aggregation.weighted_sum import Contribution, ring_sum, round_half_even, weighted_mean
from ..privacy.auxiliary import Totals
from ..privacy.fixed_point import mean, rounding_error
from ..privacy.manifest import Manifest, MaskedSum, PlainUpdate, Server, masked_sum
from ..protocol.errors import BadUpdate, InternalError
from ..protocol.messages import TRAIN_LOSS, AnswerKind, Kind, Total
from ..protocol.tensors import Layout, read_layout
from . import secure
from .blobs import Blobs
from .store.attempts import Attempt, Outcome

Sums = dict[str, tuple[float, float]]  # metric -> (sum, count)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The cohort's mean update, by tensor as `server_step` takes it, its metrics, and the masked sums it came from.

    weight: of a masked round's updates together, the one thing that is known of their weights; 0 where none was summed.
    """

    tensors: dict[str, np.ndarray[Any, Any]]
    metrics: Sums
    facts: dict[str, float] = field(default_factory=dict[str, float])
    sums: tuple[MaskedSum, ...] = ()
    weight: int = 0


def aggregate(attempt: Attempt, identities: Mapping[str, bytes], blobs: Blobs) -> Outcome:
    """Sum the attempt's updates, step the server, write the new version as a blob.

    Raises BadUpdate or PrivacyRefusal, with nothing written, when no version can come of it.
    """
    layout = read_layout(blobs.path(attempt.base))
    combine = _masked if attempt.threshold else _plain
    with _files(attempt, blobs) as path_of:
        found = combine(attempt, identities, layout, path_of)
    number = attempt.key.round
    trained = {name: pair for name, pair in found.metrics.items() if name == TRAIN_LOSS and pair[1] > 0}
    measured = {name: pair for name, pair in found.metrics.items() if name != TRAIN_LOSS and pair[1] > 0}
    metrics = {number - 1: measured, number: trained}
    sha256, size, optimizer = None, 0, None
    if attempt.kind == Kind.EVALUATE:
        metrics = {number - 1: measured}
    else:
        sha256, size, optimizer = _step(attempt, layout, found, blobs)
    told = _manifest(attempt, found.sums, metrics, version=sha256, optimizer=optimizer).text()
    return Outcome(
        sha256=sha256,
        bytes=size,
        optimizer=optimizer,
        metrics=metrics,
        facts=found.facts,
        manifest=told,
        weight=found.weight,
    )


def _manifest(
    attempt: Attempt,
    sums: tuple[MaskedSum, ...],
    metrics: Mapping[int, Sums],
    *,
    version: str | None,
    optimizer: str | None,
) -> Manifest:
    """What is kept of the round for whoever wants to check it: made of rows and hashes, so always the same."""
    told, parts = secure.assignment(attempt, "", 1), () if attempt.threshold else attempt.uploaded
    return Manifest(
        run=attempt.key.run,
        round=attempt.key.round,
        attempt=attempt.key.attempt,
        kind=told.kind,
        task=told.task,
        previous=attempt.previous,
        base=attempt.base,
        version=version,
        settings=told.settings(),
        server=Server(
            strategy=attempt.recipe.strategy.model_dump(mode="json"),
            optimizer_before=attempt.optimizer,
            optimizer_after=optimizer,
        ),
        cohort=tuple(sorted(attempt.cohort)),
        sums=sums,
        updates=tuple(PlainUpdate(client=p.client, sha256=p.update or "", weight=p.weight or 0.0) for p in parts),
        metrics={
            str(n): {name: Total(sum=total, count=count) for name, (total, count) in of.items()}
            for n, of in metrics.items()
        },
    )


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
    return Mean(tensors=weighted_mean(given, layout.update(attempt.recipe.train.wire)), metrics=metrics)


def _masked(attempt: Attempt, identities: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path]) -> Mean:
    session, block = secure.session(attempt, layout, identities), secure.block(attempt, layout)
    context = secure.context(attempt, layout)
    files = [path_of[part.client] for part in attempt.uploaded]
    ring, aux = ring_sum(files, context.dim, context.aux, context.ring_bits)
    adverts, shares = attempt.answers(AnswerKind.ADVERT), attempt.answers(AnswerKind.SHARES)
    uploaded = [part.client for part in attempt.uploaded]
    survivors = session.survivors(adverts, shares, uploaded)
    reveals = attempt.answers(AnswerKind.REVEAL)
    said: dict[str, Any] = {"adverts": adverts, "shares": shares, "survivors": survivors}
    session.unmask(**said, reveals=reveals, ring_sum=ring, aux_sum=aux)
    totals = block.decode(aux)
    _check(totals, len(uploaded))
    facts = {"clipped": totals.clipped / max(context.dim * len(uploaded), 1)}
    kept = masked_sum(context, **said, agrees=attempt.answers(AnswerKind.AGREE), ring_sum=ring, aux_sum=aux)
    if attempt.kind == Kind.EVALUATE:
        return Mean(tensors={}, metrics=dict(totals.metrics), sums=(kept,))
    if totals.weight == 0:
        raise BadUpdate("no client trained on a single example")
    from ..aggregation.server import unflatten  # imports torch

    floats = mean(ring, weight=totals.weight, dtype=layout.widest_float, **context.bounds)
    facts["rounding"] = rounding_error(floats, weight=totals.weight, summed=len(uploaded), **context.bounds)
    tensors = unflatten(floats, round_half_even(totals.integers, totals.weight), layout)
    return Mean(tensors=tensors, metrics=dict(totals.metrics), facts=facts, sums=(kept,), weight=totals.weight)


def _check(totals: Totals, uploaded: int) -> None:
    if totals.clients != uploaded:
        raise InternalError(f"the unmasked sum counts {totals.clients} clients, {uploaded} uploaded: it is not theirs")
