"""Writers alone, pooled, federated, and federated and then tuned by each: a table, and accuracy by round.

python examples/omniglot_writers/measure.py curves.svg [--data omniglot_small.npz] [--label alphabet] [--seeds 3]
    [--rounds 20] [--unseen 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from task import Drawings, federation, find_drawings, together
from torch import set_num_threads

from murmur.protocol.recipe import Recipe, load_recipe
from murmur.simulation import simulate
from murmur.simulation.measuring import measure, measure_version
from murmur.web.curves import curves
from murmur.web.svg import Point, Series

RECIPE = Path(__file__).parent / "recipe.toml"
TUNING = {"epochs": 5, "batch_size": 10, "lr": 0.02}  # a writer's own, from the federated model
INKS = {"pooled": "c", "federated": "a"}
METHODS = "alone", "pooled", "federated", "federated, then tuned"
Curve = dict[int, float]
Found = dict[str, tuple[float, float]]  # accuracy on the test drawings of those who took part and of the unseen writers


def one_seed(writers: Sequence[Drawings], unseen: int, recipe: Recipe) -> tuple[Found, dict[str, Curve]]:
    """The table for one draw of the writers that take no part, and the curves of pooled and federated training."""
    order = np.random.default_rng(recipe.seed).permutation(len(writers)).tolist()
    apart, present = [writers[i] for i in order[:unseen]], [writers[i] for i in order[unseen:]]
    alone = recipe.model_copy(
        update={"rounds": 1, "train": recipe.train.model_copy(update={"epochs": recipe.rounds * recipe.train.epochs})}
    )
    with TemporaryDirectory() as folder:
        pooled = simulate([together(present)], recipe, folder=f"{folder}/pooled").model
        federated = simulate(present, recipe, folder=f"{folder}/federated").model
        tuning = alone.model_copy(update={"train": recipe.train.model_copy(update=TUNING)})
        found = {
            "alone": (own(present, alone), own(apart, alone)),
            "pooled": (accuracy(present, pooled), accuracy(apart, pooled)),
            "federated": (accuracy(present, federated), accuracy(apart, federated)),
            "federated, then tuned": (own(present, tuning, federated), own(apart, tuning, federated)),
        }
        seen = {
            name: {n: m["accuracy"] for n, m in measure(together(apart), f"{folder}/{name}").items()} for name in INKS
        }
    return found, seen


def accuracy(writers: Sequence[Drawings], model: Path) -> float:
    """Of one model on the test drawings of these writers."""
    return measure_version(together(writers), model)["accuracy"]


def own(writers: Sequence[Drawings], recipe: Recipe, start: Path | None = None) -> float:
    """Of models that these writers train from their own drawings alone, each on its own test drawings."""
    begun = [Drawings(w.path, w.label, w.rows, start) for w in writers]
    return float(np.mean([simulate([w], recipe).final["accuracy"] for w in begun]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--label", choices=["alphabet", "character"], default="alphabet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--unseen", type=int, default=5, help="writers that take no part")
    given = parser.parse_args()
    path = find_drawings(given.data)
    changes = {} if given.rounds is None else {"rounds": given.rounds}
    tables: list[Found] = []
    drawn: list[dict[str, Curve]] = []
    for seed in range(given.seeds):
        writers = [*federation(path, given.label, seed).values()]
        found, seen = one_seed(writers, given.unseen, load_recipe(RECIPE, **changes, seed=seed))
        tables.append(found)
        drawn.append(seen)
    sys.stdout.write(f"| {given.label} | writers who took part | {given.unseen} others |\n|---|---|---|\n")
    for method in METHODS:
        of_seeds = np.array([table[method] for table in tables])
        cells = [f"{mean:.1%} ± {sd:.1%}" for mean, sd in zip(of_seeds.mean(0), of_seeds.std(0), strict=True)]
        sys.stdout.write(f"| {method} | {cells[0]} | {cells[1]} |\n")
    said = f"Accuracy by round on drawings of writers who took no part ({given.label})"
    series: list[Series] = []
    for name, ink in INKS.items():
        points = [Point(x=n, y=float(np.mean([d[name][n] for d in drawn]))) for n in drawn[0][name]]
        series.append(Series(name=name, points=points, ink=ink))
    given.picture.write_text(curves(said, {"": series}, x_label="round"))


if __name__ == "__main__":
    set_num_threads(1)
    main()
