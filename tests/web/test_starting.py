"""The form that starts a run: every setting of a recipe, the same rules, mistakes where they were made."""

from __future__ import annotations

import html
import re

import pytest
from fastapi.testclient import TestClient

from murmur.protocol.recipe import Recipe
from murmur.protocol.sections import Section
from murmur.web import recipe_form

from .fakes import FakeConsole, recipe, sha

MODEL = sha("heart-disease", 17)


def keys(model: type[Section] = Recipe, table: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += keys(kind, f"{table}{name}.")
        else:
            found.append(table + name)
    return found


def sent(**changes: str) -> dict[str, str]:
    """The form as a browser sends it, with some fields filled in; `__` stands for the dot."""
    given = recipe_form.filled({"name": "pilot", "task": "heart-disease"})
    return given | {"model": MODEL, "action": "check"} | {k.replace("__", "."): v for k, v in changes.items()}


def said_at(page: str, key: str) -> str:
    found = re.search(rf'data-wrong="{re.escape(key)}">(.*?)</span>', page)
    return html.unescape(found[1]) if found else ""


def test_the_form_has_every_setting_of_a_recipe_once() -> None:
    shown = [f.key for s in recipe_form.sections() for f in s.fields]
    assert sorted(shown) == sorted(keys())
    assert len(shown) == len(set(shown))


def test_a_recipe_goes_through_the_form_unchanged() -> None:
    values = {
        "name": "a",
        "task": "t",
        "metrics": ["loss"],
        "cohort": {"size": 12, "min": 6, "patience_s": 2.5},
        "strategy": {"name": "fedprox", "mu": 0.1, "server_options": {"momentum": 0.9, "nesterov": True}},
        "train": {"micro_batch": "auto", "compile": "eager", "mixture": {"weights": {"x-ray": 2.0}}},
        "secure": {"ring_bits": 24},
    }
    given = Recipe.model_validate(values)
    assert Recipe.model_validate(recipe_form.values_of(recipe_form.filled(values))) == given
    assert Recipe.model_validate(recipe_form.of_toml(recipe_form.as_toml(values))) == given


def test_what_has_its_default_is_left_out() -> None:
    assert recipe_form.values_of(recipe_form.filled({"name": "a", "task": "t"})) == {"name": "a", "task": "t"}


@pytest.mark.parametrize(
    ("typed", "value"),
    [("24", 24), ("auto", "auto"), ("loss, auc", ["loss", "auc"]), ("2020-01-01", "2020-01-01"), ("[" * 9000,) * 2],
)
def test_a_field_is_read_as_toml_and_else_as_text(typed: str, value: object) -> None:
    assert recipe_form.values_of({"train.micro_batch": typed}) == {"train": {"micro_batch": value}}


def test_an_estimate_comes_before_the_start(admin: TestClient, console: FakeConsole) -> None:
    assert "Start this run" not in admin.get("/runs/new").text
    page = admin.post("/runs/new", data=sent(rounds="4")).text
    assert "Start this run" in page and console.started == []
    assert "18.4 kB" in page and "18.6 kB" in page
    assert "166.6 kB" in page  # 4 * (18,432 + 18,600) + 18,432
    answer = admin.post("/runs/new", data=sent(rounds="4", action="start"))
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/pilot-1")
    made = Recipe(name="pilot", task="heart-disease", rounds=4)
    assert console.started == [(made, MODEL, "ada")]


def test_a_mistake_is_said_at_its_field_and_nothing_is_lost(admin: TestClient, console: FakeConsole) -> None:
    for changes, key, said in (
        ({"rounds": "0"}, "rounds", "greater than or equal to 1"),
        ({"rounds": "many"}, "rounds", "valid integer"),
        ({"name": "Not A Name"}, "name", "match pattern"),
        ({"secure__ring_bits": "17"}, "secure.ring_bits", "16, 24 or 32"),
        ({"train__micro_batch": "-1"}, "train.micro_batch", "greater than or equal to 0"),
        ({"cohort__min": "2"}, "cohort.min", "secure aggregation needs cohort.min of 3"),
        ({"strategy__mu": "0.1"}, "strategy.mu", "mu belongs to FedProx"),
        ({"dp__budget": "2"}, "dp.budget", "3 rounds would fit"),
        ({"model": ""}, "model", "Choose the model"),
        ({"sha256": "0" * 64, "action": "start"}, "model", "No model with this SHA-256"),
    ):
        answer = admin.post("/runs/new", data=sent(seed="77", **changes))
        assert answer.status_code == 422
        assert said in said_at(answer.text, key), key
        assert re.search('name="seed"[^>]* value="77"', answer.text)
    assert console.started == []


def test_a_recipe_can_be_written_as_toml(admin: TestClient, console: FakeConsole) -> None:
    page = admin.post("/runs/new", data=sent(train__lr="0.5", action="text")).text
    text = html.unescape(re.search(r"<textarea[^>]*>(.*?)</textarea>", page, re.S)[1])  # pyright: ignore[reportOptionalSubscript]
    assert text == 'name = "pilot"\ntask = "heart-disease"\n\n[train]\nlr = 0.5\n'
    back = admin.post("/runs/new", data={"recipe": text, "model": MODEL, "action": "fields"}).text
    assert 'value="0.5"' in back and "<textarea" not in back
    admin.post("/runs/new", data={"recipe": text, "model": MODEL, "action": "start"})
    assert console.started[0][0].train.lr == 0.5


@pytest.mark.parametrize("action", ["check", "fields"])
def test_a_wrong_text_is_kept_and_said(admin: TestClient, console: FakeConsole, action: str) -> None:
    for text, said in (
        ("name = ", "not TOML"),
        ("[" * 5000, "not TOML"),
        ("name='a'\ntask='t'\n[train]\nlearning=1", "no such key"),
    ):
        answer = admin.post("/runs/new", data={"recipe": text, "model": MODEL, "action": action})
        assert answer.status_code == 422 and said in answer.text
        assert html.escape(text.splitlines()[-1], quote=False) in answer.text


def test_a_run_is_cloned_from_its_recipe_and_its_first_model(admin: TestClient) -> None:
    assert 'href="/runs/new?source=heart-disease"' in admin.get("/runs/heart-disease").text
    page = admin.get("/runs/new?source=heart-disease").text
    assert f'<option value="{sha("heart-disease", 0)}" selected>' in page
    fields = dict(re.findall(r'name="([^"]+)" [^>]*value="([^"]*)"', page))
    assert (fields["strategy.mu"], fields["train.lr"], fields["rounds"]) == ("0.1", "0.05", "25")
    expected = recipe("heart-disease").model_dump(mode="json")
    assert recipe_form.filled(expected)["seed"] == fields["seed"] == "7"
    assert admin.get("/runs/new?source=nothing").status_code == 404


def test_what_is_typed_is_escaped(admin: TestClient) -> None:
    hostile = '"><script>alert(1)</script>'
    for given in (sent(name=hostile, metrics=hostile), {"recipe": f"</textarea>{hostile}", "model": hostile}):
        page = admin.post("/runs/new", data=given | {"sha256": hostile}).text
        assert "<script>alert" not in page and "</textarea>&#34;" not in page


def test_only_admins_start_runs(viewer: TestClient, stranger: TestClient, console: FakeConsole) -> None:
    assert viewer.get("/runs/new").status_code == 403
    assert viewer.post("/runs/new", data=sent(action="start")).status_code == 403
    assert "/runs/new" not in viewer.get("/runs").text
    assert stranger.post("/runs/new", data=sent(action="start")).headers["location"] == "/login"
    assert console.started == []
