"""`murmur client check`, `murmur client plan` and `murmur tune`: what is found out before a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from murmur.coordinating import Json
from murmur.options import values
from murmur.output import told

Option = Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value given to the task")]
Site = Annotated[Path, typer.Option("--dir", help="the agent's folder, if this client is enrolled")]
SiteTask = Annotated[str, typer.Option("--task", help="name in client.toml, or module:Class or file.py:Class")]
SiteRecipe = Annotated[Path | None, typer.Option("--recipe", help="recipe.toml of the run that is to come")]
Limit = Annotated[int, typer.Option(min=1, help="examples to look at, where each is loaded by itself")]
Show = Annotated[bool, typer.Option("--show-values", help="also words that may quote data: labels, errors")]


def check(
    directory: Site = Path("murmur-client"),
    task: SiteTask = "",
    recipe: SiteRecipe = None,
    option: Option = None,
    limit: Limit = 2000,
    show: Show = False,
    json_: Json = False,
) -> None:
    """Check this site before its first round: data, one small training, memory, disk, coordinator; 1 if one is red."""
    from murmur.checking import check_command, find_site

    with told():
        site = find_site(directory, task, recipe, values(option), limit=limit, show=show)
        code = check_command(site, as_json=json_)
    raise typer.Exit(code)


def plan(
    directory: Site = Path("murmur-client"),
    task: SiteTask = "",
    recipe: SiteRecipe = None,
    option: Option = None,
    json_: Json = False,
) -> None:
    """Show what a recipe comes to at this site: processes, micro-batches, precision, memory."""
    from murmur.checking import find_site, plan_command

    with told():
        site = find_site(directory, task, recipe, values(option), limit=64, show=False)
        code = plan_command(site, as_json=json_)
    raise typer.Exit(code)


def tune(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml, or a folder with one; its table tune says what varies")],
    trials: Annotated[int | None, typer.Option(min=1, help="of this search, those of before among them")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="what varies: train.lr=1e-3..1e-1:log, train.batch_size=8..64:8, "
            'train.optimizer=["SGD", "Adam"]; or one value for all trials',
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy, loss, or name:min or name:max")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the search, instead of the recipe's")] = None,
    pruner: Annotated[str | None, typer.Option(help="median, halving or none")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="epsilon of all trials together")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="where the search is kept and goes on")] = Path("murmur-tune"),
    target: Annotated[
        str,
        typer.Option("--simulate", help="as for `murmur simulate` \\[default: the recipe's folder]"),
    ] = "",
    clients: Annotated[int | None, typer.Option(min=1, help="simulated clients")] = None,
    federation: Annotated[
        str, typer.Option(metavar="URL|DIR", help="each trial is a run on this coordinator: address, or data folder")
    ] = "",
    task: Annotated[str, typer.Option(help="with --federation: module:Class whose model() each run starts from")] = "",
    init: Annotated[Path | None, typer.Option(help="with --federation: start from this model (safetensors)")] = None,
    option: Option = None,
    json_: Json = False,
) -> None:
    """Search a recipe's settings by Optuna: each trial is a simulation, or a run on a coordinator."""
    if pruner not in (None, "median", "halving", "none"):
        raise typer.BadParameter("median, halving or none", param_hint="--pruner")
    space = values(set_)
    with told():
        from murmur.searching import tune_command

        code = tune_command(
            recipe,
            target=target,
            federation=federation,
            task=task,
            init=init,
            options=values(option),
            folder=folder,
            as_json=json_,
            space=space,
            trials=trials,
            metric=metric,
            seed=seed,
            pruner=pruner,
            budget=budget,
            clients=clients,
        )
    raise typer.Exit(code)


def sweep(
    target: Annotated[str, typer.Argument(help="as for `murmur simulate`; lists in its recipe.toml vary")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="what varies: train.lr=0.1,0.01; or one value for all")
    ] = None,
    clients: Annotated[int, typer.Option(min=1)] = 10,
    rounds: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
    cohort: Annotated[int | None, typer.Option(min=0, help="clients asked in a round; 0: all")] = None,
    seed: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    secure: Annotated[
        str | None, typer.Option(metavar="[real|ideal|off]", help="as for `murmur simulate`; --plain is off")
    ] = None,
    backend: Annotated[str, typer.Option(help="as for `murmur simulate`")] = "auto",
    option: Option = None,
    metric: Annotated[str, typer.Option(help="that ranks them: accuracy, loss, or name:min or name:max")] = "loss",
    jobs: Annotated[int, typer.Option(min=0, help="simulations at a time \\[default: as cores and memory allow]")] = 0,
    folder: Annotated[
        Path, typer.Option("--dir", help="where tables and picture go, and what a second call goes on from")
    ] = Path("murmur-sweep"),
    data: Annotated[
        Path | None, typer.Option(help="data folder in whose store the runs are kept \\[default: murmur-data]")
    ] = None,
    json_: Json = False,
) -> None:
    """Simulate every combination of some settings' values, several at once; a table, CSV, a picture and a notebook."""
    given = {"clients": clients, "rounds": rounds, "cohort": cohort, "seed": seed, "secure": secure, "backend": backend}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    with told():
        from murmur.sweeping import sweep_command

        code = sweep_command(
            target,
            settings=set_,
            arguments=[*arguments, *(f"--option={o}" for o in option or ())],
            secure=secure,
            metric=metric,
            jobs=jobs,
            folder=folder,
            data=data or Path(os.environ.get("MURMUR_DATA", "murmur-data")),
            as_json=json_,
        )
    raise typer.Exit(code)
