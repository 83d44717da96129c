"""`murmur model …`: versions, the aliases that point at them, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from murmur import completion
from murmur.coordinating import Data, Json, connected
from murmur.exporting import export
from murmur.output import out, plain, print_json, print_table, told

model = typer.Typer(
    help="Model versions, and the aliases that point at them.", no_args_is_help=True, suggest_commands=False
)

Version = Annotated[
    str,
    typer.Argument(
        help="NAME@ALIAS, NAME@N or RUN@N, NAME or RUN (its newest), or a SHA-256; NAME is the recipe's",
        autocompletion=completion.versions,
    ),
]


@model.command("list")
def list_models(
    run_id: Annotated[
        str | None, typer.Option("--run", help="of this run only", autocompletion=completion.run_ids)
    ] = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """List model versions, newest first."""
    with told(), connected(data) as c:
        found = c.versions(run_id)
    if json_:
        return print_json([v.model_dump(mode="json") for v in found])
    rows = (
        (f"{v.run}@{v.n}", ", ".join(v.aliases), v.sha256[:16], v.bytes, v.contributors, v.metrics.get("accuracy"),
         *([", ".join(m.client for m in v.missing)] if run_id else ()))
        for v in found
    )  # fmt: skip
    columns = ("version", "aliases", "sha256", "bytes", "contributors", "accuracy", *(["missing"] if run_id else ()))
    print_table("Models", columns, rows)


@model.command("show")
def show_model(
    version: Version,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Show a model version: hash, metrics, aliases, where it comes from, who is in it, and who was asked and is not."""
    from murmur.runs import find_version, show_lineage, show_version

    with told(), connected(data) as c:
        found = find_version(c, version)
        lineage = c.lineage(found.run, found.n)
    if json_:
        facts = lineage.model_dump(mode="json", exclude={"version", "run", "metrics", "aliases"})
        return print_json(found.model_dump(mode="json") | {"lineage": facts})
    show_version(found)
    show_lineage(lineage)


@model.command()
def pull(
    version: Version,
    to: Annotated[Path, typer.Option("--to", help="file to write")] = Path("model.safetensors"),
    data: Data = None,
    json_: Json = False,
) -> None:
    """Download a model version as a safetensors file, checked against its hash."""
    from murmur.aggregation.local import controls
    from murmur.protocol.tensors import read_layout
    from murmur.runs import find_version

    with told(), connected(data) as c:
        found = find_version(c, version)
        c.pull(found.sha256, to)
    if json_:
        return print_json({"file": str(to), "sha256": found.sha256, "run": found.run, "version": found.n})
    out.print(f"{found.run}@{found.n} is in [bold]{to}[/] ({found.bytes} bytes)")
    if held := controls(read_layout(to)):
        out.print(f"{len(held)} tensors control/… beside the model are SCAFFOLD's; leave them out when you load it")


@model.command()
def promote(
    version: Version,
    alias: Annotated[str, typer.Option("--as", help="production, staging, or any name")],
    data: Data = None,
    json_: Json = False,
) -> None:
    """Let an alias point at a version, from now on and until it is moved or rolled back."""
    from murmur.runs import find_version

    with told(), connected(data) as c:
        found = find_version(c, version)
        moved = c.promote(found.run, found.n, alias)
    _tell(moved, json_)


@model.command()
def rollback(
    name: Annotated[
        str, typer.Argument(help="the model's name, which is the recipe's", autocompletion=completion.model_names)
    ],
    alias: Annotated[str, typer.Argument(help="production, staging, …")],
    data: Data = None,
    json_: Json = False,
) -> None:
    """Let an alias point at what it pointed at before its last promotion."""
    with told(), connected(data) as c:
        moved = c.rollback(name, alias)
    _tell(moved, json_)


@model.command()
def unalias(
    name: Annotated[str, typer.Argument(help="the model's name, which is the recipe's")],
    alias: Annotated[str, typer.Argument(help="production, staging, …")],
    data: Data = None,
    json_: Json = False,
) -> None:
    """Remove an alias: it names no version until one is promoted to it again. Its history stays."""
    with told(), connected(data) as c:
        c.remove_alias(name, alias)
    if json_:
        return print_json({"model": name, "alias": alias, "removed": True})
    out.print(f"[bold]{plain(name)}@{plain(alias)}[/] is removed")


@model.command()
def history(
    name: Annotated[
        str, typer.Argument(help="the model's name, which is the recipe's", autocompletion=completion.model_names)
    ],
    data: Data = None,
    json_: Json = False,
) -> None:
    """List every move of a model's aliases, the newest first."""
    with told(), connected(data) as c:
        found = c.alias_history(name)
    if json_:
        return print_json([a.model_dump(mode="json") for a in found])
    rows = ((a.alias, a.action.replace("_", " "), a.version, a.before or "–", a.by, a.at) for a in found)
    print_table(f"Aliases of {name}", ("alias", "", "to", "a rollback leads to", "by", "at"), rows)


@model.command()
def card(
    version: Version,
    to: Annotated[Path | None, typer.Option("--out", help="file to write, instead of the terminal")] = None,
    license_: Annotated[str, typer.Option("--license", help="under which you release it: apache-2.0")] = "",
    data: Data = None,
) -> None:
    """Print a version's card: what it is, where it comes from, its metrics, privacy and limits, in Markdown."""
    from murmur.runs import find_version

    with told(), connected(data) as c:
        found = find_version(c, version)
        text = c.card(found.run, found.n, license=license_)
    if to is None:
        return typer.echo(text, nl=False)
    to.write_text(text)
    out.print(f"the card of {found.run}@{found.n} is in [bold]{to}[/]")


model.command()(export)


def _tell(moved: Any, as_json: bool) -> None:
    if as_json:
        return print_json(moved.model_dump(mode="json"))
    out.print(f"[bold]{moved.model}@{moved.alias}[/] points at {moved.version}, {plain(moved.sha256)}", soft_wrap=True)
