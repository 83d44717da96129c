"""`murmur simulate`: the simulator on the command line, with its progress and a table at the end."""

from __future__ import annotations

from contextlib import ExitStack, closing
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from murmur.coordinator.store.simulations import Simulated
from murmur.output import err, out, plain, print_json, print_table
from murmur.privacy.dp.plan import view_of
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, changed, load_recipe, parse_recipe
from murmur.protocol.sections import CLIPPED
from murmur.runs import show_privacy
from murmur.simulation import Backend, CentralTest, History, Round, simulate
from murmur.simulation.ending import ended_by_sigterm
from murmur.simulation.settling import Secure
from murmur.simulation.storing import Stored, Versions
from murmur.simulation.world import World, load_world
from murmur.simulation.world_picture import picture
from murmur.web.words import took
from murmur.worlds import show_world

LAST = "last"  # in place of a run's id
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
    world: str | None,
    test: dict[str, Any],
    plot: Path | None,
    data: Path | None,
    versions: Versions,
    resume: str,
    workers: int,
    ray: str,
    as_json: bool,
) -> None:
    """Simulate and print what came out; the final model goes to `save`, the world's picture to `plot`.

    test: as of `CentralTest`. data: the data folder in whose store the run is kept; None: in none. resume: the
    run there that goes on; "last": the newest of this very command that did not end, or else a new one.
    """
    there, changes = _world(world, changes)
    if plot is not None and there is None and not resume:
        raise OperatorError("--plot is for a world: give --world as well")
    if changes and secure is not None:  # a recipe is checked whole, masks and all
        changes = {"secure__on": secure != "off"} | changes
    given: dict[str, Any] = {"clients": clients, "options": options, "backend": backend, "workers": workers, "ray": ray}
    if tested := _test(test):
        given["test"] = tested
    given["world"] = there.model_dump(mode="json", exclude_defaults=True) if there else None
    changed: dict[str, Any] = {"rounds": rounds, "cohort": cohort, "seed": seed, "secure": secure}
    with ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        stored = None
        if resume and resume != LAST:
            stored = stack.enter_context(closing(Stored(_needed(data), versions=versions)))
            target, recipe, given = _again(stored.find(resume), target)
            changed, total = {}, recipe.rounds
        else:
            recipe = _recipe(target, changes)
            total = rounds or (recipe or parse_recipe(UNNAMED)).rounds
            if data is not None:
                call = {"target": _absolute(target), "recipe": _digest(recipe), **given, **changed}
                stored = stack.enter_context(closing(Stored(data, versions=versions, call=call)))
                resume = _last(stored, total, resume)
        bar = stack.enter_context(_bar(hidden=as_json or not out.is_terminal))
        task = bar.add_task("simulating", total=total, said="")

        def on_round(done: Round) -> None:
            said = "  ".join(f"{name} {value:.4g}" for name, value in sorted(done.metrics.items()))
            bar.update(task, completed=done.n, said=said)

        if tested := given.get("test"):
            given["test"] = CentralTest(**tested)
        history = simulate(target, recipe, **given, **changed, on_round=on_round, store=stored, resume=resume)
        if save is not None:
            history.save(save)
        if plot is not None and history.world is not None:
            plot.write_text(picture(history))
    if as_json:
        return print_json(history.to_json())
    _show(history, ideal=secure == "ideal")
    if history.run:
        out.print(f"run [bold]{history.run}[/] is in {plain(str(data))}: [bold]murmur coordinator serve[/] shows it")


def _bar(*, hidden: bool) -> Progress:
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[said]}"),
    )
    return Progress(*columns, console=err, disable=hidden)


def _needed(data: Path | None) -> Path:
    if data is None:
        raise OperatorError("--resume goes on with a run of a store: leave --no-store away")
    return data


def _again(found: Simulated, target: str) -> tuple[str, Recipe, dict[str, Any]]:
    """The federation, the recipe and the arguments of a run that goes on."""
    call = found.about.get("call")
    if not call and not target:
        raise OperatorError("this run was begun from Python: go on with simulate(..., store=..., resume=...)")
    call = call or {}
    kept = ("clients", "options", "backend", "workers", "ray", "world", "test")
    given = {name: call[name] for name in kept if name in call}
    return target or call["target"], found.recipe, given


def _last(stored: Stored, rounds: int, resume: str) -> str:
    """The newest run of this very command that did not end, where it is to go on; else it is only told of."""
    for run_id, done in stored.unfinished():
        if resume:
            return run_id
        err.print(
            f"[dim]{run_id} began with this very command and has done {done} of {rounds} rounds: "
            f"`murmur simulate --resume {run_id}` goes on with it. This is a new run.[/]",
            soft_wrap=True,
        )
    return ""


def _absolute(target: str) -> str:
    """A target as it is understood from any folder."""
    path, colon, name = target.rpartition(":") if not Path(target).exists() else (target, "", "")
    return f"{Path(path).resolve()}{colon}{name}" if path and Path(path).exists() else target


def _digest(recipe: Recipe | None) -> str:
    return sha256(recipe.model_dump_json().encode()).hexdigest() if recipe else ""


def _recipe(target: str, changes: dict[str, Any]) -> Recipe | None:
    """The folder's recipe with the changes, or none where there is neither."""
    path = Path(target) / "recipe.toml"
    if path.exists():
        return load_recipe(path, **changes)
    return parse_recipe(changed(dict(UNNAMED), changes)) if changes else None


def _world(given: str | None, changes: dict[str, Any]) -> tuple[World | None, dict[str, Any]]:
    """The world with its changes, if there is one, and the changes of the recipe."""
    own = {name.removeprefix("world__"): value for name, value in changes.items() if name.startswith("world__")}
    rest = {name: value for name, value in changes.items() if not name.startswith("world__")}
    if given is None and own:
        raise OperatorError(f"--set world.{min(own)} is for a world: give --world as well")
    return load_world(given, own) if given is not None else None, rest


def _test(test: dict[str, Any]) -> dict[str, Any] | None:
    """What versions are tested on, as it is kept with the run; None where nothing was said."""
    if not test["clients"] and not test["task"]:
        if test["patience"] or test["every"] > 1:
            raise OperatorError("--patience and --test-every are for a test: give --test-clients or --test-task, too")
        return None
    return test | {"task": _absolute(test["task"])}


def _show(history: History, *, ideal: bool) -> None:
    names, world, tests = sorted(history.final), history.world, history.tests
    tested = sorted({name for found in tests.values() for name in found})
    times = [took(at) for at in world.versions_s] if world else []
    rows = [
        (n, *times[n : n + 1], *(metrics.get(name) for name in names),
         *(tests.get(n, {}).get(name) for name in tested))
        for n, metrics in enumerate(history.versions)
    ]  # fmt: skip
    shown = rows if len(rows) <= 30 else [rows[round(i * (len(rows) - 1) / 19)] for i in range(20)]
    kind = "ideal sums" if ideal else "masked" if history.recipe.secure.on else "plain"
    strategy = history.recipe.strategy.name
    print_table(
        f"{history.clients} clients, {strategy}, {kind}",
        ("version", *(["after"] if world else ()), *names, *(f"test {n}" for n in tested)),
        shown,
    )
    seconds = sum(r.seconds for r in history.rounds)
    out.print(f"{len(history.rounds)} rounds in {seconds:.1f} s, {history.backend}")
    if world:
        show_world(world)
    if history.ended:
        err.print(f"[bold red]ended early[/]: {plain(history.ended)}", soft_wrap=True)
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
