"""`murmur demo`: a coordinator and four hospitals on this machine, each a process with its own folder, key and data.

Everything is as in production, with two shortcuts that are safe on loopback only: plain HTTP, so that a browser shows
no warning, and the demo approves the hospitals' keys itself, after comparing fingerprints as an admin would.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from murmur.client import Client
from murmur.local import admit, start_agent, start_coordinator, until, wait
from murmur.output import FAILED, fail, out, print_json
from murmur.processes import Children
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, load_recipe

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
MARKER = ".murmur-demo"


@dataclass(kw_only=True)
class Demo:
    """One demonstration. `run` returns when it has ended, or on Ctrl-C; no process outlives it."""

    folder: Path
    rounds: int
    strategy: str
    processes: int
    secure: bool
    seed: int

    def run(self, *, stay: bool, as_json: bool) -> None:
        screen = Console(stderr=True) if as_json else out
        started = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all children, as Ctrl-C does
        example = _example()
        self.folder = self._fresh(self.folder.resolve())
        recipe = self._recipe(example)
        with (
            Children(self.folder / "logs") as children,
            multiprocessing.get_context("spawn").Pool(1, _ignore_interrupts) as bench,
        ):
            first = bench.apply_async(_first_model, (example, recipe.seed, self.folder / "first.safetensors"))
            alone = bench.apply_async(_baselines, (example, recipe, self.seed))
            client, login = self._coordinator(children)
            screen.print(f"dashboard: [bold]{login}[/]  (the link logs in once)", soft_wrap=True)
            self._hospitals(children, client, example)
            screen.print(f"{len(HOSPITALS)} hospitals enrolled, approved and online")
            run_id = client.start_run(recipe, first.get())
            self._follow(children, client, run_id, screen)
            model = self.folder / "model.safetensors"
            newest = client.versions(run_id)[0]
            client.pull(newest.sha256, model)
            federated = bench.apply(_evaluate, (example, model, self.seed))
            result = self._report(alone.get(), federated, time.monotonic() - started)
            screen.print(self._table(result))
            if as_json:
                print_json(result)
            if stay:
                screen.print(f"the dashboard stays up at [bold]{client.url}/runs/{run_id}[/]; Ctrl-C ends everything")
                wait(children)

    def _fresh(self, folder: Path) -> Path:
        if folder.exists():
            if any(folder.iterdir()) and not (folder / MARKER).exists():
                raise OperatorError(f"{folder} is not empty and was not made by a demo: give another --dir")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
        return folder

    def _recipe(self, example: Path) -> Recipe:
        changes: dict[str, Any] = {"rounds": self.rounds, "seed": self.seed, "secure__on": self.secure}
        if self.strategy == "fedavg":
            changes |= {"strategy__name": "fedavg", "strategy__mu": 0.0}
        return load_recipe(example / "recipe.toml", **changes)

    def _coordinator(self, children: Children) -> tuple[Client, str]:
        return start_coordinator(children, self.folder / "coordinator", self.folder / "logs" / "coordinator.log")

    def _hospitals(self, children: Children, client: Client, example: Path) -> None:
        from murmur.clients.settings import Policy, TaskEntry

        for name in HOSPITALS:
            folder = self.folder / name
            folder.mkdir()
            options = {"data": str(folder / "patients.csv"), "seed": self.seed}
            shutil.copy(example / "data" / f"processed.{name}.data", folder / "patients.csv")
            admit(
                client,
                folder,
                name=name,
                tasks={"heart": TaskEntry(reference=f"{example / 'task.py'}:Heart", options=options)},
                processes=self.processes,
                policy=Policy(require_secure=self.secure),
            )
            start_agent(children, name, folder)

        def online() -> bool | None:
            self._check(children)
            return all(v.online for v in client.clients()) or None

        until(online, "the hospitals did not come online")

    def _follow(self, children: Children, client: Client, run_id: str, screen: Console) -> None:
        from murmur.watching import follow

        state = "running"
        for _event, after in follow(client, client.run(run_id), screen):
            state = after
            self._check(children)
        if state != "finished":
            reason = client.run(run_id).run.reason
            fail(f"the run is {state}: {reason}; the logs are in {self.folder / 'logs'}", FAILED)

    def _check(self, children: Children) -> None:
        if dead := children.dead():
            raise OperatorError(f"a process of the demo ended with code {dead[0]}; see {self.folder / 'logs'}")

    def _report(self, alone: dict[str, Any], federated: dict[str, float], seconds: float) -> dict[str, Any]:
        columns = {"local": alone["local"], "pooled": alone["pooled"], "federated": federated}
        rows = {name: {kind: round(column[name], 4) for kind, column in columns.items()} for name in HOSPITALS}
        mean = {kind: round(statistics.fmean(c[name] for name in HOSPITALS), 4) for kind, c in columns.items()}
        return {
            "hospitals": rows,
            "mean": mean,
            "seconds": round(seconds, 2),
            "rounds": self.rounds,
            "secure": self.secure,
            "strategy": self.strategy,
            "processes": self.processes,
        }

    def _table(self, result: dict[str, Any]) -> Table:
        kind = "secure aggregation" if self.secure else "no masking"
        title = f"Accuracy on each hospital's test rows: {self.strategy}, {self.rounds} rounds, {kind}"
        table = Table(title=title, caption=f"{result['seconds']:.0f} s", title_justify="left", header_style="dim")
        table.add_column("hospital")
        for column in ("alone", "all data pooled", "federated"):
            table.add_column(column, justify="right")
        for name, values in result["hospitals"].items():
            table.add_row(name, *(f"{values[kind]:.1%}" for kind in ("local", "pooled", "federated")))
        table.add_section()
        mean = (f"{result['mean'][kind]:.1%}" for kind in ("local", "pooled", "federated"))
        table.add_row("mean", *mean, style="bold")
        return table


def _example() -> Path:
    """The hospitals' example: beside the package in a clone, or below the folder we are in."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "examples" / "hospitals" / "task.py").exists():
            return root / "examples" / "hospitals"
    raise OperatorError("examples/hospitals is not here: run the demo in a clone of the repository")


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every child; the demo ends them itself


def _bench(example: Path) -> Any:
    """The example's baselines, loaded by path in the process that has torch."""
    import importlib.util
    import sys

    import torch

    torch.set_num_threads(1)
    if str(example) not in sys.path:
        sys.path.insert(0, str(example))
    spec = importlib.util.find_spec("baselines")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _first_model(example: Path, seed: int, path: Path) -> Path:
    from murmur.clients.engine.state import initial_model

    initial_model(_task(example, HOSPITALS[0], 0), seed, path)
    return path


def _task(example: Path, hospital: str, seed: int) -> Any:
    from murmur.clients.task import load_task

    options = {"data": str(example / "data" / f"processed.{hospital}.data"), "seed": seed}
    return load_task(f"{example / 'task.py'}:Heart", options)


def _baselines(example: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    bench, tasks = _bench(example), {name: _task(example, name, seed) for name in HOSPITALS}
    pooled = bench.pooled(list(tasks.values()), recipe)
    return {
        "local": {name: bench.evaluate(task, bench.local(task, recipe)) for name, task in tasks.items()},
        "pooled": {name: bench.evaluate(task, pooled) for name, task in tasks.items()},
    }


def _evaluate(example: Path, model: Path, seed: int) -> dict[str, float]:
    from murmur.clients.engine.state import read_model

    found: dict[str, float] = {}
    for name in HOSPITALS:
        task = _task(example, name, seed)
        module = task.model()
        read_model(module, model)
        found[name] = _bench(example).evaluate(task, module)
    return found
