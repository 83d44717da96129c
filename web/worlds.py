"""How a simulated run went in its world: a metric over the world's time, and what was moved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from markupsafe import Markup

from ..protocol.views import RunDetail
from . import figures, svg, words
from .language import _

UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """seconds: of the world's clock since the run began. jain: Jain's index of how often clients were heard, 1 where
    all were heard alike; never: clients that were not once.
    """

    seconds: float
    down_bytes: int
    up_bytes: int
    jain: float
    never: int
    metric: str
    picture: Markup


def world(detail: RunDetail) -> World | None:
    """None for a run without a world, or before its first round."""
    lived = [(r, r.world) for r in detail.rounds if r.world]
    if not lived or not detail.run.simulation:
        return None
    heard = Counter(a.client for r, _w in lived for a in r.assignments if not a.lost)
    clients, total = detail.run.simulation.clients, heard.total()
    name = next(iter(figures.main_metrics(m.name for m in detail.metrics)), "")
    return World(
        seconds=lived[-1][1].ends_s,
        down_bytes=sum(w.down_bytes for _r, w in lived),
        up_bytes=sum(w.up_bytes for _r, w in lived),
        jain=total**2 / (clients * sum(n * n for n in heard.values())) if total else 0.0,
        never=clients - len(heard),
        metric=name,
        picture=_chart(detail, name, {0: 0.0} | {r.n: w.ends_s for r, w in lived}),
    )


def _chart(detail: RunDetail, name: str, made_s: dict[int, float]) -> Markup:
    """The metric of every version over the time at which it was there."""
    end_s = max(made_s.values())
    one, unit = next(u for u in UNITS if end_s >= 5 * u[0] or u[0] == 1)
    points = [
        svg.Point(
            x=made_s[m.version] / one,
            y=m.value,
            note=_(
                "Version {n}: {value} after {span}",
                n=m.version,
                value=words.number(m.value),
                span=words.took(made_s[m.version]),
            ),
        )
        for m in detail.metrics
        if m.name == name and m.version in made_s
    ]
    label = _("{metric} over the time in the world", metric=words.metric(name))
    series = [svg.Series(name=name, points=points)]
    return svg.line(series, label=label, x_range=(0.0, max(end_s / one, 1e-9)), x_unit=_(unit))
