"""The command `murmur`. Nothing heavy is imported before a command needs it: `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from murmur import __version__
from murmur.auditing import audit
from murmur.coordinating import Data, Json, connected, coordinator
from murmur.data import data
from murmur.doctor import doctor
from murmur.exporting import export
from murmur.nodes import ranks
from murmur.options import SECURE, SecureCommand
from murmur.options import changes as _changes
from murmur.options import pairs as _pairs
from murmur.options import values as _values
from murmur.output import FAILED, INTERRUPTED, out, plain, print_json, print_table, told
from murmur.preparing import check, plan, tune
from murmur.recipes import recipe

if TYPE_CHECKING:
    from murmur.protocol.views import RunView

app = typer.Typer(
    help="Federated learning for organizations that cannot share their data.",
    no_args_is_help=True,
    suggest_commands=False,  # click says it
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
client = typer.Typer(
    help="Take part as an organization, with data that stays where it is.", no_args_is_help=True, suggest_commands=False
)
run = typer.Typer(help="Start training runs and follow them.", no_args_is_help=True, suggest_commands=False)
model = typer.Typer(help="Model versions.", no_args_is_help=True, suggest_commands=False)
for name, group in (
    ("coordinator", coordinator),
    ("client", client),
    ("run", run),
    ("model", model),
    ("recipe", recipe),
    ("data", data),
    ("audit", audit),
):
    app.add_typer(group, name=name)

Option = Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value given to the task")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change the recipe: train.lr=0.1")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, max=1000)] = 25,
    strategy: Annotated[str, typer.Option(help="fedprox or fedavg")] = "fedprox",
    processes: Annotated[int, typer.Option(min=1, max=16, help="training processes of each hospital")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="no secure aggregation")] = False,
    seed: int = 0,
    exit_: Annotated[bool, typer.Option("--exit", help="end when the run has ended")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="folder that is made anew")] = Path("murmur-demo"),
) -> None:
    """Four hospitals train one model on this machine, each as a process of its own; nothing is set up before."""
    from murmur.demo import Demo

    if strategy not in ("fedavg", "fedprox"):
        raise typer.BadParameter("fedavg or fedprox", param_hint="--strategy")
    with told():
        Demo(folder=folder, rounds=rounds, strategy=strategy, processes=processes, secure=not plain, seed=seed).run(
            stay=not exit_, as_json=json_
        )


@app.command(cls=SecureCommand)
def simulate(
    target: Annotated[
        str,
        typer.Argument(
            help="folder with task.py and recipe.toml, module:name of a federation, or flower: and a ClientApp"
        ),
    ],
    clients: Annotated[int, typer.Option(min=1)] = 10,
    rounds: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
    cohort: Annotated[
        int | None, typer.Option(min=0, help="clients asked in a round, instead of the recipe's; 0: all")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    secure: Annotated[
        str | None,
        typer.Option(
            metavar="[real|ideal|off]",
            help="real (also alone): mask updates as in production; ideal: the same bits without the masks; off, or "
            "--plain: neither \\[default: the recipe's]",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, vectorized (many clients at once) or sequential")] = "auto",
    option: Option = None,
    set_: Set = None,
    save: Annotated[Path | None, typer.Option(help="write the final model here (safetensors)")] = None,
    json_: Json = False,
) -> None:
    """Train many virtual clients on this machine, with the tasks, strategies and masks of a real run."""
    from murmur.simulating import simulate_command

    if secure not in (None, *SECURE):
        raise typer.BadParameter("real, ideal or off", param_hint="--secure")
    changes = _changes(set_)
    with told():
        simulate_command(
            target,
            clients=clients,
            rounds=rounds,
            cohort=cohort,
            seed=seed,
            secure=cast(Any, secure),
            options=_values(option),
            changes=changes,
            save=save,
            backend=cast(Any, backend),
            as_json=json_,
        )


app.command()(tune)
app.command()(doctor)


@client.command()
def enroll(
    join: Annotated[str, typer.Argument(help="the join string of the invitation")],
    name: Annotated[str, typer.Option(help="the client's name, as the invitation was made for")],
    directory: Annotated[Path, typer.Option("--dir", help="the agent's folder")] = Path("murmur-client"),
    task: Annotated[list[str] | None, typer.Option(help="name=module:Class or name=file.py:Class, repeatable")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="task.key=value, repeatable")] = None,
    processes: Annotated[int, typer.Option(min=1, help="training processes of this client")] = 1,
    json_: Json = False,
) -> None:
    """Make this organization's key, enrol it, and write client.toml."""
    from murmur.enrolment import enroll_here

    with told():
        view = enroll_here(join, name, directory, tasks=_pairs(task), options=_values(option), processes=processes)
    if json_:
        return print_json(view)
    out.print(f"[bold]{view['client']}[/] is {view['state']}; the fingerprint of its key is")
    out.print(f"  [bold]{view['fingerprint']}[/]")
    out.print("Compare it with the one that the coordinator's admin sees, then: "
              f"murmur client join --dir {directory}", soft_wrap=True)  # fmt: skip


@client.command()
def join(
    directory: Annotated[Path, typer.Option("--dir", help="the agent's folder")] = Path("murmur-client"),
    flower: Annotated[
        list[str] | None,
        typer.Option(help="[task=]module:app, file.py:app or folder of a Flower ClientApp, beside client.toml's tasks"),
    ] = None,
    node_config: Annotated[
        list[str] | None, typer.Option(help="key=value in the Flower app's node_config, repeatable")
    ] = None,
    run_config: Annotated[
        list[str] | None, typer.Option(help="key=value in the Flower app's run_config, repeatable")
    ] = None,
) -> None:
    """Run the agent: take part in runs until it is stopped."""
    from murmur.clients.agent import main as run_agent
    from murmur.enrolment import flower_tasks

    with told():
        tasks = flower_tasks(flower or [], _values(node_config), _values(run_config))
        raise typer.Exit(run_agent(["--dir", str(directory)], tasks=tasks))


@client.command()
def ledger(
    directory: Annotated[Path, typer.Option("--dir", help="the agent's folder")] = Path("murmur-client"),
    json_: Json = False,
) -> None:
    """Show what each data set has spent on local differential privacy, over all runs."""
    from murmur.ledger import show_ledger

    with told():
        show_ledger(directory, as_json=json_)


client.command()(check)
client.command()(plan)
client.command()(ranks)


@run.command("start")
def start_run(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    task: Annotated[str, typer.Option(help="module:Class or file.py:Class whose model() the run starts from")] = "",
    init: Annotated[Path | None, typer.Option(help="start from this model instead (safetensors)")] = None,
    option: Option = None,
    set_: Set = None,
    watch_: Annotated[bool, typer.Option("--watch", help="follow the run")] = False,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Start a run; its first model comes from the task's model() or from --init."""
    from murmur.runs import first_model
    from murmur.runs import watch as watch_run

    with told():
        from murmur.protocol.recipe import load_recipe

        wanted = load_recipe(recipe, **_changes(set_))
        with first_model(task, _values(option), wanted, init) as path, connected(data) as c:
            run_id = c.start_run(wanted, path)
            if json_ and not watch_:
                print_json({"id": run_id})
            elif not json_:
                out.print(f"run [bold]{run_id}[/] started")
            if watch_:
                raise typer.Exit(watch_run(c, run_id, as_json=json_))


@run.command("list")
def list_runs(data: Data = None, json_: Json = False) -> None:
    """List runs, newest first."""
    with told(), connected(data) as c:
        found = c.runs()
    if json_:
        return print_json([v.model_dump(mode="json") for v in found])
    rows = (
        (v.id, v.state, f"{v.round}/{v.rounds}", v.recipe.strategy.name, "masked" if v.recipe.secure.on else "plain",
         v.latest.get("accuracy"), v.created_at)
        for v in found
    )  # fmt: skip
    print_table("Runs", ("run", "state", "rounds", "strategy", "updates", "accuracy", "started"), rows)


@run.command("show")
def show_run(run_id: Annotated[str, typer.Argument(metavar="RUN")], data: Data = None, json_: Json = False) -> None:
    """Show a run with its rounds, and who was in its newest version and who was missing."""
    from murmur.runs import show

    with told(), connected(data) as c:
        found, newest = c.run(run_id), c.versions(run_id)[0]
    if json_:
        return print_json(found.model_dump(mode="json") | {"newest": newest.model_dump(mode="json")})
    show(found, newest)


@run.command("watch")
def watch_run(run_id: Annotated[str, typer.Argument(metavar="RUN")], data: Data = None, json_: Json = False) -> None:
    """Follow a run until it ends; exit code 1 when it fails."""
    from murmur.runs import watch

    with told(), connected(data) as c:
        raise typer.Exit(watch(c, run_id, as_json=json_))


@run.command("stop")
def stop_run(run_id: Annotated[str, typer.Argument(metavar="RUN")], data: Data = None, json_: Json = False) -> None:
    """Stop a run; its versions stay."""
    with told(), connected(data) as c:
        found = c.stop_run(run_id)
    _tell_run(found.run, json_)


@run.command("pause")
def pause_run(run_id: Annotated[str, typer.Argument(metavar="RUN")], data: Data = None, json_: Json = False) -> None:
    """Let a run stand still; clients may deliver what they have under way, and no time runs out for them."""
    with told(), connected(data) as c:
        found = c.pause_run(run_id)
    _tell_run(found.run, json_)


@run.command("resume")
def resume_run(run_id: Annotated[str, typer.Argument(metavar="RUN")], data: Data = None, json_: Json = False) -> None:
    """Let a paused run go on where it stands."""
    with told(), connected(data) as c:
        found = c.resume_run(run_id)
    _tell_run(found.run, json_)


@model.command("list")
def list_models(
    run_id: Annotated[str | None, typer.Option("--run", help="of this run only")] = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """List model versions, newest first."""
    with told(), connected(data) as c:
        found = c.versions(run_id)
    if json_:
        return print_json([v.model_dump(mode="json") for v in found])
    rows = (
        (f"{v.run}@{v.n}", v.sha256[:16], v.bytes, v.contributors, v.metrics.get("accuracy"),
         *([", ".join(m.client for m in v.missing)] if run_id else ()))
        for v in found
    )  # fmt: skip
    columns = ("version", "sha256", "bytes", "contributors", "accuracy", *(["missing"] if run_id else ()))
    print_table("Models", columns, rows)


@model.command("show")
def show_model(
    version: Annotated[str, typer.Argument(help="RUN@N, RUN (its newest), or a SHA-256")],
    data: Data = None,
    json_: Json = False,
) -> None:
    """Show a model version: its hash, its metrics, who is in it, and who was asked and is not."""
    from murmur.runs import find_version, show_version

    with told(), connected(data) as c:
        found = find_version(c, version)
    if json_:
        return print_json(found.model_dump(mode="json"))
    show_version(found)


@model.command()
def pull(
    version: Annotated[str, typer.Argument(help="RUN@N, RUN (its newest), or a SHA-256")],
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


model.command()(export)


@audit.command("privacy")
def audit_run_privacy(
    target: Annotated[str, typer.Argument(help="folder with task.py and recipe.toml, or module:name of a federation")],
    unit: Annotated[str, typer.Option(help="what a canary is: example or client")] = "example",
    canaries: Annotated[int, typer.Option(min=8, max=100_000, help="each takes part or not, by coin")] = 200,
    examples: Annotated[int, typer.Option(min=1, help="of its own that each client trains on, at most")] = 50,
    clients: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of coins and canaries")] = 0,
    accounted: Annotated[
        str | None, typer.Option(help='the epsilon to check, or a JSON file with "epsilon" and "delta"')
    ] = None,
    delta: Annotated[float | None, typer.Option(min=0, max=0.5, help="1e-5, or the file's")] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999999)] = 0.95,
    secure: Annotated[bool, typer.Option("--secure/--plain", help="mask updates as in production")] = False,
    option: Option = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train once with canaries and tell how large epsilon must be at least; exit code 1 when the accounted one is less.

    The recipe is followed, with its differential privacy where it has any.
    """
    from murmur.canaries import audit_privacy

    if unit not in ("example", "client"):
        raise typer.BadParameter("example or client", param_hint="--unit")
    changes = _changes(set_)
    with told():
        holds = audit_privacy(
            target,
            unit=unit,
            canaries=canaries,
            examples=examples,
            clients=clients,
            rounds=rounds,
            seed=seed,
            delta=delta,
            confidence=confidence,
            accounted=accounted,
            secure=cast(Any, secure),
            options=_values(option),
            changes=changes,
            as_json=json_,
        )
    if not holds:
        raise typer.Exit(FAILED)


def _tell_run(found: RunView, as_json: bool) -> None:
    from murmur.runs import standing

    if as_json:
        return print_json(found.model_dump(mode="json"))
    out.print(f"run {found.id} is {plain(standing(found))}", soft_wrap=True)
