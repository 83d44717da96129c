"""`murmur recipe …`."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from murmur.protocol.recipe import Recipe, load_recipe
from murmur.recipes import schema, template

from ..command import murmur

ROOT = Path(__file__).parents[2]


def settings(model, table=()):
    """Each setting of a recipe by its path."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from settings(field.annotation, (*table, name))
        else:
            yield (*table, name)


def test_a_new_recipe_has_every_setting_at_its_default(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    assert murmur("recipe", "new", path, "--task", "xray").code == 0
    assert load_recipe(path) == Recipe(name="xray", task="xray")
    spelled = re.sub(r"^# (\w+ = )", r"\1", path.read_text(), flags=re.MULTILINE)  # every setting said aloud
    values = tomllib.loads(spelled)
    for path_ in settings(Recipe):
        found = values
        for name in path_:
            found = found[name]
    assert Recipe.model_validate(values) == Recipe(name="xray", task="xray")


def test_a_recipe_that_is_there_is_not_written_over(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("mine")
    done = murmur("recipe", "new", path)
    assert done.code == 1 and "exists already" in done.err and path.read_text() == "mine"


def test_all_that_is_wrong_with_a_recipe_is_told_at_its_line(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\ntask = "a"\nrounds = 0\n[train]\nepoch = 3\n')
    done = murmur("recipe", "check", path, "--json")
    told = json.loads(done.out)
    assert done.code == 1 and not told["ok"]
    assert [(p["line"], p["key"]) for p in told["problems"]] == [(3, "rounds"), (5, "train.epoch")]
    assert told["problems"][1]["said"] == "there is no such key; 'epochs' is near"
    assert "recipe.toml:5" in murmur("recipe", "check", path).err
    path.write_text('name = "a"\ntask = "a"\n')
    assert murmur("recipe", "check", path).code == 0
    assert json.loads(murmur("recipe", "check", path, "--json").out) == {"ok": True, "problems": []}
    assert murmur("recipe", "check", path, "--set", "train.lr=-1").code == 1
    path.write_text("name =")
    assert "not TOML" in murmur("recipe", "check", path).err
    path.write_bytes(b"name = '\xff'")
    done = murmur("recipe", "check", path)
    assert done.code == 2 and "it is not UTF-8" in done.err


def test_a_recipe_for_tune_is_checked_without_what_only_tune_reads(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\ntask = "a"\n[tune.train]\nlr = [0.1, 0.2]\n')
    assert murmur("recipe", "check", path).code == 0


def test_a_dash_prints_a_recipe_and_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert murmur("recipe", "new", "-", "--task", "xray").out == template("xray", "xray")
    assert [*tmp_path.iterdir()] == []


def test_the_schema_that_is_published_is_the_recipes():
    published = (ROOT / "docs" / "recipe.schema.json").read_text()
    assert published == schema(), "write it anew: murmur recipe schema > docs/recipe.schema.json"


def test_a_command_that_is_not_there_names_the_nearest():
    assert "'watch'" in murmur("run", "wacth").err


def test_a_line_of_a_new_recipe_fits_an_editors_width():
    assert max(map(len, template("a", "a").splitlines())) <= 160
