"""The language of a page: its viewer's, while a request is answered or a fragment is drawn, and English elsewhere.

Words stand in the code in English and are looked up as they are shown, so that no function of the
pages takes a language. tests/web/catalogue.py collects them into the catalogues.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from gettext import GNUTranslations, NullTranslations
from io import BytesIO
from pathlib import Path
from typing import Any

from markupsafe import Markup

LOCALE = Path(__file__).parent / "locale"
ENGLISH = "en"
LANGUAGES: Mapping[str, str] = {ENGLISH: "English", "zh-Hans": "中文"}  # by tag of BCP 47, each in its own words
COUNT = "{n:,} "
OTHER_SCRIPT = ("hant", "tw", "hk", "mo")  # Chinese, but not Simplified

_language: ContextVar[str] = ContextVar("language", default=ENGLISH)


@contextmanager
def speaking(language: str) -> Generator[None]:
    """Everything that is drawn inside speaks this language, in threads that are started from here too."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def spoken() -> str:
    """The tag of the language that is spoken here."""
    return _language.get()


def preferred(cookie: str | None, accepted: str) -> str:
    """The language of a viewer who has chosen one, else the first of an Accept-Language header that there is."""
    if cookie is not None and cookie in LANGUAGES:
        return cookie
    asked: list[tuple[float, str]] = []
    for part in accepted[:1000].split(","):
        tag, weight = [*part.strip().lower().split(";q=", 1), ""][:2]
        try:
            asked.append((-float(weight or 1), tag))
        except ValueError:
            continue
    for refused, tag in sorted(asked, key=lambda a: a[0]):  # equal weights stay in their order
        primary, *rest = tag.split("-")
        if refused and primary == "zh" and not set(rest) & set(OTHER_SCRIPT):
            return "zh-Hans"
        if refused and primary == ENGLISH:
            return ENGLISH
    return ENGLISH


def _(text: str, **values: Any) -> str:
    """The words for an English text. values: for its {names}; without any, braces stand for themselves."""
    found = _catalogue(spoken()).gettext(text) if text else ""  # under the empty text, gettext keeps the header
    return found.format(**values) if values else found


def marked(text: str, **values: Any) -> Markup:
    """`_` for templates: markup in the text is kept, values are escaped."""
    found = Markup(_catalogue(spoken()).gettext(text))
    return found.format(**values) if values else found


def many(count: int, one: str, more: str = "") -> str:
    """1 client, 2 clients."""
    plural = more or f"{one}s"
    return _catalogue(spoken()).ngettext(COUNT + one, COUNT + plural, count).format(n=count)


@cache
def _catalogue(language: str) -> NullTranslations:
    """The catalogue of a language, read when its first viewer comes; what it lacks stays English."""
    if language == ENGLISH:
        return NullTranslations()
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    compiled = BytesIO()
    with (LOCALE / language.replace("-", "_") / "LC_MESSAGES" / "messages.po").open("rb") as file:
        write_mo(compiled, read_po(file, locale=language.replace("-", "_")))
    compiled.seek(0)
    return GNUTranslations(compiled)


class Spoken(Mapping[str, tuple[str, str]]):
    """A table of words and their tones, in the language of whoever looks something up; `table` holds the English."""

    def __init__(self, table: Mapping[str, tuple[str, str]]) -> None:
        self.table = table

    def __getitem__(self, key: str) -> tuple[str, str]:
        word, tone = self.table[key]
        return _(word), tone

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)
