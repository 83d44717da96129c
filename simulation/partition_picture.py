"""A partition as a picture: a bar for each client, as long as it has examples, divided by their classes."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from .partitioning import Partition

MOST = 60  # bars; of more clients these are shown, evenly from the smallest to the largest
NAMED = 12  # classes with a colour of their own; the others share the last one
WIDTH, LEFT, BAR, STEP, TOP = 760, 120, 12, 17, 64
# Paul Tol's muted scheme and three more, told apart by people who see few colours; the text says the same in figures.
COLOURS = (
    "#88ccee", "#cc6677", "#117733", "#ddcc77", "#332288", "#aa4499", "#44aa99", "#999933", "#882255", "#d95f02",
    "#7570b3", "#888888",
)  # fmt: skip
STYLE = """text{font:12px system-ui,sans-serif;fill:#1c2b2d}.dim{fill:#5d6f72}.back{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#e6eeee}.dim{fill:#93a5a8}.back{fill:#0f1517}}"""


def picture(partition: Partition, labels: Any = None) -> str:
    """A whole SVG file, light or dark as its reader is. labels: (N,), whose classes divide the bars."""
    sizes = partition.sizes
    shown = np.arange(len(partition))
    if len(shown) > MOST:
        shown = np.argsort(sizes, kind="stable")[np.linspace(0, len(shown) - 1, MOST).round().astype(int)]
    counts_KC = partition.counts(labels) if labels is not None else sizes[:, None]
    classes = [str(c) for c in np.unique(np.asarray(labels)).tolist()] if labels is not None else []
    height = TOP + STEP * len(shown) + 24
    scale = (WIDTH - LEFT - 70) / max(int(sizes.max()), 1)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(_said(partition), quote=True)}">',
        f'<style>{STYLE}</style><rect class="back" width="100%" height="100%"/>',
        f'<text x="12" y="22">{escape(partition.described)}</text>',
        *_legend(classes),
    ]
    for row, k in enumerate(shown):
        y, x = TOP + STEP * row, float(LEFT)
        name = partition.names[k] if partition.names else str(k)
        found.append(f'<text class="dim" x="{LEFT - 8}" y="{y + BAR - 2}" text-anchor="end">{escape(name[:16])}</text>')
        for c, count in enumerate(counts_KC[k].tolist()):
            if count:
                told = f"{count} of class {classes[c]}" if classes else f"{count} examples"
                found.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{count * scale:.1f}" height="{BAR}" fill="{_colour(c)}">'
                    f"<title>{escape(f'{name}: {told}')}</title></rect>"
                )
                x += count * scale
        found.append(f'<text class="dim" x="{x + 6:.1f}" y="{y + BAR - 2}">{sizes[k]}</text>')
    return "\n".join([*found, "</svg>", ""])


def _said(partition: Partition) -> str:
    facts = partition.facts()
    shown = f"; {MOST} of the clients are shown" if len(partition) > MOST else ""
    return f"{partition.described}: {facts['smallest']:.0f} to {facts['largest']:.0f} examples each{shown}"


def _legend(classes: list[str]) -> list[str]:
    found: list[str] = []
    for c, name in enumerate(classes[:NAMED]):
        x, last = 12 + 60 * c, c == NAMED - 1 and len(classes) > NAMED
        found.append(f'<rect x="{x}" y="36" width="10" height="10" fill="{_colour(c)}"/>')
        found.append(f'<text class="dim" x="{x + 14}" y="45">{escape("others" if last else name[:6])}</text>')
    return found


def _colour(c: int) -> str:
    return COLOURS[min(c, NAMED - 1)]
