"""Runs in a notebook: the pages' charts as one piece of HTML that brings its own colours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from . import svg, words

STATIC = Path(__file__).parent / "static"
INKS = "abcd"


def shown(title: str, said: str, metrics: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A run as HTML: its name, a sentence, and a chart for each metric.

    metrics: (version, value) pairs by name, in the order of versions.
    """
    charts = Markup("").join(_chart(name, metrics[name], INKS[n % len(INKS)]) for n, name in enumerate(metrics))
    head = Markup("<b>{}</b> <span>{}</span>").format(title, said)
    found = Markup('{}<div class="murmur"><p>{}</p><div class="charts">{}</div></div>').format(_style(), head, charts)
    return str(found)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as HTML; everything in it is escaped."""
    cells = [Markup("").join(Markup("<td>{}</td>").format(_cell(v)) for v in row) for row in rows]
    body = Markup("").join(Markup("<tr>{}</tr>").format(row) for row in cells)
    head = Markup("").join(Markup("<th>{}</th>").format(c) for c in columns)
    found = Markup(
        '{}<div class="murmur"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(_style(), title, head, body)
    return str(found)


def _cell(value: object) -> str:
    return words.number(value) if isinstance(value, float) else "–" if value is None else str(value)


def _chart(name: str, points: Sequence[tuple[float, float]], ink: str) -> Markup:
    placed = [svg.Point(x=x, y=y, note=f"version {x:.0f}: {words.number(y)}") for x, y in points]
    newest = words.number(points[-1][1])
    picture = svg.line(
        [svg.Series(name=name, points=placed, ink=ink)],
        label=f"{name} by version, {newest} at the last",
        x_range=(points[0][0], max(points[-1][0], points[0][0] + 1)),
        x_label="version",
        height=180,
    )
    return Markup('<figure><figcaption>{} <b class="ink-{}">{}</b></figcaption>{}</figure>').format(
        escape(name), ink, newest, picture
    )


@cache
def _style() -> Markup:
    """The pages' colours and pictures, for what lies inside `.murmur` alone."""
    light, dark = re.findall(r":root \{(.*?)\}", (STATIC / "app.css").read_text(), re.DOTALL)[:2]
    own = (
        f".murmur{{{light} background:var(--surface);color:var(--ink);font-family:system-ui,sans-serif;"
        "max-width:900px;padding:.2em 1em 1em}"
        f"@media(prefers-color-scheme:dark){{.murmur{{{dark}}}}}"
        ".murmur .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1.2em}"
        ".murmur figure{margin:0}.murmur span,.murmur caption{color:var(--ink-3)}.murmur figcaption b{color:var(--pen)}"
        ".murmur td,.murmur th{text-align:left;padding:.2em 1em .2em 0}.murmur caption{text-align:left}"
    )
    return Markup("<style>{}</style>").format(Markup(own + (STATIC / "pictures.css").read_text()))
