"""From a frozen cohort to the next version: a pure function of rows and blobs, so it may run any number of times.

It runs in the coordinator's worker process, which alone imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..aggregation.robust import combined, combined_groups, write_group_mean
from ..aggregation.weighted_sum import Contribution, ring_sum, round_half_even
from ..privacy.auxiliary import Totals
from ..privacy.fixed_point import mean, rounding_error
from ..privacy.manifest import Manifest, MaskedSum, PlainUpdate, Server, masked_sum
from ..protocol.errors import BadUpdate, InternalError, PrivacyRefusal
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
    left_out: groups that are not in it, with the reason.
    """

    tensors: dict[str, np.ndarray[Any, Any]]
    metrics: Sums
    facts: dict[str, float] = field(default_factory=dict[str, float])
    sums: tuple[MaskedSum, ...] = ()
    weight: int = 0
    left_out: dict[int, str] = field(default_factory=dict[int, str])


def aggregate(attempt: Attempt, identities: Mapping[str, bytes], blobs: Blobs) -> Outcome:
    """Sum the attempt's updates, step the server, write the new version as a blob.

    Raises BadUpdate or PrivacyRefusal, with nothing written, when no version can come of it.
    """
    layout = read_layout(blobs.path(attempt.base))
    with _files(attempt, blobs) as path_of:
        if attempt.threshold:
            found = _masked(attempt, identities, layout, path_of, blobs)
        else:
            found = _plain(attempt, layout, path_of)
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
        left_out=found.left_out,
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


def _plain(attempt: Attempt, layout: Layout, path_of: Mapping[str, Path]) -> Mean:
    parts = attempt.uploaded
    metrics: Sums = {}
    for part in parts:
        _add(metrics, {name: (total["sum"], total["count"]) for name, total in (part.metrics or {}).items()})
    if attempt.kind == Kind.EVALUATE:
        return Mean(tensors={}, metrics=metrics)
    given = [Contribution(client=p.client, path=path_of[p.client], weight=p.weight or 0.0) for p in parts]
    if not any(c.weight for c in given):
        raise BadUpdate("no client trained on a single example")
    wire = layout.update(attempt.recipe.train.wire)
    return Mean(tensors=combined(given, wire, attempt.recipe.strategy), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """The sum of one group, or of a whole cohort that has none, with its masks taken out.

    tensors: the mean update; empty where there is none, in an evaluation or without a single example.
    rounding: see `rounding_error`. kept: what the manifest says of it.
    """

    kept: MaskedSum
    totals: Totals
    tensors: dict[str, np.ndarray[Any, Any]]
    rounding: float = 0.0


def _masked(
    attempt: Attempt, identities: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path], blobs: Blobs
) -> Mean:
    if attempt.recipe.secure.groups:
        sums, left_out, tensors = _unmask_groups(attempt, identities, layout, path_of, blobs)
    else:
        sums, left_out = [_unmask(attempt, identities, layout, path_of)], dict[int, str]()
        tensors = sums[0].tensors
    if attempt.kind == Kind.TRAIN and not tensors:
        raise BadUpdate("no client trained on a single example")
    metrics: Sums = {}
    for found in sums:
        _add(metrics, found.totals.metrics)
    facts: dict[str, float] = {}
    if attempt.kind == Kind.TRAIN:
        values = layout.float_numel * sum(found.totals.clients for found in sums)
        facts["clipped"] = sum(found.totals.clipped for found in sums) / max(values, 1)
        facts["rounding"] = max(found.rounding for found in sums)
    return Mean(
        tensors=tensors,
        metrics=metrics,
        facts=facts,
        sums=tuple(found.kept for found in sums),
        weight=sum(found.totals.weight for found in sums),
        left_out=left_out,
    )


def _unmask_groups(
    attempt: Attempt, identities: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path], blobs: Blobs
) -> tuple[list[Unmasked], dict[int, str], dict[str, np.ndarray[Any, Any]]]:
    """Each group's sum, those that there is none of with the reason, and what the strategy makes of the means.

    A client that spoils its group's sum spoils no more: the group is left out. The means wait on disk.
    """
    sums: list[Unmasked] = []
    left_out: dict[int, str] = {}
    means: dict[int, Path] = {}
    needed, wire = attempt.recipe.secure.fewest_groups, layout.update()
    with ExitStack() as stack:
        for group in attempt.groups():
            n = group.parts[0].group
            try:
                found = _unmask(group, identities, layout, path_of)
            except (BadUpdate, PrivacyRefusal, InternalError) as error:
                left_out[n] = f"its group {n} was left out of the sum: {error.detail}"
                continue
            if found.tensors:
                means[n] = stack.enter_context(blobs.new())
                write_group_mean(means[n], found.tensors, wire)
            sums.append(replace(found, tensors={}))
        if len(sums) < needed or 0 < len(means) < needed:
            left = min(len(sums), len(means) or len(sums))
            raise BadUpdate("; ".join([f"{left} groups can be summed, {needed} are needed", *left_out.values()]))
        return sums, left_out, combined_groups(means, wire, attempt.recipe.strategy) if means else {}


def _unmask(attempt: Attempt, identities: Mapping[str, bytes], layout: Layout, path_of: Mapping[str, Path]) -> Unmasked:
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
    _check(totals, len(uploaded), attempt.recipe.strategy.weight_cap)
    kept = masked_sum(context, **said, agrees=attempt.answers(AnswerKind.AGREE), ring_sum=ring, aux_sum=aux)
    if attempt.kind == Kind.EVALUATE or totals.weight == 0:
        return Unmasked(kept=kept, totals=totals, tensors={})
    from ..aggregation.server import unflatten  # imports torch

    floats = mean(ring, weight=totals.weight, dtype=layout.widest_float, **context.bounds)
    rounding = rounding_error(floats, weight=totals.weight, summed=len(uploaded), **context.bounds)
    tensors = unflatten(floats, round_half_even(totals.integers, totals.weight), layout)
    return Unmasked(kept=kept, totals=totals, tensors=tensors, rounding=rounding)


def _check(totals: Totals, uploaded: int, weight_cap: int) -> None:
    if totals.clients != uploaded:
        raise InternalError(f"the unmasked sum counts {totals.clients} clients, {uploaded} uploaded: it is not theirs")
    if not 0 <= totals.weight <= uploaded * weight_cap:
        raise BadUpdate(f"the weights sum to {totals.weight}, {uploaded} clients may weigh {weight_cap} each")


def _add(metrics: Sums, more: Mapping[str, tuple[float, float]]) -> None:
    for name, (total, count) in more.items():
        before = metrics.get(name, (0.0, 0.0))
        metrics[name] = (before[0] + total, before[1] + count)
