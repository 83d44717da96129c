"""`murmur sweep`: every combination of some settings as a simulation, several at once, with a table and a picture."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from subprocess import Popen
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from murmur.options import pairs
from murmur.output import FAILED, err, out, plain, print_json, print_table
from murmur.processes import Children
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import changed, parse_recipe
from murmur.simulating import UNNAMED
from murmur.simulation.ending import ended_by_sigterm
from murmur.simulation.sweeps import (
    Trial,
    Value,
    axes,
    columns,
    curves_csv,
    grid,
    notebook,
    picture,
    ranked,
    rows,
    table_csv,
)

FIRST_BYTES = 1 << 30  # that a simulation is taken to need until one has been measured
LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A combination, and the command line whose simulation it is."""

    params: Mapping[str, Value]
    arguments: tuple[str, ...]
    recipe: str  # as JSON: the same command over another file is another point

    @property
    def key(self) -> str:
        return sha256(json.dumps([self.arguments, self.recipe]).encode()).hexdigest()[:16]


def sweep_command(
    target: str,
    *,
    settings: list[str] | None,
    arguments: Sequence[str],
    secure: str | None,
    metric: str,
    jobs: int,
    folder: Path,
    data: Path,
    as_json: bool,
) -> int:
    """Simulate every combination that has not been, write the tables and the picture; returns the exit code.

    settings: name=value, or name=value,value for what varies. arguments: of `murmur simulate`, for all of them.
    """
    points = _points(target, settings, [*arguments, "--data", str(data)], secure)
    done = folder / "points"
    done.mkdir(parents=True, exist_ok=True)
    missing = [p for p in points if not (done / f"{p.key}.json").exists()]
    with ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        bar = stack.enter_context(_bar(hidden=as_json or not err.is_terminal))
        shown = bar.add_task("sweeping", total=len(points), completed=len(points) - len(missing))
        reasons: dict[str, str] = {}
        for point, said in _run(missing, folder / "logs", jobs or os.cpu_count() or 1):
            trial = _read(point, said)
            if trial.history:
                kept = done / f"{point.key}.json"
                kept.with_suffix(".new").write_text(said)
                kept.with_suffix(".new").replace(kept)
            else:
                reasons[point.key] = trial.reason
            bar.advance(shown)
            if not as_json:
                values = "  ".join(f"{name} {value:.4g}" for name, value in sorted(trial.final.items()))
                bar.console.print(plain(f"{trial.label}: {values or trial.reason}"), soft_wrap=True)
    trials: list[Trial] = []
    for p in points:
        kept = done / f"{p.key}.json"
        trials.append(_read(p, kept.read_text()) if kept.exists() else Trial(params=p.params, reason=reasons[p.key]))
    trials = ranked(trials, metric)
    for name, text in (
        ("table.csv", table_csv(trials)),
        ("curves.csv", curves_csv(trials)),
        ("sweep.svg", picture(trials, metric)),
        ("sweep.ipynb", notebook(f"Sweep of {target}", metric)),
    ):
        (folder / name).write_text(text)
    if as_json:
        told = [{"params": dict(t.params), "final": dict(t.final), "reason": t.reason,
                 "run": t.history.get("run") if t.history else None} for t in trials]  # fmt: skip
        print_json({"metric": metric, "trials": told, "folder": str(folder)})
    else:
        params, metrics = columns(trials)
        print_table(
            f"{len(trials)} simulations, by {metric}", [*params, *metrics, "rounds", "s", "run", ""], rows(trials)
        )
        out.print(f"table.csv, curves.csv, sweep.svg and sweep.ipynb are in [bold]{plain(str(folder))}[/]")
    return FAILED if any(t.reason for t in trials) else 0


def _points(target: str, settings: list[str] | None, arguments: list[str], secure: str | None) -> list[Point]:
    """Every combination of what the recipe and the settings vary; each is checked before the first is simulated."""
    path = Path(target) / "recipe.toml"
    values: dict[str, Any] = tomllib.loads(path.read_text()) if path.exists() else dict(UNNAMED)
    values.pop("tune", None)
    if secure is not None:
        changed(values, {"secure__on": secure != "off"})
    for dotted, given in pairs(settings).items():
        changed(values, {dotted.replace(".", "__"): _value(given)})
    varied = axes(values)
    if not varied:
        raise OperatorError("nothing varies: give --set train.lr=0.1,0.01, or lists in recipe.toml")
    fixed = [name for name in pairs(settings) if name not in varied]
    found: dict[str, Point] = {}
    for params in grid(varied):
        whole = json.loads(json.dumps(values))
        changed(whole, {name.replace(".", "__"): value for name, value in params.items()})
        recipe = parse_recipe(whole, where=", ".join(f"{name} = {value}" for name, value in params.items()))
        flags = [f"--set={name}={json.dumps(value)}" for name, value in params.items()]
        flags += [f"--set={name}={pairs(settings)[name]}" for name in fixed]
        made = Point(params=params, arguments=(target, *arguments, *flags), recipe=recipe.model_dump_json())
        found[made.key] = made
    return list(found.values())


def _value(given: str) -> Any:
    """TOML, or values with commas between them, or text."""
    try:
        return tomllib.loads(f"v = {given}")["v"]
    except tomllib.TOMLDecodeError:
        return [_value(part.strip()) for part in given.split(",")] if "," in given else given


def _run(points: Sequence[Point], logs: Path, jobs: int) -> Iterator[tuple[Point, str]]:
    """What each simulation printed, as they end: so many at a time as there are jobs and memory for."""
    waiting, running, largest = list(points), dict[str, tuple[Point, Popen[bytes]]](), FIRST_BYTES
    threads = str(max(1, (os.cpu_count() or 1) // min(jobs, max(1, len(points)))))
    with Children(logs) as children:
        while waiting or running:
            measured = [_peak_bytes(child.pid) for _, child in running.values()]
            largest = max([largest if largest != FIRST_BYTES or not any(measured) else 0, *measured])
            if waiting and len(running) < jobs and (not running or _free_bytes() > 1.2 * largest):
                point = waiting.pop(0)
                command = ("murmur", "simulate", *point.arguments, "--resume", "last", "--json")
                environment = {"OMP_NUM_THREADS": threads}
                running[point.key] = point, children.start(point.key, *command, environment=environment)
                continue
            for key, (point, child) in list(running.items()):
                if child.poll() is not None:
                    del running[key]
                    yield point, (logs / f"{key}.log").read_text(errors="replace")
            time.sleep(LOOK_S)


def _read(point: Point, said: str) -> Trial:
    """The last line that a simulation printed: its history, or why it failed."""
    last = said.strip().rpartition("\n")[2]
    try:
        return Trial(params=point.params, history=json.loads(last))
    except ValueError:
        return Trial(params=point.params, reason=last.removeprefix("error: ") or "it was killed")


def _peak_bytes(pid: int) -> int:
    return _of_proc(Path(f"/proc/{pid}/status"), "VmHWM:")


def _free_bytes() -> float:
    return _of_proc(Path("/proc/meminfo"), "MemAvailable:") or float("inf")


def _of_proc(path: Path, name: str) -> int:
    """A number of kilobytes there, in bytes; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _bar(*, hidden: bool) -> Progress:
    columns = (TextColumn("sweeping"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, disable=hidden)
