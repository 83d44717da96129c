"""A run in a world as a picture: a metric over the world's time, who did what in the first rounds, who was heard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from ..web.svg import Point, Series, line
from ..web.words import many, number, took
from .history import History
from .stints import Stint
from .timeline import Timeline

CLIENTS, ROUNDS = 40, 6  # rows that are drawn, evenly from the fastest to the slowest; attempts that they show
WIDTH, LEFT, RIGHT, BAR, STEP = 760, 120, 130, 9, 14
CHART, HEAD = 230, 40
STYLE = """text{font:12px system-ui,sans-serif;fill:#1c2b2d}.dim,.tick{fill:#5d6f72}.back{fill:#fff}
.area,.point{display:none}.rule,.close{stroke:#dfe6e6}
.train{fill:#0b6b70}.move{fill:#7fb8b6}.late{fill:#b9c3c4}.lost{fill:#c2413a}
@media(prefers-color-scheme:dark){text{fill:#e6eeee}.dim,.tick{fill:#93a5a8}.back{fill:#0f1517}
.rule,.close{stroke:#2a3638}.train{fill:#3fb4ae}.move{fill:#1f6f6d}.late{fill:#4a5759}.lost{fill:#e5766e}.stroke{stroke:#3fb4ae}.end{fill:#3fb4ae}}"""


def picture(history: History) -> str:
    """A whole SVG file, light or dark as its reader is; the history is that of a run in a world."""
    timeline = history.world
    assert timeline is not None, "a run in a world has a timeline"
    rows = _rows(timeline)
    top = HEAD + CHART + 66
    height = top + STEP * len(rows) + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-label="{escape(_said(timeline), quote=True)}">',
            f'<style>{STYLE}</style><rect class="back" width="100%" height="100%"/>',
            f'<text x="12" y="22">{escape(_said(timeline))}: {escape(_name(history))}, and who did what</text>',
            f'<svg x="12" y="{HEAD}" width="{WIDTH - 24}" height="{CHART}">{_chart(history, timeline)}</svg>',
            *_legend(top - 40),
            *_stints(timeline, rows, top),
            *_heard(timeline, rows, top),
            "</svg>\n",
        ]
    )


def _said(timeline: Timeline) -> str:
    rounds = len(timeline.versions_s) - 1
    return (
        f"{many(rounds, 'round')} of {many(len(timeline.devices), 'client')} in {took(timeline.seconds)} of the world"
    )


def _name(history: History) -> str:
    """The metric that is drawn."""
    return "accuracy" if "accuracy" in history.final else next(iter(history.final), "")


def _chart(history: History, timeline: Timeline) -> str:
    """The metric of every version over the time at which it was there."""
    name = _name(history)
    unit, seconds = next((u for u in (("h", 3600), ("min", 60)) if timeline.seconds >= 5 * u[1]), ("s", 1))
    found = zip(timeline.versions_s, history.versions, strict=True)
    points = [Point(x=at / seconds, y=m[name], note=number(m[name])) for at, m in found if name in m]
    series = [Series(name=name, points=points)]
    label = f"{name} over the time in the world"
    last = timeline.versions_s[-1] / seconds
    chart = line(series, label=label, x_range=(0, max(last, 1e-9)), x_label=unit, height=CHART)
    return str(chart)


def _rows(timeline: Timeline) -> list[str]:
    """The clients that are drawn, the fastest one first."""
    names = sorted(timeline.devices, key=lambda c: (-timeline.devices[c].examples_per_s, c))
    if len(names) <= CLIENTS:
        return names
    return [names[round(i * (len(names) - 1) / (CLIENTS - 1))] for i in range(CLIENTS)]


def _legend(y: int) -> list[str]:
    found: list[str] = []
    for i, (kind, said) in enumerate(
        (("train", "trains"), ("move", "loads, sends"), ("late", "not counted"), ("lost", "left or crashed"))
    ):
        x = LEFT + 110 * i
        found.append(f'<rect class="{kind}" x="{x}" y="{y - 9}" width="10" height="10"/>')
        found.append(f'<text class="dim" x="{x + 14}" y="{y}">{said}</text>')
    return [*found, f'<text class="dim" x="{WIDTH - RIGHT + 12}" y="{y}">heard of asked</text>']


def _stints(timeline: Timeline, rows: Sequence[str], top: int) -> list[str]:
    """What the clients did in the first attempts."""
    if not timeline.attempts:
        return []
    shown = timeline.attempts[:ROUNDS]
    end_s = max(shown[-1].ends_s, 1e-9)
    scale, bottom = (WIDTH - LEFT - RIGHT) / end_s, top + STEP * len(rows)

    def x(at_s: float) -> float:
        return LEFT + min(max(at_s - timeline.began_s, 0.0), end_s) * scale

    found, told = list[str](), float(LEFT)
    for a in shown:
        place = LEFT + a.ends_s * scale
        found.append(f'<line class="close" x1="{place:.1f}" x2="{place:.1f}" y1="{top - 4}" y2="{bottom}"/>')
        if place - told > 64:  # so wide is a time's text
            told = place
            found.append(
                f'<text class="dim" x="{place:.1f}" y="{bottom + 14}" text-anchor="end">{took(a.ends_s)}</text>'
            )
    at = {client: top + STEP * i for i, client in enumerate(rows)}
    found += [
        f'<text class="dim" x="{LEFT - 8}" y="{y + BAR}" text-anchor="end">{escape(client[:16])}</text>'
        for client, y in at.items()
    ]
    for n, stint, fate in timeline.stints:
        if stint.client in at and stint.begins_s - timeline.began_s < end_s:
            found.append(_bar(n, stint, fate, at[stint.client], x))
    return found


def _bar(n: int, stint: Stint, fate: str, y: int, x: Callable[[float], float]) -> str:
    """One stint: three pieces where it was heard, one where it was not."""
    told = f"{stint.client}, round {n}: {fate}, {took(stint.ends_s - stint.begins_s)}"
    cuts = [(stint.begins_s, "move"), (stint.downloaded_s, "train"), (stint.trained_s, "move"), (stint.ends_s, "")]
    if fate != "heard":
        cuts = [(stint.begins_s, fate), (stint.ends_s, "")]
    pieces = "".join(
        f'<rect class="{kind}" x="{x(a):.1f}" y="{y}" width="{max(x(b) - x(a), 0.4):.1f}" height="{BAR}"/>'
        for (a, kind), (b, _) in pairwise(cuts)
    )
    return f"<g>{pieces}<title>{escape(told)}</title></g>"


def _heard(timeline: Timeline, rows: Sequence[str], top: int) -> list[str]:
    most = max((timeline.asked[c] for c in rows), default=0) or 1
    found: list[str] = []
    for i, client in enumerate(rows):
        y, left = top + STEP * i, WIDTH - RIGHT + 12
        wide = [(RIGHT - 70) * count / most for count in (timeline.asked[client], timeline.heard[client])]
        found.append(f'<rect class="late" x="{left}" y="{y}" width="{wide[0]:.1f}" height="{BAR}"/>')
        found.append(f'<rect class="train" x="{left}" y="{y}" width="{wide[1]:.1f}" height="{BAR}"/>')
        said = f"{timeline.heard[client]} of {timeline.asked[client]}"
        found.append(f'<text class="dim" x="{WIDTH - 54}" y="{y + BAR}">{said}</text>')
    return found
