"""How differently a model serves the clients, from what they report of themselves, and who weighs most in it.

Plain runs only: under secure aggregation nobody knows a single client's numbers, and nothing is computed of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from ..protocol.views import RunDetail
from . import words
from .language import _, many

LARGE = 0.5  # share of the weights from which on one site is said to be the version
WIDTH, HEIGHT, EDGE = 320, 44, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Fairness:
    """One metric over the clients of the newest version that was measured.

    worst, best: (client, value). largest: who weighs most in the version, with its share; None where all weigh alike.
    """

    metric: str
    version: int
    strip: Markup
    worst: tuple[str, float]
    best: tuple[str, float]
    largest: tuple[str, float] | None

    @property
    def gap(self) -> float:
        return abs(self.best[1] - self.worst[1])

    @property
    def one_is_half(self) -> bool:
        return self.largest is not None and self.largest[1] >= LARGE


def fairness(detail: RunDetail) -> Fairness | None:
    """None where nothing is known of single clients, or there is one only."""
    if not detail.reports:
        return None
    known = [n for n in ("accuracy", *detail.run.recipe.metrics) if all(n in r.metrics for r in detail.reports)]
    if not known or len(detail.reports) < 2:
        return None
    metric = known[0]
    values = sorted(
        ((r.client, r.metrics[metric]) for r in detail.reports if math.isfinite(r.metrics[metric])), key=lambda p: p[1]
    )
    if len(values) < 2:
        return None
    low = metric == "loss"
    weights = {r.client: r.weight for r in detail.reports}
    most = max(weights, key=lambda c: (weights[c], c))
    alike = len(set(weights.values())) == 1
    return Fairness(
        metric=metric,
        version=detail.reports[0].version,
        strip=_strip(metric, values),
        worst=values[-1 if low else 0],
        best=values[0 if low else -1],
        largest=None if alike else (most, weights[most] / sum(weights.values())),
    )


def _strip(metric: str, values: list[tuple[str, float]]) -> Markup:
    """Every client as a dot on one axis, from the lowest to the highest value; each names itself under the pointer."""
    low, span = values[0][1], values[-1][1] - values[0][1]
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="14" r="5"><title>{}: {}</title></circle>').format(
            round(EDGE + (v - low) / span * (WIDTH - 2 * EDGE) if span else WIDTH / 2, 1), client, words.number(v)
        )
        for client, v in values
    )
    end = Markup('<text class="tick" x="{}" y="38" text-anchor="{}">{}</text>')
    ends = end.format(0, "start", words.number(low)) + end.format(WIDTH, "end", words.number(low + span))
    label = _(
        "{metric} of {clients}, from {low} to {high}",
        metric=metric,
        clients=many(len(values), "client"),
        low=words.number(low),
        high=words.number(low + span),
    )
    return Markup(
        '<svg class="dots" role="img" aria-label="{}" viewBox="0 0 {} {}" font-size="10">'
        '<line class="rule" x1="0" x2="{}" y1="14" y2="14"/>{}{}</svg>'
    ).format(label, WIDTH, HEIGHT, WIDTH, dots, ends if span else "")
