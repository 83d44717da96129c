"""Charts side by side in one SVG file."""

from __future__ import annotations

from xml.etree import ElementTree

from murmur.web.curves import curves
from murmur.web.svg import INKS, Point, Series

SVG = "{http://www.w3.org/2000/svg}"


def series(name: str, ink: str, *ys: float) -> Series:
    return Series(name=name, ink=ink, points=[Point(x=x, y=y) for x, y in enumerate(ys)])


def test_panels_stand_in_rows_under_one_legend() -> None:
    panels = {f"part {n} <&>": [series("first", "a", 1, 2), series("second", "b", 3, n)] for n in range(3)}
    drawn = curves("what & why", panels, x_label="round", columns=2, width=600)
    root = ElementTree.fromstring(drawn)  # raises for what is no XML: names are escaped
    charts = [(float(c.get("x", "")), float(c.get("y", ""))) for c in root.findall(f"{SVG}svg")]
    assert [x for x, _ in charts] == [0, 300, 0]
    assert charts[0][1] == charts[1][1] < charts[2][1]
    texts = [t.text for t in root.findall(f"{SVG}text")]
    assert texts == ["what & why", "first", "second", "part 0 <&>", "part 1 <&>", "part 2 <&>"]
    assert INKS["a"] in drawn and INKS["c"] not in drawn
    assert float(root.get("height", "")) > charts[2][1] + 200


def test_one_chart_without_a_title_needs_no_room_for_it() -> None:
    titled, bare = (ElementTree.fromstring(curves("loss", {t: [series("x", "a", 1)]}, x_label="")) for t in ("one", ""))
    assert float(titled.get("height", "")) - float(bare.get("height", "")) == 20
