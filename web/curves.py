"""Line charts side by side as one SVG file that stands alone: pictures of sweeps and of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .svg import INKS, Series, line

HEIGHT, ROW, HEAD, TITLE = 230, 18, 34, 20  # pixels: a chart, a line of the legend, above the legend, a chart's title
STYLE = ".area,.point{display:none}"


def curves(
    said: str,
    panels: Mapping[str, Sequence[Series]],
    *,
    x_label: str,
    columns: int = 1,
    width: int = 760,
    log: bool = False,
) -> str:
    """A whole SVG file: a chart for each panel, in rows of `columns`, under one legend.

    panels: by their titles, which may be empty; series of the same name have the same ink in all. x_label, log: as of
    `line`. Dark text on white, in any surroundings.
    """
    inks = {s.name: s.ink for series in panels.values() for s in series}
    title = TITLE if any(panels) else 0
    top, wide, high = HEAD + ROW * len(inks), width / columns, HEIGHT + title
    height = top + high * -(-len(panels) // columns)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui,sans-serif" font-size="12" role="img" aria-label="{escape(said, quote=True)}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="12" y="20" font-weight="600">{escape(said)}</text>'
    ]
    for i, (name, ink) in enumerate(inks.items()):
        out.append(
            f'<rect x="12" y="{24 + ROW * i + 4}" width="14" height="4" fill="{INKS[ink]}"/>'
            f'<text x="34" y="{24 + ROW * i + 11}" fill="#3f545b">{escape(name)}</text>'
        )
    for i, (name, series) in enumerate(panels.items()):
        x, y = wide * (i % columns), top + high * (i // columns)
        last = max((s.points[-1].x for s in series if s.points), default=1.0)
        label = f"{said}: {name}" if name else said
        chart = line(series, label=label, x_range=(0.0, last), x_label=x_label, height=HEIGHT, log=log)
        if name:
            out.append(f'<text x="{x + wide / 2:g}" y="{y + 14:g}" text-anchor="middle">{escape(name)}</text>')
        out.append(f'<svg x="{x:g}" y="{y + title:g}" width="{wide:g}" height="{HEIGHT}">{chart}</svg>')
    return "\n".join([*out, "</svg>\n"])
