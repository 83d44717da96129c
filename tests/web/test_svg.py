"""Pictures parsed as XML: coordinates that can be checked by hand, and names that try to break out."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from murmur.web import svg
from murmur.web.svg import Cell, Point, Series, Voice

HOSTILE = "</text></svg><script>alert(1)</script>\"'&"


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(picture))


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if name in e.get("class", "").split()]


def chart(*points: tuple[float, float], x_range: tuple[float, float] = (0, 10)) -> ElementTree.Element:
    series = Series(name="accuracy", points=[Point(x=x, y=y) for x, y in points])
    return parse(svg.line([series], label="accuracy", x_range=x_range, height=140))


def test_a_line_runs_through_its_points_in_the_stretched_plot() -> None:
    # 140 high: 14 above, 26 below, 100 for the plot. Ticks 0 to 10, so y = 10 is at 0 and y = 5 at 50.
    root = chart((0, 0), (5, 5), (10, 10))
    plot = next(e for e in root if e.get("viewBox"))
    assert (plot.get("x"), plot.get("y"), plot.get("width"), plot.get("height")) == ("9%", "14", "88%", "100")
    assert plot.get("viewBox") == "0 0 100 100"
    assert of_class(plot, "stroke")[0].get("d") == "M0 100 L50 50 L100 0"
    assert of_class(plot, "area")[0].get("d") == "M0 100 L50 50 L100 0 L100 100 L0 100 Z"


def test_the_end_dot_lies_on_the_last_point() -> None:
    (dot,) = of_class(chart((0, 0), (5, 10)), "end")
    assert (dot.get("cx"), dot.get("cy")) == ("53%", "14")  # 9 + 88/2 percent across, at the plot's top


def test_ticks_stand_beside_their_lines() -> None:
    root = chart((0, 0.5), (10, 0.82))
    said = [(e.text, e.get("y")) for e in of_class(root, "tick") if e.get("text-anchor") == "end"]
    assert said == [("0.5", "114.0"), ("0.6", "89.0"), ("0.7", "64.0"), ("0.8", "39.0"), ("0.9", "14.0")]


def test_values_that_are_not_finite_leave_a_gap() -> None:
    root = chart((0, 0), (2, 2), (4, math.nan), (6, math.inf), (8, 8), (10, 10))
    assert of_class(root, "stroke")[0].get("d") == "M0 100 L20 80 M80 20 L100 0"
    assert len(of_class(root, "point")) == 4


def test_a_chart_without_a_finite_value_says_so() -> None:
    assert chart((0, math.nan)).get("aria-label") == "accuracy: no values yet"


def test_a_constant_line_lies_inside_its_axis() -> None:
    (d,) = [e.get("d") for e in of_class(chart((0, 0.5), (10, 0.5)), "stroke")]
    assert d is not None
    heights = [float(part.split()[1]) for part in d.replace("M", "L").split("L") if part]
    assert all(0 < y < 100 for y in heights)


@pytest.mark.parametrize(
    ("lo", "hi", "ticks", "decimals"),
    [
        (0.5, 0.82, [0.5, 0.6, 0.7, 0.8, 0.9], 1),
        (0, 10, [0, 5, 10], 0),
        (0.41, 0.47, [0.4, 0.42, 0.44, 0.46, 0.48], 2),
        (-3, 3, [-4, -2, 0, 2, 4], 0),
        (1200, 4800, [1000, 2000, 3000, 4000, 5000], 0),
    ],
)
def test_an_axis_has_round_numbers_around_the_values(lo: float, hi: float, ticks: list[float], decimals: int) -> None:
    got, places = svg.axis(lo, hi)
    assert got == pytest.approx(ticks)
    assert places == decimals


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-9])
def test_an_axis_around_one_value_still_has_a_length(value: float) -> None:
    ticks, _ = svg.axis(value, value)
    assert ticks[0] < value < ticks[-1]


def test_thinning_keeps_both_ends_the_peak_and_the_order() -> None:
    points = [Point(x=i, y=1000.0 if i == 4321 else math.sin(i)) for i in range(10_000)]
    kept = svg.thin(points)
    assert len(kept) <= svg.MAX_POINTS
    assert (kept[0].x, kept[-1].x) == (0, 9999)
    assert any(p.x == 4321 for p in kept)
    assert [p.x for p in kept] == sorted(p.x for p in kept)


def test_a_run_of_ten_thousand_rounds_is_drawn_in_under_60_kilobytes() -> None:
    points = [Point(x=i, y=math.sin(i / 100), note="Version 1: 0.5") for i in range(10_000)]
    picture = svg.line([Series(name="a", points=points)], label="a", x_range=(0, 10_000))
    assert len(picture) < 60_000


def test_a_sparkline_goes_from_bottom_left_to_top_right() -> None:
    root = parse(svg.sparkline([1, 3, math.nan, 2], label="loss", height=28))
    assert of_class(root, "stroke")[0].get("d") == "M0 24 L50 4 L100 14"  # 4 pixels of margin, 20 of height


def test_one_value_is_no_sparkline() -> None:
    assert svg.sparkline([0.5], label="loss") == ""


def test_a_strip_has_a_named_cell_per_round() -> None:
    root = parse(
        svg.strip([Cell(tone="ok", title="Round 1: done"), Cell(tone="todo", title="Round 2")], label="1 of 2")
    )
    cells = of_class(root, "cell")
    assert [(c.get("x"), c.get("width")) for c in cells] == [("0%", "49.6%"), ("50%", "49.6%")]
    assert [c[0].text for c in cells] == ["Round 1: done", "Round 2"]


def test_the_picture_of_the_sum_tells_clients_apart_by_state() -> None:
    voices = [Voice(name="cleveland", state="sent"), Voice(name="hungarian", state="waiting")]
    voices += [Voice(name="va", state="lost")]
    root = parse(svg.confluence(voices, label="1 of 3", sum_state="hidden"))
    assert [e.get("class") for e in of_class(root, "voice")] == ["voice sent", "voice waiting", "voice lost"]
    assert len(of_class(root, "cross")) == 1
    assert len(of_class(root, "hidden")) == 2
    sent, waiting, lost = (e.get("d") or "" for e in of_class(root, "voice"))
    # 3 rows of 34 pixels in 114: the second row is the middle, where all that arrive end, 20 before the sum's centre
    assert sent.startswith("M128 23") and sent.endswith("L298 57")
    assert waiting.startswith("M128 57") and set(waiting.replace("M", "L").split("L")[1:]) != set()
    assert {part.split()[1] for part in waiting.replace("M", "L").split("L") if part} == {"57"}  # no noise: not masked
    assert not lost.endswith("L298 57")


def test_a_large_cohort_is_drawn_without_names() -> None:
    voices = [Voice(name=f"client-{i}", state="sent") for i in range(1000)]
    root = parse(svg.confluence(voices, label="1000", sum_state="open"))
    assert len(of_class(root, "voice")) == 48
    assert not of_class(root, "who")


@pytest.mark.parametrize(
    "picture",
    [
        svg.line([Series(name=HOSTILE, points=[Point(x=0, y=1, note=HOSTILE)])], label=HOSTILE, x_range=(0, 1)),
        svg.sparkline([1, 2], label=HOSTILE),
        svg.strip([Cell(tone="ok", title=HOSTILE)], label=HOSTILE),
        svg.confluence([Voice(name=HOSTILE, state="sent")], label=HOSTILE, sum_state="hidden"),
    ],
    ids=["line", "sparkline", "strip", "confluence"],
)
def test_a_hostile_name_stays_text(picture: str) -> None:
    root = parse(picture)
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert root.get("aria-label") == HOSTILE


def test_no_picture_carries_an_inline_style() -> None:
    pictures = [
        svg.voices(),
        svg.line([Series(name="a", points=[Point(x=0, y=1)])], label="a", x_range=(0, 1)),
        svg.confluence([Voice(name="a", state="lost")], label="a", sum_state="open"),
    ]
    for picture in pictures:
        assert not [e for e in parse(picture).iter() if "style" in e.attrib or e.tag == "style"]
