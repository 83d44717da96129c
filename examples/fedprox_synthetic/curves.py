"""FedAvg and FedProx with 0, 50 and 90 % stragglers on the four synthetic data sets: curves and a table.

python examples/fedprox_synthetic/curves.py picture.svg [--rounds 200] [--seed 0] [--data "(1, 1)"]
    [--stragglers 0.9]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from task import federation, together
from torch import set_num_threads

from murmur.protocol.recipe import load_recipe
from murmur.simulation import simulate
from murmur.simulation.measuring import measure
from murmur.web.curves import curves
from murmur.web.svg import Point, Series

RECIPE = Path(__file__).parent / "recipe.toml"
DATA: dict[str, dict[str, Any]] = {
    "iid": {"iid": True},
    "(0, 0)": {"alpha": 0.0, "beta": 0.0},
    "(0.5, 0.5)": {"alpha": 0.5, "beta": 0.5},
    "(1, 1)": {"alpha": 1.0, "beta": 1.0},
}
STRAGGLERS = 0.0, 0.5, 0.9
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # an ink, and changes of the recipe
    "FedAvg": ("c", {"strategy__name": "fedavg", "strategy__mu": 0.0}),
    "FedProx, μ = 0": ("b", {"strategy__mu": 0.0}),
    "FedProx, μ = 1": ("a", {"strategy__mu": 1.0}),
}
Curve = dict[int, dict[str, float]]


def curve(options: dict[str, Any], stragglers: float, method: str, rounds: int, seed: int = 0) -> Curve:
    """Loss on the train samples and accuracy on the test samples of all devices, after each round."""
    devices = federation(**options, seed=seed)
    recipe = load_recipe(RECIPE, **METHODS[method][1])
    world = {"stragglers": stragglers}
    with TemporaryDirectory() as folder:
        simulate(devices, recipe, rounds=rounds, seed=seed, world=world, secure="off", folder=folder)
        trained = measure(together(devices), folder, split="train", metrics=("loss",))
        tested = measure(together(devices), folder, metrics=("accuracy",))
    return {n: trained[n] | tested[n] for n in trained}


def all_curves(given: argparse.Namespace) -> Iterator[tuple[str, float, str, Curve]]:
    for name in given.data:
        for stragglers in given.stragglers:
            found: dict[str, Curve] = {}
            for method in METHODS:
                if not stragglers and method == "FedProx, μ = 0":
                    found[method] = found["FedAvg"]  # the same, where everybody does all its work
                else:
                    found[method] = curve(DATA[name], stragglers, method, given.rounds, given.seed)
                yield name, stragglers, method, found[method]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--stragglers", nargs="+", type=float, default=STRAGGLERS)
    given = parser.parse_args()
    panels: dict[str, list[Series]] = {}
    sys.stdout.write("| data | stragglers | method | train loss | worst of the last 20 | test accuracy |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name, stragglers, method, found in all_curves(given):
        points = [Point(x=n, y=at["loss"]) for n, at in found.items()]
        panels.setdefault(f"{name}, {stragglers:.0%} stragglers", []).append(
            Series(name=method, points=points, ink=METHODS[method][0])
        )
        last, losses = found[max(found)], [at["loss"] for at in found.values()]
        row = (name, f"{stragglers:.0%}", method, f"{last['loss']:.3f}", f"{max(losses[-20:]):.3f}")
        sys.stdout.write("| " + " | ".join((*row, f"{last['accuracy']:.1%}")) + " |\n")
        sys.stdout.flush()
    said = "Training loss of all devices by round"
    given.picture.write_text(curves(said, panels, x_label="round", columns=len(given.stragglers)))


if __name__ == "__main__":
    set_num_threads(1)
    main()
