"""The command `murmur`. Nothing heavy is imported before a command needs it: `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from murmur import __version__
from murmur.audit_log import log, verify_log
from murmur.auditing import audit
from murmur.coordinating import Json, coordinator
from murmur.data import data
from murmur.doctor import doctor
from murmur.joining import client
from murmur.models import model
from murmur.options import SECURE, SecureCommand
from murmur.options import changes as _changes
from murmur.options import values as _values
from murmur.output import FAILED, INTERRUPTED, out, told
from murmur.preparing import sweep, tune
from murmur.recipes import recipe
from murmur.running import run

app = typer.Typer(
    help="Federated learning for organizations that cannot share their data.",
    no_args_is_help=True,
    suggest_commands=False,  # click says it
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
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


@app.command()
def up(
    task: Annotated[str, typer.Argument(help="file.py:Class or module:Class; leave it out when going on")] = "",
    option: Option = None,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="of the dashboard")] = 8443,
    folder: Annotated[Path, typer.Option("--dir", help="folder that keeps both; the next `up` goes on")] = Path(
        "murmur-up"
    ),
) -> None:
    """Start a coordinator with its dashboard and one client for a task, to try it on your own data on this machine."""
    from murmur.trying import up

    with told():
        up(folder, task, _values(option), port=port)


@app.command(cls=SecureCommand)
def simulate(
    target: Annotated[
        str,
        typer.Argument(
            help="folder with task.py and recipe.toml, module:name of a federation, or flower: and a ClientApp"
        ),
    ] = "",
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
    backend: Annotated[
        str, typer.Option(help="auto, vectorized (many clients at once), sequential, processes or ray")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="of processes or ray; 0: one for each core")] = 0,
    ray: Annotated[str, typer.Option(help="address of a Ray cluster; by default Ray is started here")] = "",
    world: Annotated[
        str | None,
        typer.Option(help="on a virtual clock: hospitals, laptops, phones, or a TOML file (--set world.KEY=…)"),
    ] = None,
    option: Option = None,
    set_: Set = None,
    save: Annotated[Path | None, typer.Option(help="write the final model here (safetensors)")] = None,
    data: Annotated[
        Path | None, typer.Option(help="data folder in whose store the run is kept \\[default: murmur-data]")
    ] = None,
    store: Annotated[bool, typer.Option("--store/--no-store", help="keep the run beside the real ones")] = True,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="keep every version's file, not only the first and the newest")
    ] = False,
    test_clients: Annotated[
        int, typer.Option(min=0, help="held out: they train in no round, and versions are tested on their test data")
    ] = 0,
    test_task: Annotated[
        str, typer.Option(help="test versions on this task's test data instead: module:Class or file.py:Class")
    ] = "",
    test_every: Annotated[int, typer.Option(min=1, help="rounds from one test to the next")] = 1,
    patience: Annotated[int, typer.Option(min=0, help="end after so many tests without a better value")] = 0,
    test_metric: Annotated[str, typer.Option(help="that patience looks at")] = "loss",
    resume: Annotated[
        str, typer.Option(metavar="RUN", help="go on with a run that was killed; last: of this command")
    ] = "",
    plot: Annotated[Path | None, typer.Option(help="draw what happened in the world here (SVG)")] = None,
    json_: Json = False,
) -> None:
    """Train many virtual clients on this machine, with the tasks, strategies and masks of a real run."""
    from murmur.simulating import simulate_command

    if secure not in (None, *SECURE):
        raise typer.BadParameter("real, ideal or off", param_hint="--secure")
    if not target and not resume:
        raise typer.BadParameter("what is to be simulated, or --resume RUN", param_hint="TARGET")
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
            world=world,
            test={
                "clients": test_clients,
                "task": test_task,
                "every": test_every,
                "patience": patience,
                "metric": test_metric,
            },
            plot=plot,
            data=(data or Path(os.environ.get("MURMUR_DATA", "murmur-data"))) if store else None,
            versions="all" if all_versions else "newest",
            resume=resume,
            workers=workers,
            ray=ray,
            as_json=json_,
        )


app.command()(tune)
app.command(cls=SecureCommand)(sweep)
app.command()(doctor)
audit.command()(log)
audit.command()(verify_log)


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
