"""Rounds until the model is right on a given part of the test images, over C, E, B and how the images are divided.

python examples/mcmahan/rounds_to.py [--data fashion_mnist.npz] [--network 2nn] [--target 0.8] [--clients 10]
    [--epochs 1] [--batch 10 600] [--split iid shards] [--lr 0.1] [--rounds 300] [--every 1]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from task import Images, everybody, federation, find_images
from torch import set_num_threads

from murmur.protocol.recipe import Recipe, load_recipe
from murmur.simulation import Round, simulate
from murmur.simulation.measuring import measure_version, rounds_to

RECIPE = Path(__file__).parent / "recipe.toml"


class Reached(Exception):
    """The target is reached: the simulation need not go on."""


def accuracies(clients: list[Images], whole: Images, recipe: Recipe, *, target: float, every: int) -> dict[int, float]:
    """Of the versions 0, every, 2 * every, … on all test images, until one reaches the target or rounds end."""
    found: dict[int, float] = {}
    with TemporaryDirectory() as folder:

        def look(done: Round) -> None:
            if done.n % every == 0:
                found[done.n] = measure_version(whole, Path(folder) / f"version-{done.n}.safetensors")["accuracy"]
                if found[done.n] >= target:
                    raise Reached

        with suppress(Reached):
            simulate(clients, recipe, secure="off", folder=folder, on_round=look)
        start = measure_version(whole, Path(folder) / "version-0.safetensors")["accuracy"]
    return {0: start} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--network", choices=["2nn", "cnn"], default="2nn")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--clients", type=int, nargs="+", default=[10], help="of 100, asked in a round: 100 C")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1], help="E")
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 600], help="B; 600 is all that a client has")
    parser.add_argument("--split", choices=["iid", "shards"], nargs="+", default=["iid", "shards"])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--every", type=int, default=1, help="rounds between two measurements")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path = find_images(given.data)
    whole = everybody(path, given.network)
    sys.stdout.write(f"{given.network}, to {given.target:.1%}\n| clients a round | E | B | split | rounds | best |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for size, epochs, batch, split in itertools.product(given.clients, given.epochs, given.batch, given.split):
        recipe = load_recipe(
            RECIPE,
            rounds=given.rounds,
            seed=given.seed,
            cohort__size=size,
            train={"epochs": epochs, "batch_size": batch, "lr": given.lr},
        )
        clients = federation(data=path, network=given.network, split=split, seed=given.seed)
        found = accuracies(clients, whole, recipe, target=given.target, every=given.every)
        crossed = rounds_to(found, given.target)
        said = f"more than {given.rounds}" if crossed is None else f"{crossed:.0f}"
        sys.stdout.write(f"| {size} | {epochs} | {batch} | {split} | {said} | {max(found.values()):.1%} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    set_num_threads(1)
    main()
