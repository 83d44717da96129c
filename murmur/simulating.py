"""`murmur simulate`: the simulator on the command line, with its progress and a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from murmur.output import out, print_json, print_table
from murmur.privacy.dp.plan import view_of
from murmur.protocol.recipe import Recipe, changed, load_recipe, parse_recipe
from murmur.protocol.sections import CLIPPED
from murmur.runs import show_privacy
from murmur.simulation import Backend, History, Round, simulate
from murmur.simulation.settling import Secure

UNNAMED: dict[str, Any] = {"name": "simulation", "task": "simulation"}  # for a federation that comes without a recipe


def simulate_command(
    target: str,
    *,
    clients: int,
    rounds: int | None,
    cohort: int | None,
    seed: int | None,
    secure: Secure,
    options: dict[str, Any],
    changes: dict[str, Any],
    save: Path | None,
    backend: Backend,
    as_json: bool,
) -> None:
    """Simulate and print what came out; the final model goes to `save`."""
    if changes and secure is not None:  # a recipe is checked whole, masks and all
        changes = {"secure__on": secure != "off"} | changes
    recipe = _recipe(target, changes)
    total = rounds or (recipe or parse_recipe(UNNAMED)).rounds
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=as_json or not out.is_terminal) as bar:
        task = bar.add_task("simulating", total=total, said="")

        def on_round(done: Round) -> None:
            said = "  ".join(f"{name} {value:.4g}" for name, value in sorted(done.metrics.items()))
            bar.update(task, completed=done.n, said=said)

        history = simulate(
            target,
            recipe,
            clients=clients,
            rounds=rounds,
            cohort=cohort,
            seed=seed,
            secure=secure,
            options=options,
            backend=backend,
            on_round=on_round,
        )
        if save is not None:
            history.save(save)
    if as_json:
        return print_json(history.to_json())
    _show(history, ideal=secure == "ideal")


def _recipe(target: str, changes: dict[str, Any]) -> Recipe | None:
    """The folder's recipe with the changes, or none where there is neither."""
    path = Path(target) / "recipe.toml"
    if path.exists():
        return load_recipe(path, **changes)
    return parse_recipe(changed(dict(UNNAMED), changes)) if changes else None


def _show(history: History, *, ideal: bool) -> None:
    names = sorted(history.final)
    rows = [(n, *(metrics.get(name) for name in names)) for n, metrics in enumerate(history.versions)]
    shown = rows if len(rows) <= 30 else [rows[round(i * (len(rows) - 1) / 19)] for i in range(20)]
    kind = "ideal sums" if ideal else "masked" if history.recipe.secure.on else "plain"
    strategy = history.recipe.strategy.name
    print_table(f"{history.clients} clients, {strategy}, {kind}", ("version", *names), shown)
    seconds = sum(r.seconds for r in history.rounds)
    out.print(f"{len(history.rounds)} rounds in {seconds:.1f} s, {history.backend}")
    clipped = max((r.clipped for r in history.rounds), default=0.0)
    if clipped > CLIPPED:
        out.print(f"Up to {clipped:.2%} of a round's values were cut to secure.clip_value: raise it")
    if history.ledger:
        show_privacy(view_of(history.recipe, history.ledger, "pld"))
    if spent := [e.value for e in history.epsilons().values()]:
        out.print(
            f"epsilon {min(spent):.3g} to {max(spent):.3g} at delta {history.recipe.dp.delta:g}, per training example "
            f"of one of {len(spent)} clients (RDP); the metrics above are not covered"
        )
