"""The registry's pages: aliases with their history, promotion and rollback by admins alone, and the card."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from murmur.protocol.errors import OperatorError
from murmur.protocol.registry import LineageView, VersionRef
from murmur.protocol.sections import Dp
from murmur.protocol.views import PrivacyView
from murmur.web.card import model_card

from .fakes import FakeConsole, sha
from .test_pages import Tags, text_of

MODEL = "/models/named/heart-disease"
RUN = "/runs/heart-disease/versions"
SPENT = PrivacyView(
    value=4.37, delta=1e-5, unit="client", accountant="rdp", assumptions=("the coordinator is trusted",), spent=17
)


def test_an_admin_promotes_a_version_and_the_model_says_who_and_what_was_before(
    admin: TestClient, console: FakeConsole
) -> None:
    answer = admin.post(f"{RUN}/17/promote", data={"alias": "production"})
    assert (answer.status_code, answer.headers["location"]) == (303, MODEL)
    page = text_of(admin.get(MODEL).text)
    assert re.search(r"production Version 17 heart-disease \w+ .*? by ada Roll back to version 16 : production", page)
    assert "production" in text_of(admin.get("/models").text)
    told = console.log[-1]
    assert (told.kind, told.data["alias"], told.data["version"]) == ("alias", "production", 17)
    assert "heart-disease: production points at version 17, promoted by ada" in text_of(admin.get("/").text)


def test_one_press_rolls_back_and_the_same_press_again_does_not(admin: TestClient, console: FakeConsole) -> None:
    console.promote("heart-disease", 17, "production", "ada")
    page = Tags(admin.get(MODEL).text)
    hidden = [(a["name"], a["value"]) for a in page.all("input") if a.get("type") == "hidden" and a["name"] != "back"]
    hidden = hidden[:2]
    assert hidden == [("alias", "production"), ("seen", "3")]
    assert [a["action"] for a in page.all("form")].count(f"{MODEL}/rollback") == 1  # staging has nothing to go back to
    assert admin.post(f"{MODEL}/rollback", data=dict(hidden)).status_code == 303
    assert str(console.aliases("heart-disease")[0].version) == "heart-disease@16"
    again = admin.post(f"{MODEL}/rollback", data=dict(hidden))
    assert again.status_code == 409 and "moved meanwhile" in again.text
    assert str(console.aliases("heart-disease")[0].version) == "heart-disease@16"


def test_an_alias_is_removed_once_and_its_history_stays(admin: TestClient, console: FakeConsole) -> None:
    forms = [a["action"] for a in Tags(admin.get(MODEL).text).all("form")]
    names = [a.alias for a in console.aliases("heart-disease")]
    assert forms.count(f"{MODEL}/remove") == len(names)
    for alias in names:
        wanted = {"alias": alias, "seen": next(a.n for a in console.aliases("heart-disease") if a.alias == alias)}
        assert admin.post(f"{MODEL}/remove", data=wanted).status_code == 303
        assert admin.post(f"{MODEL}/remove", data=wanted).status_code == 404
    page = text_of(admin.get(MODEL).text)
    assert "No alias yet" in page and re.search(r"staging removed nothing ada", page)
    assert "heart-disease: staging removed by ada; it pointed at version" in text_of(admin.get("/").text)


def test_a_viewer_sees_what_a_rollback_would_lead_to_and_may_not(viewer: TestClient, console: FakeConsole) -> None:
    before = list(console.moves)
    assert "Roll back" not in viewer.get(MODEL).text and "Version 12" in viewer.get(MODEL).text
    assert "Promote" not in viewer.get(f"{RUN}/17").text
    assert viewer.post(f"{RUN}/17/promote", data={"alias": "production"}).status_code == 403
    for move in ("rollback", "remove"):
        assert viewer.post(f"{MODEL}/{move}", data={"alias": "production", "seen": 2}).status_code == 403
    assert console.moves == before


@pytest.mark.parametrize("alias", ["37", "Production", "a b", "", "<script>", "x" * 65])
def test_a_name_that_is_no_alias_is_refused_in_words(admin: TestClient, console: FakeConsole, alias: str) -> None:
    before = list(console.moves)
    assert admin.post(f"{RUN}/17/promote", data={"alias": alias}).status_code == 422
    assert console.moves == before


@pytest.mark.parametrize("path", ["/models/named/none", f"{RUN}/99", f"{RUN}/{1 << 70}", f"{RUN}/99/card.md"])
def test_what_is_not_there_is_not_found(admin: TestClient, path: str) -> None:
    assert admin.get(path).status_code == 404


def test_the_page_of_a_version_shows_its_aliases_and_its_lineage(admin: TestClient, console: FakeConsole) -> None:
    detail = console.details["heart-disease"]
    run = detail.run.model_copy(update={"privacy": SPENT})
    console.details["heart-disease"] = detail.model_copy(update={"run": run})
    page = text_of(admin.get(f"{RUN}/16").text)
    assert "Version 16 production" in page
    for digest in (sha("heart-disease", n)[:12] for n in (16, 1000, 1001)):
        assert digest in page
    assert "Privacy spent by then epsilon 4.37 at delta 1e-05, client-level, by RDP" in page


def test_the_card_is_downloaded_as_markdown(admin: TestClient) -> None:
    answer = admin.get(f"{RUN}/17/card.md")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.text.startswith("---\nlicense: unknown\n") and "# heart-disease, version 17" in answer.text


def card_of(console: FakeConsole, n: int = 17, licence: str = "", **changes: object) -> str:
    return model_card(console.lineage("heart-disease", n).model_copy(update=changes), licence=licence)


def facts_of(card: str) -> dict[str, str]:
    """The pairs of a card's head."""
    head = card.split("---\n")[1]
    return dict(line.strip().split(": ", 1) for line in head.splitlines() if ": " in line)


def test_a_card_says_what_where_from_how_good_and_what_it_does_not_know(console: FakeConsole) -> None:
    card = card_of(console)
    facts = facts_of(card)
    assert facts["sha256"] == f'"{sha("heart-disease", 17)}"' and facts["parent"] == f'"{sha("heart-disease", 16)}"'
    assert (facts["license"], facts["version"], facts["contributors"]) == ("unknown", "17", "4")
    assert "4 organizations trained on data of their own" in card
    assert "| contributors | 4 in all rounds up to this one; in this one 3 of 4 asked |" in card
    assert "fedprox, 2 epochs a round, SGD at 0.05, batches of 32" in card
    assert "masked: the coordinator could read their sum" in card
    assert "| accuracy | 0.803 | 720 |" in card  # 303 + 294 + 123 examples
    assert "No differential privacy" in card and "Fairness: no figures" in card
    assert "The run had not ended" in card and "1 organization asked for this round is not in it" in card
    assert "Not stated." in card
    assert "When this card was written, `staging` pointed at this version." in card


def test_no_client_is_named_in_a_card(console: FakeConsole) -> None:
    lineage = console.lineage("heart-disease", 17)
    assert lineage.version.who and lineage.version.missing
    assert not [
        name for name in ("cleveland", "hungarian", "switzerland", "va") if re.search(rf"\b{name}\b", card_of(console))
    ]


def test_an_epsilon_in_a_card_comes_with_its_assumptions_and_the_runs_total(console: FakeConsole) -> None:
    run = console.details["heart-disease"].run.model_copy(update={"privacy": SPENT.model_copy(update={"value": 5.5})})
    card = card_of(console, privacy=SPENT, run=run)
    assert "epsilon 4.37 at delta 1e-05, client-level, by RDP, after 17 sums" in card
    assert "- the coordinator is trusted" in card
    assert "later versions as well has: epsilon 5.5 at delta" in card
    local = run.model_copy(update={"privacy": None, "recipe": run.recipe.model_copy(update={"dp": Dp(mode="local")})})
    assert "in the ledger of each" in card_of(console, run=local)


def test_a_card_of_a_first_version_says_that_nobodys_data_is_in_it(console: FakeConsole) -> None:
    card = card_of(console, 0)
    assert "No organization's data is in it." in card and "nothing: it is what the run started from" in card
    inherited = card_of(console, 0, origin=VersionRef(run="pilot", n=9))
    assert "`pilot@9`, a version of another run" in inherited and "What pilot@9 had spent before" in inherited


def test_a_licence_is_an_identifier_and_nothing_else(console: FakeConsole) -> None:
    card = card_of(console, licence="apache-2.0")
    assert "license: apache-2.0\n" in card and card.endswith("## Licence\n\napache-2.0\n")
    for wrong in ("mit\nmalicious: true", "x" * 65, "{a}", "a b"):
        with pytest.raises(OperatorError, match="no identifier"):
            card_of(console, licence=wrong)


def test_a_failed_run_is_a_limit(console: FakeConsole) -> None:
    found: LineageView = console.lineage("heart-first-try", 3)
    assert "- The run was not brought to its end: it failed." in model_card(found)
