"""What a notebook shows of runs, and that the typed client does everything that the API does."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from murmur import client as client_module
from murmur.notebook import Run, overview
from murmur.protocol.errors import OperatorError

from .test_runs import detail_of, view

ROOT = Path(__file__).parents[2]


def parsed(html: str) -> ElementTree.Element:
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return ElementTree.fromstring(body.replace("&nbsp;", " "))


def test_a_run_shows_its_charts_and_escapes_what_others_named():
    run = Run.model_validate(detail_of(name="<script>").model_dump())
    html = run._repr_html_()
    found = parsed(html)
    assert len(found.findall(".//{*}svg")) >= 1 and "accuracy" in "".join(found.itertext())
    assert "1 of 4 rounds" in "".join(found.itertext())
    assert ".murmur{" in html and "prefers-color-scheme" in html
    hostile = overview("http://x", [view(id="<b onclick=x>")])
    assert "<b onclick" not in hostile and parsed(hostile).find(".//td").text == "<b onclick=x>"


def test_a_frame_needs_pandas_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    run = Run.model_validate(detail_of().model_dump())
    assert run.values() == {"accuracy": [(0, 0.5), (1, 0.75), (2, 1.0)]}
    with pytest.raises(OperatorError, match="pip install pandas"):
        run.frame()


def test_the_client_has_a_method_for_each_address_of_the_api():
    source = Path(client_module.__file__).read_text()
    called = {
        (method.lower(), re.sub(r"\{[^}]*\}", "{}", path))
        for method, path in re.findall(r'"(GET|PUT|POST|DELETE)", f?"(?:/v1/admin)?(/[^"?]*)', source)
    }
    called |= {("get", re.sub(r"\{[^}]*\}", "{}", path)) for path in re.findall(r'_many\(\w+, f?"([^"?]*)', source)}
    paths = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]
    offered = {
        (method, re.sub(r"\{[^}]*\}", "{}", path.removeprefix("/v1/admin")))
        for path, methods in paths.items()
        if path.startswith("/v1/admin")
        for method in methods
    }
    missing = offered - called
    assert not missing
