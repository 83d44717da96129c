"""A round's timeline as SVG: for each client a bar of what it did when, over one axis of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from . import svg
from .language import _

HEIGHT = 22.0  # pixels of a row
THICK = {"waiting": 3.0, "silent": 3.0}  # of a bar; all others 10
LEAST = 0.6  # percent: a phase that was heard of for an instant is still seen


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A phase from one second to another. `kind` is waiting, downloading, training, uploading, rest or silent."""

    kind: str
    since: float
    until: float
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An instant. `kind` is sent, lost, late or deadline."""

    kind: str
    at: float
    title: str


def bar(spans: Sequence[Span], marks: Sequence[Mark], *, end: float, label: str) -> Markup:
    """One client's row. end: seconds at the right edge; label: what it shows, in words."""
    out = [Markup('<svg class="gantt" role="img" aria-label="{}" width="100%" height="{}">').format(label, _n(HEIGHT))]
    for s in spans:
        thick = THICK.get(s.kind, 10.0)
        left = min(_at(s.since, end), 100 - LEAST)
        out.append(
            Markup(
                '<rect class="span {}" x="{}%" y="{}" width="{}%" height="{}" rx="{}"><title>{}</title></rect>'
            ).format(
                s.kind,
                _n(left),
                _n((HEIGHT - thick) / 2),
                _n(max(_at(s.until, end) - left, LEAST)),
                _n(thick),
                _n(min(thick / 2, 3)),
                s.title,
            )
        )
    out += [_mark(m, _at(m.at, end)) for m in marks if m.at <= end]
    return Markup("").join([*out, Markup("</svg>")])


def _mark(mark: Mark, x: float) -> Markup:
    """A line for a deadline, a cross for a loss, a dot for an update that came: the shape says what the colour does."""
    middle = HEIGHT / 2
    if mark.kind == "deadline":
        shape = Markup('<line x1="{x}%" x2="{x}%" y1="1" y2="{h}"/>').format(x=_n(x), h=_n(HEIGHT - 1))
    elif mark.kind == "sent":
        shape = Markup('<circle cx="{}%" cy="{}" r="4"/>').format(_n(min(max(x, 0.8), 99.2)), _n(middle))
    else:  # an inner picture stands at its percentage and is drawn in pixels
        shape = Markup('<svg x="{}%" y="{}" overflow="visible"><path d="M-4 -4l8 8m0 -8l-8 8"/></svg>').format(
            _n(min(max(x, 1), 99)), _n(middle)
        )
    return Markup('<g class="mark-{}">{}<title>{}</title></g>').format(mark.kind, shape, mark.title)


def scale(*, end: float) -> Markup:
    """The axis over the rows: round numbers of seconds, or of minutes where they are many."""
    unit, word = (60.0, "min") if end > 180 else (1.0, "s")
    out = [Markup('<svg class="gantt scale" aria-hidden="true" width="100%" height="14">')]
    ticks, decimals = svg.axis(0, end / unit, want=4)
    for tick in (t for t in ticks if t * unit <= end * 0.97):
        x = 100 * tick * unit / end
        anchor = "start" if x < 3 else "end" if x > 94 else "middle"
        out.append(
            Markup('<text class="tick" x="{}%" y="11" text-anchor="{}" font-size="11">{}</text>').format(
                _n(x), anchor, f"{tick:.{decimals}f} {_(word)}"
            )
        )
    return Markup("").join([*out, Markup("</svg>")])


def _at(second: float, end: float) -> float:
    return 100 * min(max(second / end, 0.0), 1.0)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
