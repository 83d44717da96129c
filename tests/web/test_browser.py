"""The pages in a real browser: every page under its own policy, live changes, sign-in from another site, the phone."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest

from .fakes import FakeConsole
from .harness import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
RUN = "/runs/heart-disease"
PAGES = [
    "/",
    "/runs",
    "/runs?state=failed",
    "/runs/compare?id=heart-disease&id=heart-pilot&by=bytes&scale=log",
    "/runs/new?source=heart-disease",
    f"{RUN}?scale=log",
    f"{RUN}/rounds/17",
    RUN,
    "/runs/heart-pilot",
    f"{RUN}/rounds",
    f"{RUN}/versions/17",
    "/clients",
    "/clients/st-mary",
    "/models",
    "/models?run=heart-disease",
    "/models/named/heart-disease",
    "/privacy",
    "/audit?check=true",
    "/settings",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def address(console: FakeConsole) -> Iterator[str]:
    with serving(console) as address:
        yield address


@pytest.fixture
def window(chromium, console: FakeConsole, address: str) -> Iterator[Callable]:
    """Opens a page in a context of its own, signed in unless `user` is empty; complaints and requests are kept."""
    contexts = []

    def open_page(user: str = "ada", **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        if user:
            context.add_cookies([{"name": "murmur", "value": console.session(user), "url": address}])
        page = context.new_page()
        page.complaints = []
        page.asked = []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.set_default_timeout(60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_in_every_language(window: Callable, address: str, language: str, scheme: str) -> None:
    """At 390 px and on a desktop: strict policy, nothing asked of another host, no complaint, no sideways scroll."""
    page = window(locale=language, color_scheme=scheme)
    for width, height in ((1280, 900), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for path in ["/login", *PAGES, "/runs/none"]:
            answer = page.goto(address + path)
            assert "default-src 'self'" in answer.headers["content-security-policy"], path
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
            said = page.evaluate("document.documentElement.lang")
            assert said == ("en" if language == "en" else "zh-Hans"), path
            if folder := os.environ.get("MURMUR_TEST_PICTURES"):
                name = "".join(c if c.isalnum() else "-" for c in f"{language} {scheme} {width}{path}")
                page.screenshot(path=f"{folder}/{name[:70]}.png", full_page=True)
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(address).netloc}
    assert [c for c in page.complaints if "404" not in c] == []


def test_every_page_keeps_its_policy_and_stays_on_its_host(window: Callable, address: str) -> None:
    page = window()
    for path in PAGES:
        assert page.goto(address + path).status == 200
        assert page.locator("h1").count() == 1
        page.wait_for_timeout(50)
    assert page.complaints == []
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(address).netloc}


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_no_page_scrolls_sideways_on_a_phone(window: Callable, address: str, scheme: str) -> None:
    page = window(viewport={"width": 360, "height": 780}, color_scheme=scheme)
    for path in ["/login", *PAGES]:
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        hidden = page.evaluate(
            """[...document.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth + 1).length"""
        )
        assert hidden == 0, f"a table on {path} is wider than the phone"


def test_the_run_page_follows_the_run(window: Callable, console: FakeConsole, address: str) -> None:
    page = window()
    page.goto(address + RUN)
    page.get_by_text("Live", exact=True).wait_for()
    cohort = page.get_by_role("table", name="Clients of round 18")
    assert cohort.get_by_role("row", name="hungarian").inner_text().find("Training, 14 of 20") > 0

    rows = [console.assignment(c, "uploaded") for c in ("cleveland", "hungarian", "switzerland")]
    console.open_round("heart-disease", "revealing", *rows)
    console.emit("client", run="heart-disease", client="hungarian", round=18, attempt=1, state="uploaded")
    page.locator("[aria-current=step]", has_text="Unmasking the sum").wait_for()
    cohort.get_by_role("row", name="hungarian").get_by_text("Masked update sent").wait_for()

    console.commit_round("heart-disease")
    page.get_by_text("Round 19", exact=False).first.wait_for()
    page.get_by_role("img", name="18 of 25 rounds done").wait_for()
    page.get_by_role("link", name="Version 18").wait_for()
    page.get_by_text("Version 18 made from 4 clients").wait_for()
    assert page.complaints == []


def test_what_one_looks_at_survives_a_replaced_fragment(window: Callable, console: FakeConsole, address: str) -> None:
    page = window()
    page.goto(address + RUN)
    page.get_by_text("Live", exact=True).wait_for()
    page.locator("summary", has_text="Stop run").click()
    page.get_by_role("link", name="Version 17").focus()
    page.evaluate("document.querySelector('.log-box').scrollTop = 120")
    console.emit("client", run="heart-disease", client="cleveland", round=18, attempt=1, state="working")
    console.emit("model", run="heart-disease", version=17, contributors=3)
    page.get_by_text("cleveland started its part of round 18").wait_for()
    assert page.get_by_role("button", name="Stop this run").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Version 17"
    assert page.evaluate("document.querySelector('.log-box').scrollTop") == 120


def test_an_unfolded_budget_stays_unfolded_and_new_audit_entries_are_one_press_away(
    window: Callable, console: FakeConsole, address: str
) -> None:
    page, log = window(), window()
    page.goto(address + "/privacy")
    log.goto(address + "/audit")
    for each in (page, log):
        each.get_by_text("Live", exact=True).wait_for()
    page.locator("summary", has_text="17 sums taken").click()
    spent = console.run_budgets[0].spent
    assert spent
    later = spent.model_copy(update={"value": 3.4, "spent": 18})
    console.run_budgets[0] = console.run_budgets[0].model_copy(update={"spent": later})
    assert not log.get_by_role("link", name="Show the new ones").is_visible()
    console.note("run stopped", "heart-pilot", by="rhea")
    console.emit("privacy", run="heart-disease")
    console.emit("audit", action="invited", client="x", by="ada")
    page.locator("summary", has_text="18 sums taken").wait_for()
    assert page.locator("details[open]").count() == 1
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    log.get_by_role("link", name="Show the new ones").click()
    log.get_by_text("run stopped").wait_for()
    assert page.complaints == log.complaints == []


def test_stopping_is_asked_twice_and_the_button_goes_with_the_run(
    window: Callable, console: FakeConsole, address: str
) -> None:
    other = window()
    other.goto(address + RUN)
    other.get_by_text("Live", exact=True).wait_for()
    page = window()
    page.goto(address + RUN)
    assert not page.get_by_role("button", name="Stop this run").is_visible()
    page.locator("summary", has_text="Stop run").click()
    page.get_by_role("button", name="Stop this run").click()
    page.get_by_role("heading", name="heart-disease Stopped").wait_for()
    assert console.details["heart-disease"].run.state == "stopped"
    other.get_by_role("heading", name="heart-disease Stopped").wait_for()  # without a reload
    assert not other.locator(".stop").is_visible()


def test_a_pause_is_seen_in_another_window_and_resumed_from_there(
    window: Callable, console: FakeConsole, address: str
) -> None:
    other, viewer = window(), window("vera")
    for page in (other, viewer):
        page.goto(address + RUN)
        page.get_by_text("Live", exact=True).wait_for()
    page = window()
    page.goto(address + RUN)
    assert not page.get_by_role("button", name="Resume run").is_visible()
    page.get_by_role("button", name="Pause run").click()
    for each in (page, other, viewer):  # the last two without a reload
        each.get_by_role("heading", name="heart-disease Paused").wait_for()
        each.get_by_text("Paused by ada.").wait_for()
        assert "Round 18" in each.locator(".round").inner_text()
    assert not other.get_by_role("button", name="Pause run").is_visible()
    assert other.locator("summary", has_text="Stop run").is_visible()
    assert viewer.get_by_role("button", name="Resume run").count() == 0
    other.get_by_role("button", name="Resume run").click()
    page.get_by_role("heading", name="heart-disease Running").wait_for()
    page.get_by_role("button", name="Pause run").wait_for()
    page.get_by_text("Run resumed by ada").wait_for()
    console.stop_run("heart-disease", "ada")
    page.get_by_role("heading", name="heart-disease Stopped").wait_for()
    assert not page.get_by_role("button", name="Pause run").is_visible()
    assert page.complaints == other.complaints == viewer.complaints == []


def test_a_paused_run_and_one_that_waits_fit_on_a_phone(window: Callable, console: FakeConsole, address: str) -> None:
    console.add_run("waiting", 2)
    console.open_round("waiting", "selecting", reason="2 clients are online, 3 are needed")
    console.hold(
        "heart-disease", "the disk is full: 1.2 GB are free. Free some space or move the blobs to a larger disk"
    )
    page = window(viewport={"width": 360, "height": 780})
    for path in (RUN, "/runs/waiting", "/", "/runs", f"{RUN}/versions/17"):
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_a_hidden_tab_gives_its_connection_back(window: Callable, console: FakeConsole, address: str) -> None:
    page = window()
    page.goto(address + RUN)
    page.get_by_text("Live", exact=True).wait_for()

    def hide(hidden: bool) -> None:
        page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    streams = len([url for url in page.asked if "/live?" in url])
    hide(True)
    console.commit_round("heart-disease")
    page.wait_for_timeout(700)
    assert "Round 18" in page.locator(".round").inner_text()
    hide(False)
    page.get_by_text("Round 19", exact=False).first.wait_for()  # what was missed is caught up
    assert len([url for url in page.asked if "/live?" in url]) == streams + 1


def test_an_organization_is_invited_enrols_and_is_approved(
    window: Callable, console: FakeConsole, address: str
) -> None:
    page = window()
    page.goto(address + "/clients")
    page.get_by_label("Name of the organization").fill("bay-view")
    page.get_by_role("button", name="Invite").click()
    page.get_by_text("one-time-bay-view").wait_for()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert "one-time-bay-view" in page.evaluate("navigator.clipboard.readText()")

    console.add_client("bay-view", "pending", online=False)
    console.emit("client", client="bay-view", state="pending", fingerprint="x")
    page.get_by_text("2 clients wait for approval").wait_for()
    assert page.get_by_role("button", name="Approve bay-view").count() == 0  # the queue does not move by itself
    page.get_by_role("link", name="Show the new ones").click()
    page.get_by_role("button", name="Approve bay-view").click()
    page.get_by_text("1 client waits for approval").wait_for()
    assert console.client_views["bay-view"].state == "active"
    assert page.complaints == []


def test_signing_in_by_keyboard_alone(window: Callable, address: str) -> None:
    page = window("")
    page.goto(address + "/runs")
    page.keyboard.type("ada")
    page.keyboard.press("Tab")
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Runs", exact=True).wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()
    assert page.complaints == []


@pytest.fixture
def elsewhere(address: str) -> Iterator[str]:
    """A page on another site that links here, as a mail or chat in the browser does."""

    class Linking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            link = f'<a href="{address}/login?link=once">first</a> <a href="{address}{RUN}">run</a>'
            self.wfile.write(f"<!doctype html><title>mail</title>{link}".encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Linking)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{server.server_port}"  # another site than 127.0.0.1
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_one_time_link_on_another_site_signs_in(
    window: Callable, console: FakeConsole, elsewhere: str, address: str
) -> None:
    console.links.add("once")
    page = window("")
    page.goto(elsewhere)
    page.get_by_role("link", name="first").click()
    page.get_by_role("heading", name="Overview").wait_for()
    page.goto(elsewhere)
    page.get_by_role("link", name="run").click()
    page.get_by_role("heading", name="heart-disease Running").wait_for()
    assert page.url == address + RUN


def test_the_pages_work_without_a_script(window: Callable, console: FakeConsole, address: str) -> None:
    page = window(java_script_enabled=False)
    page.goto(address + RUN)
    assert page.get_by_text("Round 18", exact=False).first.is_visible()
    console.commit_round("heart-disease")
    page.reload()
    assert page.get_by_text("Round 19", exact=False).first.is_visible()
    assert page.get_by_role("button", name="Copy").count() == 0
    page.goto(address + "/models")
    page.get_by_label("Run").select_option("heart-pilot")
    page.get_by_role("button", name="Show").click()
    assert (
        "Version 12" in page.locator("tbody").inner_text() and "heart-disease" not in page.locator("tbody").inner_text()
    )
    page.goto(address + RUN)
    page.locator("summary", has_text="Stop run").click()
    page.get_by_role("button", name="Stop this run").click()
    assert console.details["heart-disease"].run.state == "stopped"


def test_a_point_of_a_chart_says_its_value(window: Callable, address: str) -> None:
    page = window()
    page.goto(address + RUN)
    note = page.get_by_text("Version 9: 0.741 over 720 examples")
    assert note.evaluate("e => getComputedStyle(e).opacity") == "0"
    page.locator(".chart-card").first.locator(".point .hit").nth(8).hover()
    page.wait_for_function("e => getComputedStyle(e).opacity === '1'", arg=note.element_handle())


def test_without_motion_nothing_moves(window: Callable, address: str) -> None:
    page = window(reduced_motion="reduce")
    page.goto(address + RUN)
    assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.slow
def test_a_version_is_promoted_and_rolled_back_by_its_buttons(
    window: Callable, console: FakeConsole, address: str
) -> None:
    other, page = window(), window()
    other.goto(address + "/models")
    other.get_by_text("Live", exact=True).wait_for()
    page.goto(f"{address}{RUN}/versions/17")
    page.locator("summary", has_text="Promote").click()
    page.get_by_label("Alias").fill("production")
    page.get_by_role("button", name="Promote version 17").click()
    page.get_by_role("heading", name="heart-disease").wait_for()
    moved = other.get_by_role("table", name="Aliases").get_by_role("row", name="production")
    moved.get_by_role("link", name="Version 17").wait_for()  # without a reload
    page.get_by_role("button", name="Roll back to version 16").click()
    moved.get_by_role("link", name="Version 16").wait_for()
    assert "rolled back" in page.get_by_role("table", name="Every move").inner_text()
    assert page.complaints == other.complaints == []
