"""The pages of privacy and of the audit log follow what happens."""

from __future__ import annotations

import re

from starlette.testclient import TestClient

from murmur.web.boards import PAGES
from murmur.web.rendering import Renderer

from .fakes import FakeConsole
from .test_pages import Tags, text_of


def test_the_privacy_page_is_live_and_its_fragments_are_what_it_shows_at_first(
    admin: TestClient, console: FakeConsole
) -> None:
    page = admin.get("/privacy").text
    assert Tags(page).all("main")[0]["data-live"] == "/live?page=privacy"
    for name, html in Renderer(console).fragments("privacy", "", list(PAGES["privacy"].fragments)).items():
        assert f'data-part="{name}"' in page and html.strip() in page


def test_a_sum_that_is_taken_makes_the_budgets_stale_and_a_clients_progress_does_not(console: FakeConsole) -> None:
    for kind, stale in (("privacy", ["privacy_runs", "privacy_owners"]), ("progress", [])):
        console.emit(kind, "heart-disease")
        assert PAGES["privacy"].stale([console.log[-1]]) == stale


def test_the_audit_log_says_beside_itself_that_there_is_more(admin: TestClient, console: FakeConsole) -> None:
    page = admin.get("/audit").text
    link = next(a for a in Tags(page).all("a") if a.get("class") == "again")
    assert (link["data-shown"], link["href"]) == ("5", "/audit") and "hidden" in link
    console.note("run stopped", "heart-disease", by="ada")
    told = Renderer(console).fragments("audit", "", ["audit_notice"])["audit_notice"]
    assert re.search(r'data-newest="6">6 entries in all', told)


def test_a_filtered_audit_log_counts_what_fits_and_leads_back_to_all(admin: TestClient) -> None:
    page = admin.get("/audit?by=ada").text
    assert "5 entries in all" in text_of(page) and "3 entries fit Show all" in text_of(page)
    link = next(a for a in Tags(page).all("a") if a.get("class") == "again")
    assert (link["data-shown"], link["href"]) == ("5", "/audit?by=ada")  # new ones are told, whether they fit or not
