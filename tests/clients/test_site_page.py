"""The site's own page: who gets in, what it shows, what somebody decides on it."""

import json
import time
import urllib.request

import httpx
import pytest
from starlette.testclient import TestClient

from murmur.clients.ledger import training_event
from murmur.clients.policy_words import in_words
from murmur.clients.receipt import verify_receipt
from murmur.clients.record import terms_of
from murmur.clients.settings import Policy
from murmur.clients.site_app import _Site, site_app
from murmur.clients.site_page import SitePage, _link, is_link, new_link
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Train
from murmur.web.language import LANGUAGES

from ..web.accessible import flaws
from ..web.test_language import english_in
from .furnished import PAGES, furnish
from .scripted import A

PORT, KEY = 8470, "k" * 64
KEY_OF_BETA = "0123 4567 89ab cdef 0123 4567 89ab cdef"
URL = f"http://127.0.0.1:{PORT}"
OWN = {"sec-fetch-site": "same-origin"}


@pytest.fixture
def site(party):
    found = party.site("alpha")
    found.record.asked(A)
    body = b'{"fence":3,"code":"<b>x</b>","detail":"y"}'
    found.before_sending(httpx.Request("POST", f"{URL}/v1/assignments/{A.id}/failure", content=body))
    found.before_sending(httpx.Request("GET", f"{URL}/v1/blobs/0"))
    return found


@pytest.fixture
def stranger(site):
    return TestClient(site_app(site, port=PORT, key=KEY), base_url=URL, follow_redirects=False)


@pytest.fixture
def somebody(stranger):
    assert stranger.get(_link("", KEY)).status_code == 200
    return stranger


# Who gets in


@pytest.mark.parametrize("path", ["/", "/sent", "/policy", "/receipt", "/runs/r", "/live"])
def test_nobody_sees_anything_without_a_link(stranger, path):
    answer = stranger.get(path)
    assert answer.status_code == 401 and "alpha" not in answer.text and "run1" not in answer.text


def test_a_link_lets_one_browser_in_once(stranger):
    link = _link("", KEY)
    first = stranger.get(link)
    cookie = first.headers["set-cookie"].lower()
    assert f"murmur-site-{PORT}=" in cookie and "samesite=strict" in cookie and "httponly" in cookie
    assert stranger.get("/").status_code == 200
    stranger.cookies.clear()
    assert stranger.get(link).status_code == 401 and stranger.get("/").status_code == 401


def test_a_link_is_of_this_agent_and_for_ten_minutes():
    link = _link("", KEY).partition("=")[2]
    assert is_link(link, KEY, time.time() + 590) and not is_link(link, KEY, time.time() + 610)
    assert not is_link(link, "another", time.time()) and not is_link("9" + link, KEY, time.time())
    assert not is_link("", KEY, 0) and not is_link("..", KEY, 0)


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:1", ""])
def test_another_name_that_leads_here_is_refused(somebody, host):
    assert somebody.get("/", headers={"host": host}).status_code == 403
    assert somebody.get("/", headers={"host": f"localhost:{PORT}"}).status_code != 403


def test_no_other_page_can_send_a_form(somebody, site):
    for headers in ({}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://x"}):
        assert somebody.post("/stop", headers=headers).status_code == 403
    assert site.switch.stopped() is None


def test_every_answer_has_the_policy_that_keeps_scripts_out(somebody):
    for path in ("/", "/sent", "/none", "/runs/none"):
        assert somebody.get(path).headers["content-security-policy"].startswith("default-src 'self'")


# What it shows


def test_the_first_page_has_the_runs_the_messages_and_the_policy(somebody):
    text = somebody.get("/").text
    assert 'href="/runs/r"' in text and "Refusal or error" in text and in_words(Policy())[0] in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text and "<b>x</b>" not in text  # words of a message are no markup


def test_a_run_shows_what_it_asks_for_and_what_left_for_it(somebody):
    text = somebody.get("/runs/r").text
    for said in ("Task", "1 epoch in batches of", "readable: the coordinator sees", A.model[:12], "1 message"):
        assert said in text
    assert somebody.get("/runs/other").status_code == 404


def test_what_is_only_counted_has_its_sum(somebody):
    text = somebody.get("/sent?page=x").text
    assert "Downloads" in text and "that this site fetches a model" in text


def test_a_receipt_comes_with_its_signature(somebody):
    answer = somebody.get("/receipt?month=" + time.strftime("%Y-%m", time.gmtime()))
    assert "murmur-receipt-alpha" in answer.headers["content-disposition"]
    assert [m["kind"] for m in verify_receipt(answer.content)["sent"]] == ["failure"]
    assert somebody.get("/receipt?month=May").status_code == 400


def test_what_is_left_of_an_epsilon_is_the_budget_without_what_was_spent(party, monkeypatch):
    party.policies["alpha"] = {"epsilon": 3.0}
    site = party.site("alpha")
    from murmur.clients import site_board

    asked = []
    monkeypatch.setattr(site_board, "spent", lambda charges, delta: asked.append(len(charges)) or _Epsilon())
    boards = site_board.Boards(site)
    assert [(b.dataset, b.left) for b in boards.budgets()] == [("all", 3.0)]
    train, dp = Train(batch_size=10), Dp(mode="local", clip_norm=1.0, noise_multiplier=4.0)
    site.ledger.reserve(A, "all", training_event(train, dp, 1000), Policy())
    assert [(b.left, b.trainings) for b in boards.budgets() * 2] == [(1.75, 1)] * 2  # 3 - 1.25
    boards.budgets()
    assert asked == [1]  # it takes seconds: once for each state of the ledger


class _Epsilon:
    def to_json(self):
        return {"value": 1.25}


def test_each_setting_of_the_policy_has_its_sentence():
    other = {
        "require_secure": False, "min_clients": 9, "min_threshold": 9, "min_degree": 9, "colluders": 2, "ask": True,
        "trusted": {"beta": KEY_OF_BETA}, "resume": False, "require_dp": True,
        "epsilon": 3.0, "delta": 1e-6, "share_metrics": True, "accept_new": False, "share_errors": "place",
    }  # fmt: skip
    assert other.keys() == Policy.model_fields.keys()
    for name, value in other.items():
        assert in_words(Policy.model_validate({name: value})) != in_words(Policy()), name


# Its language, and who hears it


@pytest.fixture
def furnished(party, monkeypatch):
    monkeypatch.setattr("murmur.clients.site_board.spent", lambda charges, delta: _Epsilon())
    party.policies["alpha"] = {"epsilon": 3.0, "ask": True, "colluders": 1, "trusted": {"beta": KEY_OF_BETA}}
    client = TestClient(site_app(furnish(party.site("alpha")), port=PORT, key=KEY), base_url=URL)
    assert client.get(_link("", KEY)).status_code == 200
    return client


SAME = (  # runs and what became of them, names, paths and commands, what messages said as they left
    r"digits:Digits|masked|plain|delivered|late|refused|failed|none|alpha|beta|digits|\ball\b|H100|POST|news"
    r"|murmur client \w+|train_|\.toml|\[policy\]|http:|/tmp/\S*|share_errors|x: y|it is late|it failed"
)


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_pages_speak_the_language_of_who_reads_them_and_can_be_heard(furnished, language):
    for path in PAGES:
        html = furnished.get(path, headers={"accept-language": language}).text
        assert flaws(html, language) == [], path
        assert language == "en" or english_in(html, SAME) == [], path


def test_its_language_is_chosen_by_a_button_and_kept(furnished, stranger):
    page = furnished.get("/sent?page=1").text
    assert 'action="/language"' in page and 'name="back" value="/sent?page=1"' in page
    chosen = {"language": "zh-Hans", "back": "/sent?page=1"}
    answer = furnished.post("/language", data=chosen, headers=OWN, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sent?page=1")
    assert "发出的消息" in furnished.get("/").text
    assert furnished.post("/language", data={"language": "tlh"}, headers=OWN).status_code == 422
    assert furnished.post("/language", data=chosen).status_code == 403
    assert "/language" not in stranger.get(_link("", KEY)).text  # the link would not open a second time


def test_what_changes_comes_in_the_language_of_the_page(site):
    app = _Site(site, PORT, KEY, lambda: False)
    assert "没有运行在等待答复" in app._parts("zh-Hans")["site_notice"]
    assert "No run waits" in app._parts("en")["site_notice"]


# What somebody decides on it


def test_the_site_is_stopped_and_resumed_on_its_page(somebody, site):
    assert somebody.post("/stop", headers=OWN).status_code == 303
    assert site.switch.stopped().by == "the site's page" and "Nothing is asked for" in somebody.get("/").text
    assert somebody.post("/resume", headers=OWN).status_code == 303 and site.switch.stopped() is None


def test_a_run_that_waits_is_answered_as_it_was_shown(somebody, site):
    assert site.record.consent(A) == "waiting"
    assert f'action="/runs/r/approve/{terms_of(A)}"' in somebody.get("/").text
    assert somebody.post(f"/runs/r/approve/{'0' * 64}", headers=OWN).status_code == 404
    assert site.record.consent(A) == "waiting"
    assert somebody.post(f"/runs/r/approve/{terms_of(A)}", headers=OWN).status_code == 303
    assert site.record.consent(A) == "approved"
    page = somebody.get("/runs/r").text
    assert "/deny/" in page and "/approve/" not in page  # what it was given is not offered again
    assert somebody.post(f"/runs/r/deny/{terms_of(A)}", headers=OWN).status_code == 303
    assert site.record.consent(A) == "denied"
    assert somebody.post(f"/runs/r/maybe/{terms_of(A)}", headers=OWN).status_code == 404


# The server


def test_it_is_served_on_loopback_alone_and_gone_with_its_agent(site):
    page = SitePage(site, 0)
    assert page._socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OperatorError, match=f"cannot have port {page.port}"):
        SitePage(site, page.port)
    page.start()
    folder = site.settings.directory
    assert (folder / "site.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((folder / "site.json").read_text())["url"] == page.url
    with urllib.request.urlopen(new_link(folder), timeout=60) as answer:
        assert answer.status == 200
    page.close()
    with pytest.raises(OperatorError, match="no page is served"):
        new_link(folder)
