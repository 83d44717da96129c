"""Pipeline stages that turn out to be uneven: what layers cost in a training, and where it is better to cut.

At first a chain of layers is cut by weights and operations (`splitting`), which say little of a layer that loops, or
that memory is slow for. What a stage takes is known after a round, and a layer may move before the next one.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .splitting import balanced

UNBALANCED = 1.25  # a stage that takes so many times the mean of all holds the others up
WORTH = 0.9  # of the longest stage's time, at most, is what another cut must come to: a model is placed anew for it
LEAST_S = 1e-3  # of the longest stage, per micro-batch: below it, what differs is the machine's other work
KEPT = 256  # times of each thing: enough for a median, whatever a round's length


def better(costs: Sequence[float], cuts: Sequence[int]) -> list[int] | None:
    """Where to cut a chain of layers instead, as all borders; None where it is balanced, or cannot be cut much better.

    costs: seconds of each layer. cuts: all borders of the stages as they are.
    """
    spent = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
    if max(spent) < LEAST_S or max(spent) * len(spent) <= UNBALANCED * sum(spent):
        return None
    found = balanced(costs, len(spent))
    return found if max(sum(costs[a:b]) for a, b in itertools.pairwise(found)) <= WORTH * max(spent) else None


class Stopwatch:
    """Times of passes by name, on the device where they run. Reading them waits for it, taking them does not."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: defaultdict[object, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, name: object) -> Generator[None]:
        begun = self._now()
        yield
        self._add(name, begun)

    def watch(self, name: object, layer: nn.Module) -> None:
        """Time all of a layer's forward passes that will be differentiated."""
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun[:] = [self._now()] if torch.is_grad_enabled() else []

        def after(*_: Any) -> None:
            if begun:
                self._add(name, begun.pop())

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def forget(self) -> None:
        self._spans.clear()

    def medians(self) -> dict[object, float]:
        """Seconds by name; a first pass, which may have to warm up, is rarely the one in the middle."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return {name: median(self._between(*span) for span in spans) for name, spans in self._spans.items()}

    def _add(self, name: object, begun: Any) -> None:
        if len(self._spans[name]) < KEPT:
            self._spans[name].append((begun, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        return begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun


def layer_costs(medians: Mapping[object, float], cuts: Sequence[int]) -> list[float]:
    """Seconds of each layer, forward and backward, 0 for those of other processes.

    medians: by ("layer", number), forward, and by (kind of pass, stage). What a stage's passes take together is shared
    among its layers as their forward passes are: nothing tells when one of a chain's backward passes begins.
    """
    costs = [0.0] * cuts[-1]
    for stage, (first, last) in enumerate(itertools.pairwise(cuts)):
        forward = [medians.get(("layer", number), 0.0) for number in range(first, last)]
        passes = sum(medians.get((kind, stage), 0.0) for kind in ("forward", "backward", "weights"))
        whole = sum(forward)
        for number, seconds in enumerate(forward, first):
            costs[number] = passes * seconds / whole if whole else 0.0
    return costs
