"""`murmur recipe …`: write a recipe with every setting in it, check one, print its JSON schema."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from murmur.options import values as _values
from murmur.output import FAILED, USAGE, err, fail, out, plain, print_json, told

if TYPE_CHECKING:
    from pydantic import BaseModel

recipe = typer.Typer(help="Recipes: what a run does, as a TOML file.", no_args_is_help=True, suggest_commands=False)

WIDTH = 112  # of a line of a recipe, comment and all
Json = Annotated[bool, typer.Option("--json", help="one line of JSON")]


@recipe.command("new")
def new_recipe(
    path: Annotated[Path, typer.Argument(help="file that is made; - prints it")] = Path("recipe.toml"),
    task: Annotated[str, typer.Option(help="name of the task, as the organizations have installed it")] = "my-task",
    name: Annotated[str, typer.Option(help="name of the runs \\[default: the task's]")] = "",
) -> None:
    """Write a recipe with every setting, its default and what it means."""
    from murmur.protocol.recipe import parse_recipe

    with told():
        parse_recipe({"name": name or task, "task": task})
    text = template(name or task, task)
    if str(path) == "-":
        return typer.echo(text, nl=False)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        fail(f"{path} exists already: give another name, or `-` to print a new one")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    out.print(f"[bold]{path}[/] has every setting at its default; take the # away from what you change")


@recipe.command("check")
def check_recipe(
    path: Annotated[Path, typer.Argument(help="recipe.toml")] = Path("recipe.toml"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="change the recipe: train.lr=0.1")] = None,
    json_: Json = False,
) -> None:
    """Tell everything that is wrong with a recipe, at its line; exit code 1 when something is."""
    found = problems(path, _values(set_))
    if json_:
        print_json(
            {"ok": not found, "problems": [{"line": line, "key": key, "said": said} for line, key, said in found]}
        )
    elif not found:
        out.print(f"{path} can be run")
    for line, key, said in () if json_ else found:
        where = f"{path}:{line}" if line else str(path)
        err.print(f"[bold]{plain(where)}[/]  " + plain(f"{key}: {said}" if key else said), soft_wrap=True)
    if found:
        raise typer.Exit(FAILED)


@recipe.command("schema")
def schema_of_recipes() -> None:
    """Print the JSON schema of a recipe, for editors and other programs."""
    typer.echo(schema(), nl=False)


def schema() -> str:
    """The JSON schema of recipes, as docs/recipe.schema.json holds it."""
    from murmur.protocol.recipe import Recipe

    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | Recipe.model_json_schema() | {"title": "Murmur recipe"}, indent=2) + "\n"


def template(name: str, task: str) -> str:
    """A recipe's text: what must be said, and every other setting as a comment."""
    from murmur.protocol import toml
    from murmur.protocol.recipe import Recipe

    given = {"name": toml.value(name), "task": toml.value(task)}
    return "\n".join(_lines(Recipe, "", given)) + "\n"


def _lines(model: type[BaseModel], table: str, given: dict[str, str]) -> Iterator[str]:
    from pydantic import BaseModel

    from murmur.protocol import toml

    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        kind, said = field.annotation, field.description or ""
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((f"{table}.{name}" if table else name, kind))
        elif name in given:
            yield from explained(f"{name} = {given[name]}", said)
        else:
            yield from explained(f"# {name} = {toml.value(field.get_default(call_default_factory=True))}", said)
    for name, kind in inner:
        meaning = (kind.__doc__ or "").strip().splitlines()
        yield from ("", *explained(f"[{name}]", meaning[0] if meaning else ""), *_lines(kind, name, {}))


def explained(line: str, meaning: str) -> Iterator[str]:
    """A line with its meaning behind it, or above it where that is long."""
    if len(line) + len(meaning) > WIDTH:
        yield f"# {meaning}"
    yield line if not meaning or len(line) + len(meaning) > WIDTH else f"{line:<32}  # {meaning}"


def problems(path: Path, changes: dict[str, Any]) -> list[tuple[int | None, str, str]]:
    """Everything that is wrong with a recipe's file: its line where it has one, the key, what to do."""
    from pydantic import ValidationError

    from murmur.protocol.errors import OperatorError
    from murmur.protocol.mistakes import line_of, mistakes
    from murmur.protocol.recipe import Recipe, changed

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        fail(f"cannot read {path}: {why}", USAGE)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [(None, "", f"it is not TOML: {error}")]
    values.pop("tune", None)
    try:
        Recipe.model_validate(changed(values, {key.replace(".", "__"): value for key, value in changes.items()}))
    except ValidationError as error:
        return [(line_of(text, m.path), m.key, m.said) for m in mistakes(error, Recipe)]
    except OperatorError as error:
        return [(None, "", error.detail)]
    return []
