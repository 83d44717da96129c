"""From a frozen cohort to the next version: a pure function of rows and blobs, so it may run any number of times.

It runs in the coordinator's worker process, which alone imports torch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..aggregation.flower import Reply, flower_step, looks_at_single, of_all, of_file
from ..aggregation.local import rescale
from ..aggregation.metrics import Sums, add_metrics
from ..aggregation.robust import combined, combined_groups, write_group_mean
from ..aggregation.weighted_sum import Contribution, check_finite, ring_sum, round_half_even
from ..privacy.auxiliary import Totals
from ..privacy.dp.mechanisms import is_unclipped
from ..privacy.dp.plan import event_of
from ..privacy.dp.release import release
from ..privacy.dp.ring import BIT
from ..privacy.fixed_point import mean, rounding_error
from ..privacy.manifest import Manifest, MaskedSum, PlainUpdate, Server, masked_sum
from ..protocol.errors import BadUpdate, InternalError, PrivacyRefusal
from ..protocol.messages import LOCAL_STEPS, OF_TRAINING, AnswerKind, Kind, Total
from ..protocol.tensors import Layout, read_layout
from . import secure
from .blobs import Blobs
from .store.attempts import Attempt, Outcome

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The cohort's mean update, by tensor as `server_step` takes it, its metrics, and the masked sums it came from.

    weight: of a masked round's updates together, the one thing that is known of their weights; 0 where none was summed.
    left_out: groups that are not in it, with the reason. replies: the updates themselves, for a Flower strategy that
    looks at them; `tensors` is then empty.
    """

    tensors: dict[str, Array]
    metrics: Sums
    facts: dict[str, float] = field(default_factory=dict[str, float])
    sums: tuple[MaskedSum, ...] = ()
    weight: int = 0
    left_out: dict[int, str] = field(default_factory=dict[int, str])
    clip_norm: float | None = None  # of the next round, where it is adaptive
    replies: tuple[Reply, ...] = ()


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
        sha256, size, optimizer = None, 0, None
        if attempt.kind == Kind.TRAIN:
            sha256, size, optimizer = _step(attempt, layout, found, blobs)
    number = attempt.key.round
    trained = {name: pair for name, pair in found.metrics.items() if name in OF_TRAINING and pair[1] > 0}
    measured = {name: pair for name, pair in found.metrics.items() if name not in OF_TRAINING and pair[1] > 0}
    metrics = {number - 1: measured, number: trained}
    if attempt.kind == Kind.EVALUATE:
        metrics = {number - 1: measured}
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
        clip_norm=found.clip_norm,
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
    spends = attempt.dp.of_clients and attempt.kind == Kind.TRAIN
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
        dp=event_of(attempt.dp).to_json() if spends else None,
        updates=tuple(
            PlainUpdate(client=p.client, sha256=None if spends else p.update, weight=p.weight or 0.0) for p in parts
        ),
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
    steps = mean.metrics.get(LOCAL_STEPS, (0.0, 0.0))
    rescale(mean.tensors, layout, strategy, summed=len(attempt.uploaded), steps=steps)
    with blobs.new() as version, blobs.new() as moments:
        if strategy.flower:
            from ..aggregation.flower_probe import check_flower  # imports flwr

            check_flower(attempt.recipe)  # what is installed may be another than when the run was started
            replies = mean.replies or (of_all(mean.tensors, mean.metrics),)
            moved, n = (base, layout, mean.tensors, replies, strategy, state), attempt.key.round
            kept = flower_step(*moved, version, moments, round=n)
        else:
            kept = server_step(base, layout, mean.tensors, strategy, state, version, moments)
        return blobs.adopt(version), layout.file_bytes, blobs.adopt(moments) if kept else None


def _plain(attempt: Attempt, layout: Layout, path_of: Mapping[str, Path]) -> Mean:
    parts = attempt.uploaded
    metrics: Sums = {}
    for part in parts:
        add_metrics(metrics, {name: (total["sum"], total["count"]) for name, total in (part.metrics or {}).items()})
    if attempt.kind == Kind.EVALUATE:
        return Mean(tensors={}, metrics=metrics)
    given = [Contribution(client=p.client, path=path_of[p.client], weight=p.weight or 0.0) for p in parts]
    if not any(c.weight for c in given):
        raise BadUpdate("no client trained on a single example")
    wire = layout.update(attempt.recipe.train.wire)
    if looks_at_single(attempt.recipe):
        told = {p.client: {n: (v["sum"], v["count"]) for n, v in (p.metrics or {}).items()} for p in parts}
        replies = tuple(of_file(c.client, c.path, wire, c.weight, told[c.client]) for c in given if c.weight)
        return Mean(tensors={}, metrics=metrics, replies=replies)
    tensors = combined(given, wire, attempt.recipe.strategy)
    if not attempt.dp.of_clients:
        return Mean(tensors=tensors, metrics=metrics)
    sums = [tensors[t.name].reshape(-1) for t in wire.tensors]
    for piece in sums:
        piece *= math.fsum(c.weight for c in given)
    bits = 0.0
    if attempt.dp.adaptive:
        bits = sum(is_unclipped(check_finite(c.path, wire), attempt.dp.clip_norm) - 0.5 for c in given)
    facts, following = _release(attempt, sums, bits)
    return Mean(tensors=tensors, metrics=metrics, facts=facts, clip_norm=following)


def _release(attempt: Attempt, sums: list[Array], bits: float) -> tuple[dict[str, float], float | None]:
    """Make of the sum of clipped updates, in place, what may be published; what is told of it, the next clip_norm."""
    following, facts = release(sums, bits, attempt.dp, denominator=attempt.recipe.cohort.size)
    return facts, following


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """The sum of one group, or of a whole cohort that has none, with its masks taken out.

    tensors: the mean update; empty where there is none, in an evaluation or without a single example.
    kept: what the manifest says of it. clip_norm: as in `Mean`.
    """

    kept: MaskedSum
    totals: Totals
    tensors: dict[str, Array]
    facts: dict[str, float] = field(default_factory=dict[str, float])
    clip_norm: float | None = None


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
        add_metrics(metrics, found.totals.metrics)
    told = sorted({name for found in sums for name in found.facts})
    return Mean(
        tensors=tensors,
        metrics=metrics,
        facts={name: max(found.facts.get(name, 0.0) for found in sums) for name in told},
        sums=tuple(found.kept for found in sums),
        weight=sum(found.totals.weight for found in sums),
        left_out=left_out,
        clip_norm=sums[0].clip_norm,
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
    shown = None if attempt.dp.mode == "central" else (ring, aux)  # the noise is not in it yet
    kept = masked_sum(context, **said, agrees=attempt.answers(AnswerKind.AGREE), unmasked=shown)
    if attempt.kind == Kind.EVALUATE or totals.weight == 0:
        return Unmasked(kept=kept, totals=totals, tensors={})
    from ..aggregation.server import unflatten  # imports torch

    if attempt.dp.of_clients:
        sum_D = secure.dp_encoding(attempt, layout).decode(ring)
        tensors = unflatten(sum_D, totals.integers, layout)  # views into sum_D
        facts, following = _release(attempt, [sum_D], totals.clipped / BIT)
        return Unmasked(kept=kept, totals=totals, tensors=tensors, facts=facts, clip_norm=following)
    floats = mean(ring, weight=totals.weight, dtype=layout.widest_float, **context.bounds)
    facts = {
        "clipped": totals.clipped / max(context.dim * len(uploaded), 1),
        "rounding": rounding_error(floats, weight=totals.weight, summed=len(uploaded), **context.bounds),
    }
    tensors = unflatten(floats, round_half_even(totals.integers, totals.weight), layout)
    return Unmasked(kept=kept, totals=totals, tensors=tensors, facts=facts)


def _check(totals: Totals, uploaded: int, weight_cap: int) -> None:
    if totals.clients != uploaded:
        raise InternalError(f"the unmasked sum counts {totals.clients} clients, {uploaded} uploaded: it is not theirs")
    if not 0 <= totals.weight <= uploaded * weight_cap:
        raise BadUpdate(f"the weights sum to {totals.weight}, {uploaded} clients may weigh {weight_cap} each")
