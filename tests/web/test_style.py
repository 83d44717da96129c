"""The style sheet: colours that can be read in both schemes, and nothing that is fetched from elsewhere."""

from __future__ import annotations

import re

import pytest

from murmur.web.rendering import STATIC

CSS = (STATIC / "app.css").read_text()
SCRIPT = (STATIC / "app.js").read_text()


def colours(scheme: str) -> dict[str, str]:
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    return found | (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark.split("\n}\n")[0])) if scheme == "dark" else {}
    )


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [(ink, g) for ink in ("ink", "ink-2", "ink-3", "accent") for g in ("ground", "surface", "sunken")]
    + [(tone, f"{tone}-soft") for tone in ("accent", "ok", "warn", "bad")]
    + [("bad", "surface"), ("warn", "surface"), ("on-accent", "accent"), ("surface", "bad"), ("violet", "surface")],
)
def test_text_stands_out_from_its_ground(scheme: str, text: str, ground: str) -> None:
    values = colours(scheme)
    ratio = contrast(values[text], values[ground])
    assert ratio >= 4.5, f"{text} on {ground} in {scheme}: {ratio:.2f}"


def test_black_on_white_is_the_largest_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_style_and_script_fetch_nothing_from_elsewhere() -> None:
    for source in (CSS, SCRIPT, (STATIC / "pictures.css").read_text()):
        assert not re.search(r"https?:|url\(|@import|import\(", re.sub(r"//.*|/\*.*?\*/", "", source))


def test_motion_can_be_switched_off() -> None:
    assert "prefers-reduced-motion: reduce" in CSS
