"""Local, pooled and federated accuracy over several splits and starts: prints the tables of README.md.

python examples/hospitals/measure.py --seeds 20
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import evaluate, load, local, pooled
from task import HOSPITALS, federation

from murmur.protocol.recipe import Recipe, load_recipe
from murmur.simulation import simulate

# S = seeds, K = hospitals; accuracies are of test rows


def one_seed(recipe: Recipe, seed: int, options: dict[str, Any], secure: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Accuracies for one split and start: (K,) per row of the table, (K, K) for local models everywhere."""
    makers = federation(seed=seed, **options)
    tasks = [makers[name]() for name in HOSPITALS]
    everywhere = np.array([[evaluate(there, local(task, recipe, seed)) for there in tasks] for task in tasks])
    together = pooled(tasks, recipe, seed)
    history = simulate(makers, recipe, seed=seed, secure=secure)
    federated = load(tasks[0], history.model)
    return {
        "local": everywhere.diagonal(),
        "pooled": np.array([evaluate(task, together) for task in tasks]),
        "federated": np.array([evaluate(task, federated) for task in tasks]),
        "everywhere": everywhere,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--scaling", choices=["agreed", "own"], default="agreed")
    parser.add_argument("--plain", action="store_true", help="without masks: the same to four decimals, and faster")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in strategy__mu=0.1")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    changes = {key: _value(value) for key, _, value in (s.partition("=") for s in asked.set)}
    recipe = load_recipe(Path(__file__).parent / "recipe.toml", **changes)
    options = {"hidden": asked.hidden, "scaling": asked.scaling}
    seeds = [one_seed(recipe, seed, options, not asked.plain) for seed in range(asked.seeds)]
    found = {name: np.stack([s[name] for s in seeds]) for name in seeds[0]}
    rows = [("accuracy, mean ± sd over seeds", *HOSPITALS, "mean over hospitals")]
    for name in ("local", "pooled", "federated"):
        table_SK = np.column_stack([found[name], found[name].mean(1)])
        cells = zip(table_SK.mean(0), table_SK.std(0), strict=True)
        rows.append((name, *(f"{mean:.3f} ± {sd:.3f}" for mean, sd in cells)))
    for k, name in enumerate(HOSPITALS):
        mean_K = found["everywhere"][:, k].mean(0)
        rows.append((f"{name}'s own model elsewhere", *(f"{m:.3f}" for m in mean_K), f"{mean_K.mean():.3f}"))
    gain_S = (found["federated"] - found["local"]).mean(1)
    error = gain_S.std(ddof=1) / len(gain_S) ** 0.5 if len(gain_S) > 1 else float("nan")
    sys.stdout.write("\n".join("| " + " | ".join(row) + " |" for row in rows))
    sys.stdout.write(
        f"\nfederated minus local, mean over hospitals: {gain_S.mean():+.4f} ± {error:.4f} (se over seeds)\n"
    )


def _value(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
