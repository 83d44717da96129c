"""Pictures as SVG text: pure functions of numbers and names, the same for pages, notebooks and model cards.

Charts are as wide as their place: x is in percent, y in pixels, so text keeps its size on a phone. Colours are
presentation attributes that `pictures.css` overrides by class; nothing needs a script or an inline style. Every text
goes through `Markup.format`, which escapes, because names of clients and runs come from other organizations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from markupsafe import Markup

from .language import _

LEFT, WIDTH = 9.0, 88.0  # percent: the plot's left edge (room for numbers like 0.825 beside it) and its width
TOP, FOOT = 14.0, 26.0  # pixels above the plot and below it
MAX_POINTS = 160  # more points than that are less than four pixels apart
MAX_HOVER = 60  # points that one can point at; each is 400 bytes of every update of the chart


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A value over x; `note` is said beside it when one points at it."""

    x: float
    y: float
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line of a chart. `ink` is one of the classes a, b, c, d of pictures.css."""

    name: str
    points: Sequence[Point]
    ink: str = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """One client in `confluence`; `state` is waiting, sent, read or lost."""

    name: str
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One piece of a `strip`; `tone` is ok, bad, now or todo."""

    tone: str
    title: str


INKS = {"a": "#0b6b70", "b": "#5b52b5", "c": "#97590b", "d": "#1b7a4b"}


def line(
    series: Sequence[Series],
    *,
    label: str,
    x_range: tuple[float, float],
    x_label: str = "",
    x_unit: str = "",
    height: int = 230,
    log: bool = False,
) -> Markup:
    """A line chart with grid, end dots and a value under the pointer; gaps where a value is not finite.

    label: what the chart shows, read out in place of the picture. x_range: the ends of the x axis. x_label: what x
    counts, said at the first number below the axis; x_unit: said after each. log: the y axis is logarithmic, and
    values of 0 or less are gaps.
    """
    if log:
        series = [replace(s, points=[replace(p, y=_log(p)) for p in s.points]) for s in series]
    finite = [p.y for s in series for p in s.points if math.isfinite(p.y)]
    if not finite:
        return Markup('<svg class="chart" role="img" aria-label="{}" height="{}"></svg>').format(
            _("{chart}: no values yet", chart=label), height
        )
    ticks, decimals = axis(min(finite), max(finite))
    lo, hi, depth = ticks[0], ticks[-1], height - TOP - FOOT
    if log:
        ticks = log_ticks(lo, hi)
    x0, x1 = x_range if x_range[1] > x_range[0] else (x_range[0], x_range[0] + 1)

    def at_x(x: float) -> float:
        return 100 * (x - x0) / (x1 - x0)

    def at_y(y: float) -> float:
        return depth * (hi - y) / (hi - lo)

    out = [Markup('<svg class="chart" role="img" aria-label="{}" width="100%" height="{}">').format(label, height)]
    for tick in ticks:
        y = f"{TOP + at_y(tick):.1f}"
        out.append(
            Markup(
                '<line class="rule" x1="{l}%" x2="{r}%" y1="{y}" y2="{y}" stroke="#dfe6e6"/>'
                '<text class="tick" x="{t}%" y="{y}" dy="4" text-anchor="end" font-size="11">{v}</text>'
            ).format(
                l=_n(LEFT),
                r=_n(LEFT + WIDTH),
                t=_n(LEFT - 1.5),
                y=y,
                v=f"{10**tick:.3g}" if log else f"{tick:.{decimals}f}",
            )
        )
    for i, tick in enumerate(t for t in axis(x0, x1, want=5, whole=True)[0] if x0 <= t <= x1):
        out.append(
            Markup('<text class="tick" x="{}%" y="{}" text-anchor="middle" font-size="11">{}</text>').format(
                _n(LEFT + WIDTH * at_x(tick) / 100),
                _n(height - 8),
                f"{'' if i else x_label} {tick:.0f} {x_unit}".strip(),
            )
        )
    hover: list[Markup] = []
    alone = len(series) == 1
    for s in series:
        points = thin([p for p in s.points if x0 <= p.x <= x1])
        placed = [(at_x(p.x), at_y(p.y) if math.isfinite(p.y) else math.nan, p) for p in points]
        out.append(_lines(s, [(x, y) for x, y, _ in placed], depth, alone=alone))
        shown = {p.x for p in thin(points, MAX_HOVER)}
        hover += _hover(s, [at for at in placed if at[2].x in shown], depth, alone=alone)
    return Markup("").join([*out, *hover, Markup("</svg>")])


def _lines(series: Series, at: list[tuple[float, float]], depth: float, *, alone: bool) -> Markup:
    """Line, and area if it is alone, in a nested picture that is stretched in x only, and the dot at its end."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in at:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    runs = [r for r in runs if r]
    if not runs:
        return Markup("")
    paths = [" ".join(f"{'M' if i == 0 else 'L'}{_n(x)} {_n(y)}" for i, (x, y) in enumerate(r)) for r in runs]
    area = [f"{p} L{_n(r[-1][0])} {_n(depth)} L{_n(r[0][0])} {_n(depth)} Z" for p, r in zip(paths, runs, strict=True)]
    x, y = runs[-1][-1]
    return Markup(
        '<svg class="ink-{ink}" x="{l}%" y="{t}" width="{w}%" height="{d}" viewBox="0 0 100 {d}" '
        'preserveAspectRatio="none" overflow="visible">'
        '<path class="area" d="{area}" fill="{colour}" fill-opacity="0.08"/>'
        '<path class="stroke" d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" '
        'stroke-linecap="round" vector-effect="non-scaling-stroke"/></svg>'
        '<circle class="end ink-{ink}" cx="{cx}%" cy="{cy}" r="4" fill="{colour}"/>'
    ).format(
        ink=series.ink,
        colour=INKS[series.ink],
        l=_n(LEFT),
        t=_n(TOP),
        w=_n(WIDTH),
        d=_n(depth),
        area=" ".join(area) if alone else "",
        path=" ".join(paths),
        cx=_n(LEFT + WIDTH * x / 100),
        cy=_n(TOP + y),
    )


def _log(p: Point) -> float:
    return math.log10(p.y) if p.y > 0 else math.nan


def log_ticks(lo: float, hi: float) -> list[float]:
    """Where a logarithmic axis has its numbers: at 1, 2 and 5 times the powers of ten, or at these alone.

    Over less than a power of ten, at round numbers as on a linear axis. All are logarithms, as lo and hi are.
    """
    if hi - lo < 1:
        return [
            at for t in axis(10**lo, 10**hi, want=6)[0] if t > 0 and lo - 1e-9 <= (at := math.log10(t)) <= hi + 1e-9
        ]
    steps = (1.0,) if hi - lo > 3 else (1.0, 2.0, 5.0)
    powers = range(math.floor(lo), math.ceil(hi) + 1)
    found = [math.log10(step) + power for power in powers for step in steps]
    return [tick for tick in found if lo - 1e-9 <= tick <= hi + 1e-9]


def _hover(series: Series, placed: list[tuple[float, float, Point]], depth: float, *, alone: bool) -> list[Markup]:
    """For each point what to point at, and what then appears; pictures.css shows it, so no script is needed.

    alone: one points at a strip as high as the chart; where there are other lines, at the point itself.
    """
    out: list[Markup] = []
    seen = [(x, y, p) for x, y, p in placed if math.isfinite(y)]
    for i, (x, y, p) in enumerate(seen):
        left = (seen[i - 1][0] + x) / 2 if i else max(x - 2, 0)
        right = (seen[i + 1][0] + x) / 2 if i + 1 < len(seen) else min(x + 2, 100)
        cx = LEFT + WIDTH * x / 100
        hit = Markup('<circle class="hit" cx="{}%" cy="{}" r="9" fill-opacity="0"/>').format(_n(cx), _n(TOP + y))
        if alone:
            hit = Markup('<rect class="hit" x="{}%" y="{}" width="{}%" height="{}" fill-opacity="0"/>').format(
                _n(LEFT + WIDTH * left / 100), _n(TOP), _n(WIDTH * (right - left) / 100), _n(depth)
            )
        anchor, tx = ("start", cx + 1.5) if x < 50 else ("end", cx - 1.5)
        out.append(
            Markup(
                '<g class="point ink-{ink}">'
                "{hit}"
                '<line x1="{cx}%" x2="{cx}%" y1="{t}" y2="{b}" opacity="0"/>'
                '<circle cx="{cx}%" cy="{cy}" r="4" fill="{colour}" opacity="0"/>'
                '<text x="{tx}%" y="{ty}" text-anchor="{anchor}" font-size="12" opacity="0">{note}</text></g>'
            ).format(
                ink=series.ink,
                colour=INKS[series.ink],
                hit=hit,
                cx=_n(cx),
                tx=_n(tx),
                t=_n(TOP),
                b=_n(TOP + depth),
                cy=_n(TOP + y),
                ty=_n(TOP + 10),
                anchor=anchor,
                note=p.note or f"{series.name} {p.y:.4g}",
            )
        )
    return out


def sparkline(values: Iterable[float], *, label: str, ink: str = "a", height: int = 36) -> Markup:
    """A line without axes, from the first value to the last; values that are not finite are left out."""
    points = [v for v in values if math.isfinite(v)]
    points = [p.y for p in thin([Point(x=i, y=v) for i, v in enumerate(points)])]
    if len(points) < 2:
        return Markup("")
    lo, hi, pad = min(points), max(points), 4.0
    span = (hi - lo) or 1.0
    depth = height - 2 * pad
    at = [(100 * i / (len(points) - 1), pad + depth * (hi - v) / span) for i, v in enumerate(points)]
    path = " ".join(f"{'M' if i == 0 else 'L'}{_n(x)} {_n(y)}" for i, (x, y) in enumerate(at))
    return Markup(
        '<svg class="spark ink-{ink}" role="img" aria-label="{label}" width="100%" height="{h}" viewBox="0 0 100 {h}" '
        'preserveAspectRatio="none"><path class="stroke" d="{path}" fill="none" stroke="{colour}" stroke-width="1.75" '
        'stroke-linejoin="round" vector-effect="non-scaling-stroke"/></svg>'
    ).format(ink=ink, label=label, h=height, path=path, colour=INKS[ink])


def strip(cells: Sequence[Cell], *, label: str, height: int = 10) -> Markup:
    """A row of equal cells, one per round; each names itself under the pointer."""
    wide = 100 / max(len(cells), 1)
    gap = min(wide * 0.22, 0.4) if len(cells) > 1 else 0
    out = [Markup('<svg class="strip" role="img" aria-label="{}" width="100%" height="{}">').format(label, height)]
    for i, cell in enumerate(cells):
        out.append(
            Markup('<rect class="{}" x="{}%" width="{}%" height="{}" rx="2.5"><title>{}</title></rect>').format(
                f"cell {cell.tone}", _n(i * wide), _n(wide - gap), height, cell.title
            )
        )
    return Markup("").join([*out, Markup("</svg>")])


def confluence(voices: Sequence[Voice], *, label: str, sum_state: str) -> Markup:
    """How a masked round adds up: each client's update as a noisy line, running into one sum.

    sum_state: "hidden" while the sum is masked, "open" once the masks are off. Up to 8 clients stand with their names;
    of more, at most 48 are drawn, without names.
    """
    named = len(voices) <= 8
    drawn = voices if named else voices[:48]
    gap = 34.0 if named else 216.0 / max(len(drawn), 1)
    height = max(gap * len(drawn), 68.0) + 12
    first = (height - gap * (len(drawn) - 1)) / 2
    x0, x1, mid = (124.0 if named else 8.0), 318.0, height / 2
    out = [
        Markup('<svg class="confluence" role="img" aria-label="{}" viewBox="0 0 360 {}" width="100%">').format(
            label, _n(height)
        )
    ]
    for i, voice in enumerate(drawn):
        y = first + gap * i
        if named:
            out.append(
                Markup(
                    '<text class="who {state}" x="{tx}" y="{ty}" text-anchor="end" font-size="12">{short}'
                    '<title>{name}</title></text><circle class="src {state}" cx="{cx}" cy="{y}" r="3.5"/>'
                ).format(
                    state=voice.state,
                    tx=_n(x0 - 16),
                    ty=_n(y + 4),
                    short=voice.name if len(voice.name) <= 16 else voice.name[:15] + "…",
                    name=voice.name,
                    cx=_n(x0 - 4),
                    y=_n(y),
                )
            )
        masked = voice.state == "sent"
        path = wave((x0 + 4, y), (x1 - 20, mid), amplitude=min(gap * 0.22, 5.0) if masked else 0.0, phase=i * 1.7)
        if voice.state == "lost":  # the line breaks off where the client left
            stop = (x0 + 42, y + (mid - y) * 0.06)
            path = wave((x0 + 4, y), stop, amplitude=0.0, phase=0)
            out.append(
                Markup('<path class="cross" d="M{a} {b} l7 7 m0 -7 l-7 7" fill="none" stroke-width="1.75"/>').format(
                    a=_n(stop[0] + 4), b=_n(stop[1] - 3.5)
                )
            )
        out.append(
            Markup('<path class="{}" d="{}" fill="none" stroke="#0b6b70" stroke-width="1.75"/>').format(
                f"voice {voice.state}", path
            )
        )
    out.append(
        Markup(
            '<circle class="sum {s}" cx="{x}" cy="{y}" r="19" fill="none" stroke="#0b6b70" stroke-width="2"/>'
            '<text class="sigma {s}" x="{x}" y="{y}" dy="6" text-anchor="middle" font-size="17">Σ</text></svg>'
        ).format(s=sum_state, x=_n(x1), y=_n(mid))
    )
    return Markup("").join(out)


@lru_cache(maxsize=4)
def voices(count: int = 23, width: int = 640, height: int = 760) -> Markup:
    """The picture of the sign-in page: many uneven lines that become one calm line. For the eye only."""
    meet, mid = (width * 0.7, height / 2), height / 2
    out = [
        Markup(
            '<svg class="voices" aria-hidden="true" viewBox="0 0 {} {}" preserveAspectRatio="xMidYMid slice">'
        ).format(width, height)
    ]
    for i in range(count):
        share = i / max(count - 1, 1)
        y = 24 + (height - 48) * share
        path = wave((0, y), meet, amplitude=5 + 9 * abs(math.sin(2.1 * i + 0.6)), phase=1.7 * i, steps=90)
        out.append(Markup('<path class="voice v{}" d="{}" fill="none" stroke-width="1.25"/>').format(i % 3, path))
    out.append(
        Markup(
            '<path class="one" d="M{x} {y} L{w} {y}" fill="none" stroke-width="3"/>'
            '<circle class="meet" cx="{x}" cy="{y}" r="6"/>'
        ).format(x=_n(meet[0]), y=_n(mid), w=width)
    )
    return Markup("").join([*out, Markup("</svg>")])


def wave(
    start: tuple[float, float], end: tuple[float, float], *, amplitude: float, phase: float, steps: int = 48
) -> str:
    """Path data from start to end that eases from one height to the other, with noise that is zero at both ends."""
    (x0, y0), (x1, y1) = start, end
    at: list[str] = []
    for i in range(steps + 1):
        t = i / steps
        ease = t * t * (3 - 2 * t)
        noise = math.sin(math.pi * t) * (math.sin(41 * t + phase) + 0.6 * math.sin(67 * t + 2.3 * phase)) / 1.6
        at.append(f"{'M' if i == 0 else 'L'}{_n(x0 + (x1 - x0) * t)} {_n(y0 + (y1 - y0) * ease + amplitude * noise)}")
    return " ".join(at)


def axis(lo: float, hi: float, *, want: int = 4, whole: bool = False) -> tuple[list[float], int]:
    """Round numbers from just below lo to just above hi, about `want` steps apart, and the decimals they need."""
    if hi <= lo:
        lo, hi = (lo - abs(lo) * 0.1, hi + abs(hi) * 0.1) if lo else (-0.5, 0.5)
    rough = (hi - lo) / want
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999) * power
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return [k * step for k in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def thin(points: list[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points that keep the line's outline: lowest and highest of equal pieces, and both ends."""
    if len(points) <= most:
        return points
    inner, bins = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for b in range(bins):
        piece = inner[len(inner) * b // bins : len(inner) * (b + 1) // bins]
        lowest, highest = min(piece, key=_height), max(piece, key=_height)
        kept += sorted({lowest.x: lowest, highest.x: highest}.values(), key=lambda p: p.x)
    return [*kept, points[-1]]


def _height(p: Point) -> float:
    return p.y if math.isfinite(p.y) else -math.inf


def _n(value: float) -> str:
    """A coordinate, to a twentieth of a pixel at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
