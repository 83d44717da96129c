"""What a run will ask of its clients, told before it starts: bytes, clients, epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..aggregation.local import with_controls
from ..privacy.auxiliary import Block
from ..privacy.dp.plan import event_of, view_of
from ..protocol.messages import OF_TRAINING, TRAIN_LOSS
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout, masked_layout
from ..protocol.thresholds import fewest
from ..protocol.views import RunEstimate


def estimate(recipe: Recipe, model: Layout, there: Sequence[str]) -> RunEstimate:
    """The estimate of a run that may start. model: what it starts from; there: the clients that could be asked."""
    version = with_controls(model) if recipe.strategy.name == "scaffold" else model
    asked = min(recipe.asked or len(there), len(there))
    needed = max(recipe.cohort.min, 1)
    if recipe.secure.on and asked >= needed and not recipe.secure.groups:
        needed = fewest(asked, *recipe.mask_graph(asked), needed)
    privacy = None
    if recipe.dp.of_clients:
        privacy = view_of(recipe, [replace(event_of(recipe.dp_of_round()), count=recipe.rounds)])
    return RunEstimate(
        rounds=recipe.rounds,
        download_bytes=version.file_bytes,
        upload_bytes=_upload(recipe, version).file_bytes,
        needed=needed,
        asked=recipe.asked if recipe.cohort.asked else 0,
        online=len(there),
        privacy=privacy,
    )


def _upload(recipe: Recipe, version: Layout) -> Layout:
    if not recipe.secure.on:
        return version.update(recipe.train.wire)
    trained = OF_TRAINING if recipe.strategy.name == "fednova" else (TRAIN_LOSS,)
    block = Block(metrics=(*trained, *recipe.metrics), integers=version.integer_numel)
    return masked_layout(version.float_numel, block.size, recipe.secure.ring_bits)
