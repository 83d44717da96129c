"""What a Flower strategy needs to see, found by trying it: the weighted mean of the updates, or each of them.

Masks leave the mean alone, so this decides whether a strategy works under them. The same trial shows whether what it
keeps from round to round survives being written down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..protocol.errors import BadUpdate, OperatorError
from ..protocol.messages import TRAIN_LOSS
from ..protocol.recipe import Recipe
from ..protocol.sections import Strategy
from .flower import Reply, ask, build
from .flower_messages import begin
from .flower_state import read_state, write_state

Array = np.ndarray[Any, Any]
SHAPES = {"weight": (4, 3), "bias": (4,), "scale": ()}
SCALES = (1e-3, 1.0, 1e-2)  # of the updates of a round
CLIENTS = 7, 64  # as many as a recipe asks for, within these
NEAR = 1e-4  # of the largest move: sums in another order differ by 1e-7, rules by about 1


@dataclass(frozen=True)
class Finding:
    """linear: the weighted mean is all that the strategy needs to see. why: it is not so."""

    linear: bool
    why: str = ""


def find(recipe: Recipe) -> Finding:
    """What the recipe's Flower strategy needs to see; found once in a process.

    Raises OperatorError for a strategy that cannot be made, that fails, whose state cannot be kept, or that tells its
    clients what would not reach them.
    """
    return _find(recipe.strategy.model_dump_json(), min(max(recipe.cohort.min, CLIENTS[0]), CLIENTS[1]))


def check_flower(recipe: Recipe) -> None:
    """Raise OperatorError, saying what to change, unless the recipe's Flower strategy works with its other settings."""
    found, strategy = find(recipe), recipe.strategy
    if found.linear:
        return
    said = f'strategy.flower = "{strategy.flower}" looks at single updates ({found.why})'
    if recipe.secure.on:
        raise OperatorError(
            f"{said}, which secure aggregation hides: set secure.on = false; or leave flower out and set "
            'strategy.combine = "median" with secure.groups = 5 or so, which sums inside groups and combines their '
            "means"
        )
    if recipe.dp.of_clients:
        raise OperatorError(f'{said}, and dp.mode = "{recipe.dp.mode}" reckons its noise for their sum: use "local"')
    if strategy.combine != "mean":
        raise OperatorError(f'{said}, and so does strategy.combine = "{strategy.combine}": leave one of them out')
    if strategy.algorithm != "plain":
        raise OperatorError(f'{said}, and strategy.name = "{strategy.name}" needs their mean: set name = "fedavg"')


@lru_cache(maxsize=64)
def _find(settings: str, clients: int) -> Finding:
    strategy = Strategy.model_validate_json(settings)
    _check_told(strategy)
    rounds = [_round(n, scale, clients, strategy.weighting) for n, scale in enumerate(SCALES, 1)]
    try:
        whole = _play(strategy, rounds, keep=False)
        kept = _play(strategy, rounds, keep=True)
        if not _agree(whole, kept):
            if _agree(whole, _play(strategy, rounds, keep=False)):
                raise OperatorError(
                    f"the Flower strategy {strategy.flower!r} keeps something from round to round that is none of its "
                    "attributes: a coordinator that starts again would go on without it"
                )
            return Finding(False, "it draws at random")
    except BadUpdate as error:
        raise OperatorError(f"{error.detail}, on {clients} random updates to a small model") from None
    try:
        alone = _play(strategy, [(old, [_mean(replies)]) for old, replies in rounds], keep=True)
    except BadUpdate:
        return Finding(False, "it fails where it is given their mean")
    return Finding(True) if _agree(whole, alone) else Finding(False, "their mean gives another model")


def _check_told(strategy: Strategy) -> None:
    """Raise OperatorError where clients would be told more than what the recipe tells them."""
    try:
        told = begin(build(strategy), 1, {name: np.zeros(shape) for name, shape in SHAPES.items()})
    except OperatorError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise OperatorError(f"the Flower strategy {strategy.flower!r} cannot begin a round: {said}") from error
    told.pop("server-round", None)
    if told.get("proximal-mu") == strategy.mu:
        told.pop("proximal-mu")
    if told:
        raise OperatorError(
            f"the Flower strategy {strategy.flower!r} tells its clients {', '.join(sorted(told))}, and only the recipe "
            'tells clients something here: FedProx is strategy.name = "fedprox" with strategy.mu, clipping is dp'
        )


def _round(n: int, scale: float, clients: int, weighting: str) -> tuple[dict[str, Array], list[Reply]]:
    """A model, and what clients of different weights made of it; one of them has gone far."""
    rng = np.random.default_rng(n)
    old = {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    replies: list[Reply] = []
    for k in range(clients):
        far = 20 if k == 2 else 1
        update = {name: np.asarray(far * scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}
        weight = 1.0 if weighting == "uniform" else float(rng.integers(1, 100))
        loss = (float(rng.uniform(0.5, 2)) * weight, weight)
        replies.append(Reply(client=str(k), weight=weight, metrics={TRAIN_LOSS: loss}, update=update.__getitem__))
    return old, replies


def _mean(replies: Sequence[Reply]) -> Reply:
    total = sum(r.weight for r in replies)
    mean = {name: np.asarray(sum(r.weight / total * r.update(name) for r in replies)) for name in SHAPES}
    loss = (sum(r.metrics[TRAIN_LOSS][0] for r in replies), total)
    return Reply(client="", weight=total, metrics={TRAIN_LOSS: loss}, update=mean.__getitem__)


def _play(
    strategy: Strategy, rounds: Sequence[tuple[Mapping[str, Array], Sequence[Reply]]], *, keep: bool
) -> list[Array]:
    """How far each round moves the model; keep: whether the strategy is made again for each, from what it has kept."""
    rule, moves = build(strategy), list[Array]()
    with TemporaryDirectory(prefix="murmur-probe-") as folder:
        state = Path(folder, "state.safetensors")
        for n, (old, replies) in enumerate(rounds, 1):
            if keep and n > 1:
                rule = build(strategy)
                if state.exists():
                    read_state(state, rule, strategy)
            new = ask(rule, n, old, replies)
            if missing := sorted(set(SHAPES) - new.keys()):
                raise BadUpdate(f"the Flower strategy gave no {missing[0]!r}")
            moves.append(np.concatenate([(new[name] - old[name]).ravel() for name in SHAPES]))
            if keep:
                state.unlink(missing_ok=True)
                write_state(state, rule, strategy)
    return moves


def _agree(one: Sequence[Array], other: Sequence[Array]) -> bool:
    return all(bool(np.abs(a - b).max() <= NEAR * np.abs(a).max()) for a, b in zip(one, other, strict=True))
