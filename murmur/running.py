"""`murmur run …`: start training runs, follow them, stop them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from murmur import completion
from murmur.coordinating import Data, Json, connected
from murmur.options import changes as _changes
from murmur.options import values as _values
from murmur.output import out, plain, print_json, print_table, told

if TYPE_CHECKING:
    from murmur.protocol.views import RunView

run = typer.Typer(help="Start training runs and follow them.", no_args_is_help=True, suggest_commands=False)

RunId = Annotated[str, typer.Argument(metavar="RUN", autocompletion=completion.run_ids)]
Timeout = Annotated[float | None, typer.Option(min=0, help="seconds; then exit code 3, and the run goes on")]
Option = Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value given to the task")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change the recipe: train.lr=0.1")]


@run.command("start")
def start_run(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    task: Annotated[str, typer.Option(help="module:Class or file.py:Class whose model() the run starts from")] = "",
    init: Annotated[Path | None, typer.Option(help="start from this model instead (safetensors)")] = None,
    option: Option = None,
    set_: Set = None,
    watch_: Annotated[bool, typer.Option("--watch", help="follow the run")] = False,
    timeout: Timeout = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Start a run; its first model comes from the task's model() or from --init."""
    from murmur.runs import code_of, first_model
    from murmur.watching import watch

    with told():
        from murmur.protocol.recipe import load_recipe

        wanted = load_recipe(recipe, **_changes(set_))
        with first_model(task, _values(option), wanted, init) as path, connected(data) as c:
            run_id = c.start_run(wanted, path, code=code_of(task))
            if json_ and not watch_:
                print_json({"id": run_id})
            elif not json_:
                out.print(f"run [bold]{run_id}[/] started")
            if watch_:
                raise typer.Exit(watch(c, run_id, as_json=json_, timeout_s=timeout))


@run.command("list")
def list_runs(data: Data = None, json_: Json = False) -> None:
    """List runs, newest first."""
    from murmur.watching import kind

    with told(), connected(data) as c:
        found = c.runs()
    if json_:
        return print_json([v.model_dump(mode="json") for v in found])
    rows = (
        (v.id, v.word, f"{v.round}/{v.rounds}", v.recipe.strategy.name, kind(v),
         v.latest.get("accuracy"), v.created_at)
        for v in found
    )  # fmt: skip
    print_table("Runs", ("run", "state", "rounds", "strategy", "updates", "accuracy", "started"), rows)


@run.command("show")
def show_run(run_id: RunId, data: Data = None, json_: Json = False) -> None:
    """Show a run with its rounds, and who was in its newest version and who was missing."""
    from murmur.runs import show

    with told(), connected(data) as c:
        found, newest = c.run(run_id), c.versions(run_id)[0]
    if json_:
        return print_json(found.model_dump(mode="json") | {"newest": newest.model_dump(mode="json")})
    show(found, newest)


@run.command("watch")
def watch_run(run_id: RunId, timeout: Timeout = None, data: Data = None, json_: Json = False) -> None:
    """Follow a run until it ends; exit code 1 when it fails."""
    from murmur.watching import watch

    with told(), connected(data) as c:
        raise typer.Exit(watch(c, run_id, as_json=json_, timeout_s=timeout))


@run.command("logs")
def log_of_run(
    run_id: RunId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the run ends")] = False,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Print what happened in a run, oldest first; with --json one event a line."""
    from murmur.watching import log_line

    with told(), connected(data) as c:
        rounds = c.run(run_id).run.rounds  # or says that there is no such run
        for event in c.watch(run_id) if follow else c.history(run_id):
            if json_:
                print_json(event.model_dump(mode="json"))
            elif event.kind != "progress":  # says nothing but that somebody got on
                out.print(log_line(event, rounds), soft_wrap=True)


@run.command("compare")
def compare_runs(
    run_ids: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="two to four", autocompletion=completion.run_ids)
    ],
    metric: Annotated[str, typer.Option(help="whose cost is told \\[default: accuracy, or the first there is]")] = "",
    data: Data = None,
    json_: Json = False,
) -> None:
    """Compare runs: the settings in which they differ, and what it cost each to get as far as all of them got."""
    from murmur.runs import show_comparison

    with told(), connected(data) as c:
        show_comparison([c.run(name) for name in run_ids], [c.versions(name) for name in run_ids], metric, json_)


@run.command("export")
def export_run(
    run_id: RunId,
    to: Annotated[str, typer.Option(help="csv, jsonl, tensorboard or mlflow")],
    out_: Annotated[str, typer.Option("--out", metavar="FILE|FOLDER|URL", help="where it goes")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the run ends")] = False,
    data: Data = None,
) -> None:
    """Tell a run's history on: numbers as CSV, events as JSON Lines, TensorBoard's files, a run of an MLflow server."""
    from murmur.trackers import export

    with told(), connected(data) as c:
        export(c, run_id, to, out_, follow=follow)
    out.print(f"{run_id} is in {plain(out_)}", soft_wrap=True)


@run.command("stop")
def stop_run(run_id: RunId, data: Data = None, json_: Json = False) -> None:
    """Stop a run; its versions stay."""
    with told(), connected(data) as c:
        found = c.stop_run(run_id)
    _tell_run(found.run, json_)


@run.command("pause")
def pause_run(run_id: RunId, data: Data = None, json_: Json = False) -> None:
    """Let a run stand still; clients may deliver what they have under way, and no time runs out for them."""
    with told(), connected(data) as c:
        found = c.pause_run(run_id)
    _tell_run(found.run, json_)


@run.command("resume")
def resume_run(run_id: RunId, data: Data = None, json_: Json = False) -> None:
    """Let a paused run go on where it stands."""
    with told(), connected(data) as c:
        found = c.resume_run(run_id)
    _tell_run(found.run, json_)


def _tell_run(found: RunView, as_json: bool) -> None:
    from murmur.watching import standing

    if as_json:
        return print_json(found.model_dump(mode="json"))
    out.print(f"run {found.id} is {plain(standing(found))}", soft_wrap=True)
