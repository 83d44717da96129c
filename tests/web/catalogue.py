"""The words of the pages, collected into the catalogues of web/locale: run this file after changing any of them.

What the code looks up by a name stands in tables, which are read here; the rest is where `_` and `many` are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_python
from babel.messages.pofile import read_po, write_po
from jinja2.ext import babel_extract

from murmur.clients import outgoing, site_app, site_board
from murmur.protocol import errors, refusals
from murmur.web import audit_words, comparing, reasons, recipe_form, registry, timeline, words
from murmur.web.language import COUNT, ENGLISH, LANGUAGES, LOCALE

WEB = Path(__file__).parents[2] / "web"
SITE = [WEB.parent / "clients" / f"{name}.py" for name in ("policy_words", "site_app", "site_board")]  # its own page
MADE = datetime(2026, 1, 1, tzinfo=UTC)  # a header that would change with each run would be in every diff
Message = str | tuple[str, str]  # with its plural


def messages() -> set[Message]:
    """Everything that has to stand in a catalogue."""
    return {
        *_tables(),
        *(m for path in (*WEB.glob("*.py"), *WEB.glob("templates/*.html"), *SITE) for m in _called(path)),
    }


def _called(path: Path) -> Iterator[Message]:
    extract = extract_python if path.suffix == ".py" else babel_extract
    with path.open("rb") as file:
        for _, function, said, _ in extract(file, ("_", "many"), (), {"silent": "false", "encoding": "utf-8"}):
            given = [s for s in (said if isinstance(said, tuple) else (said,)) if s]
            if given and function == "many":
                plural = given[1] if len(given) > 1 else f"{given[0]}s"
                yield COUNT + given[0], COUNT + plural
            elif given:
                yield given[0]


def _tables() -> Iterator[str]:
    for table in (words.RUN, words.CLIENT, words.ASSIGNMENT, site_board.STATES, site_board.CONSENTS):
        yield from (word for word, _ in table.table.values())
    for phases in (words.PLAIN, words.SECURE):
        yield from (word for _, *both in phases for word in both)
    yield from (word for both in words.EVALUATE.values() for word in both)
    yield from (*words.CLIENT_PHASE.values(), *words.LEVEL.values(), *words.UNITS, *words.SCRIPT, *words.USUAL_METRICS)
    yield from (*words.LEVEL, *audit_words.AUDITED, *audit_words.AUDIT_DETAILS)
    yield from (sentence for _, sentence in words.EVENTS.values())
    yield from (*refusals.REASONS.values(), *reasons.SENTENCES, *reasons.STATES.values())
    yield from (*timeline.DOING.values(), *comparing.AXES.values())
    yield from (kind.title for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "title"))
    for section in recipe_form.sections():
        yield from (section.title, section.help)
        for field in section.fields:
            yield from (field.title, field.help)
    yield from (word for both in outgoing.KINDS.values() for word in both)
    yield from (*site_board.SAID, site_app.HERE)
    yield from (registry.ALIAS_SENTENCE, "admin", "researcher", "viewer")


def file_of(language: str) -> Path:
    return LOCALE / language.replace("-", "_") / "LC_MESSAGES" / "messages.po"


def catalogue(language: str) -> Catalog:
    with file_of(language).open("rb") as file:
        return read_po(file, locale=language.replace("-", "_"))


def update(language: str) -> int:
    """Bring a catalogue up to date; what has no translation yet stands in it with none. How many those are."""
    old = catalogue(language) if file_of(language).exists() else Catalog()
    new = Catalog(
        language.replace("-", "_"), project="Murmur", header_comment=f"# Murmur: {LANGUAGES[language]}", fuzzy=False
    )
    new.creation_date = new.revision_date = MADE
    for message in sorted(messages(), key=_place):
        if message:
            known = old.get(message if isinstance(message, str) else message[0])
            new.add(message, known.string if known else None)
    with file_of(language).open("wb") as file:
        write_po(file, new, width=120)
    return sum(not m.string or not all(m.string) for m in new if m.id)


def _place(message: Message) -> tuple[str, str]:
    """Where a message stands; "Role" and "role" too have an order, or each run of this file would be a diff."""
    said = message if isinstance(message, str) else message[0]
    return said.casefold(), said


if __name__ == "__main__":
    for tag in LANGUAGES:
        if tag != ENGLISH:
            print(f"{tag}: {update(tag)} messages have no translation")
