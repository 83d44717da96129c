"""Rounds to an accuracy over E and how the lines are divided, beside pooled training and counting: table and curves.

python examples/shakespeare/measure.py curves.svg [--data shakespeare.jsonl.gz] [--clients 0] [--part 0.1] [--rounds 40]
    [--every 2] [--epochs 1 5] [--split roles iid] [--batch 10] [--lr 2] [--target 0.4] [--hidden 128] [--layers 1]
    [--pooled]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from task import SYMBOLS, Lines, federation, find_plays, pieces_of, together
from torch import Tensor

from murmur.protocol.recipe import Recipe, load_recipe
from murmur.simulation import simulate
from murmur.simulation.measuring import measure, rounds_to
from murmur.web.curves import curves
from murmur.web.svg import Point, Series

RECIPE = Path(__file__).parent / "recipe.toml"
INKS = "abcd"
COUNTED = "always the most frequent character", "the most frequent after the last one"
Curve = dict[int, float]


def counted(train: Lines, test: Lines) -> tuple[float, float]:
    """Accuracy on the test pieces of always the most frequent character, and of the most frequent after the last."""
    (before, after), (given, wanted) = _characters(train, "train"), _characters(test, "test")
    pairs = torch.bincount(before * SYMBOLS + after, minlength=SYMBOLS * SYMBOLS).view(SYMBOLS, SYMBOLS)
    of_all, of_last = wanted == pairs.sum(0).argmax(), wanted == pairs.argmax(1)[given]
    return float(of_all.float().mean()), float(of_last.float().mean())


def _characters(lines: Lines, split: str) -> tuple[Tensor, Tensor]:
    """Each character of a split, and that which follows it."""
    inputs, targets = pieces_of(lines.path)[0].tensors
    return inputs[lines.rows[split]].flatten(), targets[lines.rows[split]].flatten()


def curve(clients: list[Lines], whole: Lines, recipe: Recipe, every: int) -> Curve:
    """Accuracy on all test pieces of every so many versions."""
    with TemporaryDirectory() as folder:
        simulate(clients, recipe, secure="off", folder=folder)
        found = measure(whole, folder, metrics=("accuracy",), every=every)
    return {n: m["accuracy"] for n, m in found.items()}


def all_curves(given: argparse.Namespace, path: str) -> Iterator[tuple[str, Curve]]:
    """By the names of the table; pooled training takes as many steps in a round as a cohort takes on the average."""
    names = "clients", "hidden", "layers", "seed"
    made: dict[str, Any] = {"data": path} | {name: getattr(given, name) for name in names}
    roles = federation(**made)
    train, whole = (together(roles, split) for split in ("train", "test"))
    size = max(1, round(given.part * len(roles)))
    changes = {"rounds": given.rounds, "seed": given.seed, "train__lr": given.lr, "train__batch_size": given.batch}
    for split, epochs in itertools.product(given.split, given.epochs):
        recipe = load_recipe(RECIPE, **changes, cohort__size=size, train__epochs=epochs)
        yield f"{split}, E = {epochs}", curve(federation(**made, split=split), whole, recipe, given.every)
    if given.pooled:
        passes = max(given.epochs) * size / len(roles)
        steps = round(passes * len(train.rows["train"]) / given.batch)
        recipe = load_recipe(RECIPE, **changes, cohort__size=1, train__steps=steps)
        yield f"pooled, {steps} steps a round", curve([train], whole, recipe, given.every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--clients", type=int, default=0, help="the roles that say most; 0: all")
    parser.add_argument("--part", type=float, default=0.1, help="C, of the roles in a round")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=2, help="rounds between two measurements")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5], help="E")
    parser.add_argument("--split", choices=["roles", "iid"], nargs="+", default=["roles", "iid"])
    parser.add_argument("--batch", type=int, default=10, help="B")
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--target", type=float, default=0.4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--pooled", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path = find_plays(given.data)
    roles = federation(given.clients, path)
    train, test = (together(roles, split) for split in ("train", "test"))
    said = f"{len(roles)} roles, {len(train.rows['train'])} pieces to train on, {len(test.rows['test'])} to measure on"
    sys.stdout.write(f"{said}\n| | rounds to {given.target:.0%} | accuracy after {given.rounds} |\n|---|---|---|\n")
    for name, accuracy in zip(COUNTED, counted(train, test), strict=True):
        sys.stdout.write(f"| {name} | – | {accuracy:.1%} |\n")
    series: list[Series] = []
    for ink, (name, found) in zip(itertools.cycle(INKS), all_curves(given, path), strict=False):
        crossed = rounds_to(found, given.target)
        reached = f"more than {given.rounds}" if crossed is None else f"{crossed:.0f}"
        sys.stdout.write(f"| {name} | {reached} | {found[max(found)]:.1%} |\n")
        sys.stdout.flush()
        series.append(Series(name=name, points=[Point(x=n, y=a) for n, a in found.items()], ink=ink))
        given.picture.write_text(curves("Accuracy on the next character, by round", {"": series}, x_label="round"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
