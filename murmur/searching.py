"""`murmur tune`: a search on the command line, with a line for each trial, a table and the best recipe at its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from murmur.client import Access, Client, find_access
from murmur.output import FAILED, out, plain, print_json, print_table
from murmur.protocol import toml
from murmur.protocol.errors import OperatorError
from murmur.runs import first_model
from murmur.simulation.search import Search, Trial
from murmur.simulation.space import Value
from murmur.simulation.spending import ALL_CLIENTS
from murmur.tuning import tune

BEST = "best.toml"


def tune_command(
    recipe: Path,
    *,
    target: str,
    federation: str,
    task: str,
    init: Path | None,
    options: dict[str, Any],
    folder: Path,
    as_json: bool,
    **given: Any,
) -> int:
    """Search, print what came out, and write the best recipe into the folder; returns the exit code."""
    with ExitStack() as stack:
        on: dict[str, Any] = {"federation": target or None, "options": options or None}
        if federation:
            client = stack.enter_context(Client(_access(federation)))
            on = {"coordinator": client, "first_model": lambda r: first_model(task, options, r, init)}
        elif task or init:
            raise OperatorError("--task and --init are for runs on a coordinator: give --federation, or leave them out")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[said]}"),
        )
        screen = Console(stderr=True, highlight=False)
        bar = stack.enter_context(Progress(*columns, console=screen, disable=as_json or not screen.is_terminal))
        shown = bar.add_task("searching", total=given["trials"], said="")

        def on_start(n: int, params: Mapping[str, Value]) -> None:
            bar.update(shown, said=plain(f"trial {n}: {_params(params)}"))

        def on_trial(trial: Trial) -> None:
            bar.update(shown, completed=trial.n)
            if not as_json:
                said = f"trial {trial.n:>3}  {trial.state:<8}  {_value(trial)}  {_params(trial.params)}"
                bar.console.print(plain(said), soft_wrap=True)

        found = tune(recipe, folder=folder, on_start=on_start, on_trial=on_trial, **on, **given)
    if found.best:
        about = f"# Trial {found.best.n} of {len(found.trials)}: {found.metric} = {found.best.value:.6g}\n"
        (folder / BEST).write_text(about + toml.document(found.recipe))
    if as_json:
        print_json(found.to_json() | {"file": str(folder / BEST) if found.best else None})
    else:
        _show(found, folder)
    return 0 if found.best else FAILED


def _access(federation: str) -> Access:
    """A coordinator by its data folder, or by its address with MURMUR_TOKEN (and MURMUR_CA) as for every command."""
    import os

    if "://" not in federation:
        return find_access(Path(federation))
    token = os.environ.get("MURMUR_TOKEN")
    if not token:
        raise OperatorError("--federation with an address needs MURMUR_TOKEN: `murmur coordinator token` makes one")
    return Access(url=federation, token=token, ca=os.environ.get("MURMUR_CA", ""))


def _show(found: Search, folder: Path) -> None:
    names = sorted({name for trial in found.trials for name in trial.params})
    best = found.best.n if found.best else 0
    rows = (
        ("*" if t.n == best else "", t.n, *(t.params.get(name) for name in names), t.value, t.state, t.version,
         f"{t.seconds:.1f}", t.run, t.reason)
        for t in found.trials
    )  # fmt: skip
    columns = ("", "trial", *names, found.metric, "state", "version", "seconds", "run", "why")
    shown = list(rows)
    keep = [i for i, _ in enumerate(columns) if i == 0 or any(row[i] not in ("", None) for row in shown)]
    kept = [[row[i] for i in keep] for row in shown]
    print_table(f"{found.metric}, {found.direction}d", [columns[i] for i in keep], kept)
    if found.epsilons:
        worst = max(found.epsilons.values(), key=lambda e: e.value)
        whose = "for all clients" if ALL_CLIENTS in found.epsilons else f"the most of {len(found.epsilons)} clients"
        out.print(
            f"[bold]epsilon {worst.value:.3g} at delta {worst.delta:g}[/], {worst.unit}-level, {whose}, of all trials "
            f"together, pruned ones too, by {worst.accountant.upper()}",
            soft_wrap=True,
        )
        out.print(plain("assumed: " + "; ".join(worst.assumptions)), soft_wrap=True)
    if found.stopped:
        out.print(f"[yellow]stopped[/] before its last trial: {plain(found.stopped)}", soft_wrap=True)
    if found.best:
        out.print(f"the best recipe is in [bold]{plain(str(folder / BEST))}[/]", soft_wrap=True)
    else:
        out.print("[bold red]no trial is complete[/]: the reasons stand above")


def _value(trial: Trial) -> str:
    return "–" if trial.value is None else f"{trial.value:.4g}"


def _params(params: Mapping[str, Value]) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())
