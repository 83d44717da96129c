"""The pages in the language of their viewer: nothing unmarked, nothing untranslated, and English where nobody asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from string import Formatter

import pytest
from jinja2 import Environment, nodes
from starlette.testclient import TestClient

from murmur.web import words
from murmur.web.language import LANGUAGES, _, many, marked, preferred, speaking
from murmur.web.rendering import HERE, Renderer

from .accessible import flaws
from .catalogue import catalogue, messages
from .fakes import FakeConsole
from .test_browser import PAGES, RUN

OTHERS = [tag for tag in LANGUAGES if tag != "en"]
TEMPLATES = sorted((HERE / "templates").glob("*.html"))
SAID = ("aria-label", "title", "placeholder", "alt")  # attributes that people hear or read


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        (None, "", "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh-Hans"),
        (None, "en-GB,en;q=0.9,zh-CN;q=0.8", "en"),
        (None, "de-DE, zh;q=0.5, en;q=0.7", "en"),
        (None, "zh-TW,en;q=0.5", "en"),  # who reads Traditional Chinese and English
        (None, "zh;q=0, en;q=x, *", "en"),
        ("zh-Hans", "en", "zh-Hans"),
        ("en", "zh-CN", "en"),
        ("tlh", "zh-CN", "zh-Hans"),
    ],
)
def test_a_choice_comes_before_what_the_browser_asks_for(cookie: str | None, accepted: str, language: str) -> None:
    assert preferred(cookie, accepted) == language


def test_words_are_those_of_who_is_spoken_to_and_values_are_escaped() -> None:
    at = datetime(2026, 3, 2, 9, 5, tzinfo=UTC)
    assert (many(1, "client"), many(1200, "client"), words.date(at)) == (
        "1 client",
        "1,200 clients",
        "02 Mar 2026, 09:05",
    )
    with speaking("zh-Hans"):
        assert (many(1, "client"), many(1200, "client")) == ("1 个客户端", "1,200 个客户端")
        assert (words.date(at), words.took(125)) == ("2026年03月02日 09:05", "2 分钟 5 秒")
        assert words.RUN["paused"] == ("已暂停", "warn")
        assert marked("Task {task}", task="<b>") == "任务 &lt;b&gt;"
        assert _("no page says this {at all}") == "no page says this {at all}"
    assert words.RUN["paused"] == ("Paused", "warn")


@pytest.mark.parametrize("language", OTHERS)
def test_a_catalogue_has_all_that_the_pages_say_and_no_more(language: str) -> None:
    found = {m.id if isinstance(m.id, str) else tuple(m.id): m for m in catalogue(language) if m.id}
    assert set(found) == {m for m in messages() if m}, "run tests/web/catalogue.py and translate what is new"
    for message in found.values():
        assert not message.fuzzy, message.id
        for said in (message.string,) if isinstance(message.string, str) else message.string:
            asked = message.id if isinstance(message.id, str) else message.id[0]
            assert said, f"{asked!r} is not translated"
            assert fields(said) == fields(asked), asked
            assert tags(said) == tags(asked), asked


def fields(text: str) -> set[tuple[str, str]]:
    """The {names} of a text with how each is formatted; none where the text is shown as it stands, as an example is."""
    if "{momentum" in text or "{eta" in text:
        return set()
    return {(name, how or "") for _, name, how, _ in Formatter().parse(text) if name is not None}


def tags(text: str) -> list[str]:
    return sorted(re.findall(r"<[^>]*>|<|>", text))


class Shown(HTMLParser):
    """The texts of a page that people read or hear, without code and what they typed themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        self.texts += [value or "" for name, value in attrs if name in SAID]
        if tag in ("meta", "link", "input", "br"):
            self._inside.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"code", "textarea", "script", "option"} & set(self._inside):
            self.texts.append(data)


def shown(html: str) -> list[str]:
    page = Shown()
    page.feed(html)
    return page.texts


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_no_template_says_anything_that_is_not_marked(path) -> None:
    """Text between tags, spoken attributes, and string literals that are more than a class or a key."""
    tree = Environment(extensions=[]).parse(path.read_text())
    plain = "".join(
        n.data if isinstance(n, nodes.TemplateData) else "" for out in tree.find_all(nodes.Output) for n in out.nodes
    )
    unmarked = [t.strip() for t in shown(plain) if re.search(r"[a-z]{2}", t) and "=" not in t]  # a set of attributes
    marked = {id(c) for call in calls(tree) for c in call.find_all(nodes.Const)}
    literals = [c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str) and id(c) not in marked]
    unmarked += [t for t in literals if re.search(r"[A-Z][a-z]|[a-z] [a-z]", t)]
    assert sorted(set(unmarked) - UNMARKED) == []


UNMARKED = {
    "Murmur",
    "· Murmur",
    "FedAvg",
    "FedProx",
    "FedNova",
    "note bad",
    "SCAFFOLD",
    "st-mary",
    "production",
    "UTC",
}


def calls(tree: nodes.Template) -> list[nodes.Call]:
    return [c for c in tree.find_all(nodes.Call) if isinstance(c.node, nodes.Name) and c.node.name in ("_", "many")]


NAMES = re.compile(
    r"[0-9a-f]{12,}|([0-9a-f]{4} ?)+$|[0-9a-f]{4} [0-9a-f]{4}|no progress for 60 s|Round 4 failed 3 times: .*"
    r"|heart-[a-z-]+|UTC|[CG]PU|cleveland|hungarian|switzerland|\bva\b|st-mary|old-clinic|north-bay|\bada\b|production|staging"
    r"|accuracy|loss|Murmur|English|SHA-256|TOML|SGD|FedProx|true|false|CSV|fp32|epoch|torch\.optim|<[^>]*>"
    r"|\brhea\b|\bvera\b|nightly export|API|RDP|PLD|distributed|（(admin|researcher|viewer)）"
)


@pytest.mark.parametrize("language", OTHERS)
def test_no_page_has_english_left(browse: Callable[[str], TestClient], language: str) -> None:
    """Beside names, formats and the settings of a recipe, which are the same in every language."""
    admin = browse("ada")
    admin.headers["accept-language"] = language
    for path in [*PAGES, f"{RUN}/versions/0", "/login", "/clients/va-2"]:
        if "/new" in path:  # a recipe's settings are the same everywhere
            continue
        html = admin.get(path).text
        assert flaws(html, language) == [], path
        assert english_in(html) == [], path


def english_in(html: str, names: str = "") -> list[str]:
    """The texts of a page that are in English, beside what is called alike everywhere. names: more of that."""
    same = re.compile(f"{NAMES.pattern}|{names}") if names else NAMES
    return [t.strip() for t in shown(html) if re.search(r"[A-Za-z]{3}", same.sub("", t))]


def test_an_audit_log_is_searched_in_the_language_that_it_is_read_in(browse: Callable[[str], TestClient]) -> None:
    """An action by its word in the viewer's language or as it is recorded; what is no action stays as it is typed."""
    admin = browse("ada")
    admin.post("/settings/users/vera/role", data={"role": "researcher"})
    found = admin.get("/audit.jsonl?what=user+changed").text
    assert '"action":"user changed"' in found and '"subject":"vera"' in found
    admin.headers["accept-language"] = "zh-Hans"
    assert admin.get("/audit.jsonl?what=用户已更改").text == found
    page = admin.get("/audit?what=用户已更改").text
    assert "用户已更改 <strong>vera</strong>" in page and "<span>角色 研究员</span>" in page
    assert admin.get("/audit.jsonl?what=vera").text == found


def test_the_language_is_chosen_by_a_button_and_kept(admin: TestClient) -> None:
    page = admin.get("/runs?state=failed").text
    assert '<html lang="en">' in page and 'name="back" value="/runs?state=failed"' in page
    answer = admin.post("/language", data={"language": "zh-Hans", "back": "/runs?state=failed"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs?state=failed")
    assert "运行" in admin.get("/runs").text
    assert admin.post("/language", data={"language": "tlh"}).status_code == 422
    assert admin.post("/language", data={"language": "en", "back": "//evil.test"}).headers["location"] == "/"
    assert "Runs" in admin.get("/runs").text
    assert admin.post("/language", data={"language": "en"}, headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_a_page_that_answers_a_form_offers_no_language(admin: TestClient) -> None:
    """A switch would lose what was typed, or the line that is shown once."""
    page = admin.post("/invitations", data={"name": "bay-view"}).text
    assert "one-time-bay-view" in page and "/language" not in page


def test_fragments_of_one_page_speak_two_languages(console: FakeConsole) -> None:
    renderer = Renderer(console)
    english = renderer.fragments("run", "heart-disease", ["run_head"], "en")["run_head"]
    chinese = renderer.fragments("run", "heart-disease", ["run_head"], "zh-Hans")["run_head"]
    assert "Secure aggregation" in english and "安全聚合" in chinese and "Secure" not in chinese
    assert renderer.fragments("run", "heart-disease", ["run_head"], "en")["run_head"] == english
