"""Simulated rounds beside a bare loop of the same steps: `python -m benchmarks.simulation`. See docs/simulation.md.

Every part runs in a process of its own, so that threads and peak memory are its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from murmur.aggregation.selection import select
from murmur.clients.engine.state import initial_model
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation import Round, simulate

from .report import PACKAGES, Figure, document, median, note, print_report
from .simulated_work import BATCH, CLIENTS, IMAGES, RATE, WORKS, Images, Work, bare_round, read
from .simulation_peers import peers

THREADS = 1, 2
BACKENDS = "sequential", "vectorized", "processes", "ray"  # the last two with as many workers as threads
COHORTS = 10, 100, 1_000, 10_000
NOTHING = 1_000, 10_000  # clients that do almost nothing, so that what a client costs by itself is left
REGISTERED = 1_000, 100_000  # clients that there are, of whom a round asks 100


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if options.part:
        print(json.dumps(part(json.loads(options.part))))
        return
    figures = [figure for work in WORKS if work.name in options.only for figure in measure(work, options)]
    if "cohorts" in options.only:
        figures += cohorts(options)
    found = document(figures, folder=Path(tempfile.gettempdir()), quick=options.quick, packages=PACKAGES)
    print_report(found, options.form or "plain")


def measure(work: Work, options: argparse.Namespace) -> list[Figure]:
    """One workload: the loop on one and on two threads, and each backend on both."""
    cohort = 4 if options.quick else work.cohort
    rounds = 2 if options.quick else options.rounds
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for way in ("bare", *(way for way in BACKENDS if way != "ray" or find_spec("ray"))):
        for threads in THREADS:
            asked = {"way": way, "work": work.name, "threads": threads, "cohort": cohort, "rounds": rounds}
            found[way, threads] = _in_a_process(asked, options)
            note(f"{work.name} {way} on {threads}: {min(found[way, threads]['seconds']):.4g} s")

    def best(way: str) -> dict[str, Any]:
        return min((found[way, threads] for threads in THREADS), key=lambda f: min(f["seconds"]))

    bare, fast = best("bare"), best("vectorized")
    steps = cohort * -(-IMAGES // BATCH)
    said = f"fastest of {len(bare['seconds'])} rounds, each on the better of 1 and 2 threads"
    alone = min(best("sequential")["seconds"])
    name = work.name
    others = peers(work, min(fast["seconds"]), data=options.data, cohort=cohort, rounds=rounds) if options.peers else []
    return [
        *others,
        Figure(
            name=f"{name}_vectorized",
            value=min(bare["seconds"]) / min(fast["seconds"]),
            unit="x the bare loop",
            at_least=work.at_least,
            note=said,
        ),
        Figure(
            name=f"{name}_sequential_overhead",
            value=100 * (alone / min(bare["seconds"]) - 1),
            unit="%",
            at_most=5,
            note=said,
        ),
        *(
            Figure(name=f"{name}_{way}_{threads}_{what}", value=value, unit=unit)
            for (way, threads), f in found.items()
            for what, value, unit in (
                ("min", min(f["seconds"]), "s"),
                ("median", median(f["seconds"]), "s"),
                ("steps", steps / median(f["seconds"]), "/s"),
                ("cpu", f["cpu_s"], "s"),
                ("peak", f["peak_mb"], "MB"),
                ("accuracy", f["accuracy"], ""),
            )
            if value is not None
        ),
    ]


def cohorts(options: argparse.Namespace) -> list[Figure]:
    """What a round costs by the number of clients in it, and what a client costs that does almost nothing."""
    sizes = COHORTS[:2] if options.quick else COHORTS
    each: list[Figure] = []
    for cohort in sizes:
        asked = {"way": "vectorized", "work": "W2", "threads": 1, "cohort": cohort, "rounds": 4}
        took = min(_in_a_process(asked, options)["seconds"])
        each.append(Figure(name=f"cohort_{cohort}", value=1e6 * took / cohort, unit="us a client", note="W2, 1 thread"))
    few, many = (100, 300) if options.quick else NOTHING
    asked = {"way": "nothing", "work": "W2", "threads": 1, "rounds": 5}
    turn = _slope("cpu_s", asked, "cohort", (few, many), options)
    said = f"CPU, from {few} to {many} clients of one example and a model of two weights"
    found = [Figure(name="client_turn", value=1e6 * turn, unit="us", below=50, note=said), *each]
    linear = (each[-1].value or 0.0) / (each[0].value or 1.0)
    said = f"what a client costs among {sizes[-1]} by what it costs among {sizes[0]}"
    found.append(Figure(name="cohort_linear", value=linear, unit="x", at_most=1.25, note=said))
    few, many = (100, 1_000) if options.quick else REGISTERED
    memory = _slope("peak_mb", asked | {"cohort": 100}, "clients", (few, many), options)
    said = f"from {few} to {many} clients that share their data, of whom 100 are asked"
    return [*found, Figure(name="client_registered", value=1e3 * memory, unit="kB", below=1, note=said)]


def _slope(what: str, asked: dict[str, Any], by: str, sizes: tuple[int, int], options: argparse.Namespace) -> float:
    """By how much a figure grows with each client more, from few to many."""
    few, many = (_in_a_process(asked | {by: n}, options)[what] for n in sizes)
    return (many - few) / (sizes[1] - sizes[0])


def part(asked: dict[str, Any]) -> dict[str, Any]:
    """One way of doing one workload in this process: seconds of each round after the first, peak memory, accuracy.

    cpu_s: of this process in the round that took the least, None where others train.
    """
    torch.set_num_threads(asked["threads"])
    work, data = next(w for w in WORKS if w.name == asked["work"]), read(asked["data"])
    cohort, rounds = asked["cohort"], asked["rounds"]
    if asked["way"] == "nothing":
        x = torch.ones(1, 1)
        tasks = [Images(lambda: nn.Linear(1, 2), x, torch.zeros(1, dtype=torch.int64))] * asked.get("clients", cohort)
    else:
        tasks = data.clients(work.model)
        tasks = [tasks[k % CLIENTS] for k in range(max(CLIENTS, cohort))]
    if asked["way"] == "bare":
        module, seconds, cpu = _bare(work, tasks, cohort, rounds)
    else:
        backend: Any = "vectorized" if asked["way"] == "nothing" else asked["way"]
        cpu = [time.process_time()]

        def on_round(_: Round) -> None:
            cpu.append(time.process_time())

        recipe = _recipe(cohort, rounds)
        history = simulate(tasks, recipe, backend=backend, workers=asked["threads"], on_round=on_round)
        module, seconds = tasks[0].model(), [r.seconds for r in history.rounds]
        module.load_state_dict(history.state_dict())
    own, workers = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {"seconds": seconds[1:], "peak_mb": own / 1e3, "cpu_s": min(b - a for a, b in pairwise(cpu[1:]))}
    if asked["way"] == "processes":
        found |= {"peak_mb": (own + asked["threads"] * workers) / 1e3, "cpu_s": None}
    elif asked["way"] == "ray":  # its workers are no children of this process
        found |= {"peak_mb": None, "cpu_s": None}
    return found | {"accuracy": 0.0 if asked["way"] == "nothing" else data.accuracy(module)}


def _bare(work: Work, tasks: list[Images], cohort: int, rounds: int) -> tuple[nn.Module, list[float], list[float]]:
    """The trained module, seconds of each round, and the CPU seconds at the start and after each."""
    names = [f"client-{k:0{len(str(len(tasks) - 1))}d}" for k in range(len(tasks))]
    by_name, module, seconds = dict(zip(names, tasks, strict=True)), work.model(), list[float]()
    cpu = [time.process_time()]
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file

        initial_model(tasks[0], 0, Path(folder, "model"))
        module.load_state_dict(load_file(Path(folder, "model")))
    for n in range(1, rounds + 1):
        asked = select(names, cohort, seed=0, round=n, attempt=1)
        began = time.monotonic()
        bare_round(module, [by_name[name] for name in asked], asked, n)
        seconds.append(time.monotonic() - began)
        cpu.append(time.process_time())
    return module, seconds, cpu


def _recipe(cohort: int, rounds: int) -> Recipe:
    train = {"epochs": 1, "batch_size": BATCH, "lr": RATE}
    plain = {"name": "benchmark", "task": "benchmark", "secure": {"on": False}, "metrics": ()}
    return parse_recipe(plain | {"rounds": rounds, "cohort": {"size": cohort, "min": 1}, "train": train})


def _in_a_process(asked: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.simulation", "--part", json.dumps(asked | {"data": options.data})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{asked} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parts = [*(work.name for work in WORKS), "cohorts"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one object on one line")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the page's table")
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="NAME", help=f"of {', '.join(parts)}"
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each way; the first is not counted [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="every part small: it shows that it runs, not how fast")
    parser.add_argument("--data", default="", help="fashion_mnist.npz; without it noise of its shapes")
    parser.add_argument("--peers", action="store_true", help="flwr and pfl too, where installed: docs/simulation.md")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
