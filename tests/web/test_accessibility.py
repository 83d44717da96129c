"""Every page for people who hear it or use no mouse: landmarks, labels, headers, what is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from murmur.web.rendering import STATIC

from .accessible import flaws
from .test_browser import PAGES, RUN

MORE = [
    f"{RUN}/versions/0",
    "/clients/va-2",
    "/runs/new?source=heart-disease&as=toml",
    "/models?run=none",
    "/runs/none",
]
SOUND = """<html lang="en"><head><title>T</title></head><body><header><a href="#main">Skip</a>
<nav aria-label="Main"></nav></header><main id="main"><h1>One</h1><h2>Two</h2><label for="a">A</label><input id="a">
<button type="submit">B</button>
<table><caption>C</caption><tr><th scope="col">D</th></tr></table><svg aria-hidden="true"></svg></main></body></html>"""


def test_no_page_has_a_flaw(browse: Callable[[str], TestClient]) -> None:
    """In English; test_language.py walks over the pages in the other languages."""
    admin = browse("ada")
    pages = {path: admin.get(path).text for path in [*PAGES, *MORE]}
    pages["an invitation"] = admin.post("/invitations", data={"name": "bay-view"}).text
    pages["/login"] = browse("").get("/login").text
    assert {path: found for path, html in pages.items() if (found := flaws(html, "en"))} == {}


def test_a_sound_page_has_no_flaw() -> None:
    assert flaws(SOUND, "en") == []


@pytest.mark.parametrize(
    ("sound", "broken", "flaw"),
    [
        ('lang="en"', 'lang="de"', "lang is de, not en"),
        ("<title>T", "<title>", "no title"),
        ("<h1>One</h1>", "", "0 h1"),
        ("<h2>Two</h2>", "<h3>Two</h3>", "h3 follows h1"),
        ('href="#main"', 'href="/"', "no way to skip the navigation"),
        (' aria-label="Main"', "", "unnamed <nav >"),
        ('<main id="main">', '<main id="main" data-live="/live">', "what changes is not announced"),
        ('for="a"', 'for="b"', 'no label: <input id="a">'),
        (">B<", "><", 'nothing to read: <button type="submit">'),
        ('<button type="submit">', "<button>", "a button of no type: <button >B"),
        ('<input id="a">', '<input id="a" tabindex="2">', 'out of the page\'s order: <input id="a" tabindex="2">'),
        ("<caption>C</caption>", "", "a table without a caption: <table >D"),
        (' scope="col"', "", "a header of no scope: <th >D"),
        (' aria-hidden="true"', "", "a picture without words: <svg >"),
        ("<h2>", '<h2 id="a">', "id a is there 2 times"),
        ("<h2>", '<h2 aria-labelledby="c">', 'aria-labelledby leads nowhere: <h2 aria-labelledby="c">Two'),
    ],
)
def test_each_flaw_is_found(sound: str, broken: str, flaw: str) -> None:
    assert SOUND.count(sound) == 1 and flaw in flaws(SOUND.replace(sound, broken), "en")


def test_what_has_the_focus_is_seen() -> None:
    """One rule draws it everywhere, and none takes it away."""
    css = "".join(path.read_text() for path in STATIC.glob("*.css"))
    assert ":focus-visible {" in css and "outline: none" not in css and "outline: 0" not in css
