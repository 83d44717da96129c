"""What somebody who hears a page, or has no mouse, would stumble over in its HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
FIELDS = ("input", "select", "textarea")
HEADINGS = {f"h{n}": n for n in range(1, 7)}
POINTERS = ("aria-labelledby", "aria-describedby", "aria-controls", "for", "list")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parents: tuple[Element, ...]
    inside: list[Element | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Element]:
        for e in self.inside:
            if isinstance(e, Element):
                if not tags or e.tag in tags:
                    yield e
                yield from e.all(*tags)

    def text(self) -> str:
        """What is read aloud of it; what is hidden from that is left out."""
        if self.attributes.get("aria-hidden") == "true":
            return ""
        own = self.attributes.get("aria-label") or self.attributes.get("alt") or ""
        return own or " ".join(e if isinstance(e, str) else e.text() for e in self.inside).strip()

    def __str__(self) -> str:
        said = " ".join(f'{k}="{v}"' for k, v in self.attributes.items() if k != "class")
        return f"<{self.tag} {said}>{self.text()[:30]}"


class Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {}, ())
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs}, tuple(self._open))
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].inside.append(Element(tag, {k: v or "" for k, v in attrs}, tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1].tag == tag:
            self._open.pop()
        else:
            raise ValueError(f"</{tag}> closes {self._open[-1]}")

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)


def flaws(html: str, language: str) -> list[str]:
    """Everything wrong with a whole page in this language, as sentences; empty for one that is as it should be."""
    tree = Tree()
    tree.feed(html)
    return [*_frame(tree.root, language), *_forms(tree.root), *_tables(tree.root), *_pointers(tree.root)]


def _frame(page: Element, language: str) -> Iterator[str]:
    (root,) = page.all("html")
    if root.attributes.get("lang") != language:
        yield f"lang is {root.attributes.get('lang')}, not {language}"
    if [t for t in page.all("title") if t.text()] == []:
        yield "no title"
    levels = [HEADINGS[h.tag] for h in page.all(*HEADINGS)]
    if levels.count(1) != 1:
        yield f"{levels.count(1)} h1"
    yield from (f"h{after} follows h{before}" for before, after in pairwise(levels) if after > before + 1)
    yield from (f"empty {h}" for h in page.all(*HEADINGS) if not h.text())
    (main,) = page.all("main")
    if any("data-part" in e.attributes for e in main.all()) and "data-live" not in main.attributes:
        yield "parts that nothing renews"
    if "data-live" in main.attributes and not any(
        e.attributes.get("role") in {"status", "alert", "log"} or "aria-live" in e.attributes for e in page.all()
    ):
        yield "what changes is not announced"
    if bars := list(page.all("header")):
        first = next(page.all("a", "button"))
        if first.attributes.get("href") != "#main" or len(bars) != 1:
            yield "no way to skip the navigation"
        if sum(a.attributes.get("aria-current") == "page" for a in bars[0].all("a")) > 1:
            yield "two pages are the current one"
    yield from (f"unnamed {nav}" for nav in page.all("nav") if not nav.attributes.get("aria-label"))


def _forms(page: Element) -> Iterator[str]:
    labelled = {label.attributes["for"]: label.text() for label in page.all("label") if "for" in label.attributes}
    for e in page.all(*FIELDS):
        if e.attributes.get("type") == "hidden":
            continue
        around = next((p.text() for p in e.parents if p.tag == "label"), "")
        named = {"aria-label", "aria-labelledby"} & e.attributes.keys()
        if not (around or named or labelled.get(e.attributes.get("id", ""))):
            yield f"no label: {e}"
    for e in page.all("a", "button", "summary"):
        unseen = e.attributes.get("aria-hidden") == "true" and e.attributes.get("tabindex") == "-1"
        if not e.text() and not unseen:
            yield f"nothing to read: {e}"
        if e.tag == "a" and "href" not in e.attributes:
            yield f"not reached by keyboard: {e}"
        if e.tag == "button" and "type" not in e.attributes:
            yield f"a button of no type: {e}"
    for e in page.all():
        if int(e.attributes.get("tabindex", "0")) > 0:
            yield f"out of the page's order: {e}"
        if any(name.startswith("on") for name in e.attributes):
            yield f"a script of its own: {e}"


def _tables(page: Element) -> Iterator[str]:
    for table in page.all("table"):
        if "aria-labelledby" not in table.attributes and not any(c.text() for c in table.all("caption")):
            yield f"a table without a caption: {table}"
        yield from (f"a header of no scope: {th}" for th in table.all("th") if "scope" not in th.attributes)
        if not any(table.all("th")):
            yield f"a table without headers: {table}"
    for svg in page.all("svg"):
        if any(e.tag == "svg" for e in svg.parents):  # a part of a picture
            continue
        hidden = any(e.attributes.get("aria-hidden") == "true" for e in (svg, *svg.parents))
        if not hidden and not (
            svg.attributes.get("role") == "img" and (svg.text() or "aria-labelledby" in svg.attributes)
        ):
            yield f"a picture without words: {svg}"
    yield from (f"a picture without words: {img}" for img in page.all("img") if "alt" not in img.attributes)


def _pointers(page: Element) -> Iterator[str]:
    ids = Counter(e.attributes["id"] for e in page.all() if "id" in e.attributes)
    yield from (f"id {name} is there {n} times" for name, n in ids.items() if n > 1)
    for e in page.all():
        for name in POINTERS:
            for target in e.attributes.get(name, "").split():
                if target not in ids:
                    yield f"{name} leads nowhere: {e}"
        if e.tag == "a" and e.attributes.get("href", "").startswith("#") and e.attributes["href"][1:] not in ids:
            yield f"leads nowhere: {e}"
