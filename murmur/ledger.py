"""`murmur client ledger`: what an organization's data sets have spent on local differential privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from murmur.clients.ledger import FILE, Charge, Ledger, spent
from murmur.clients.settings import load_settings
from murmur.output import out, print_json, print_table


def show_ledger(directory: Path, *, as_json: bool) -> None:
    """Print each data set's epsilon with all that it rests on; raises OperatorError for a folder that is none."""
    policy = load_settings(directory).policy
    charges = Ledger(directory / FILE).charges()
    datasets: dict[str, list[Charge]] = {}
    for charge in charges:
        datasets.setdefault(charge.dataset, []).append(charge)
    found: list[dict[str, Any]] = []
    for name, mine in sorted(datasets.items()):
        counted = [c for c in mine if c.state != "void"]
        found.append(
            {
                "dataset": name,
                "epsilon": spent(mine, policy.delta).to_json(),
                "budget": policy.epsilon or None,
                "trainings": len(counted),
                "reserved": sum(c.state == "reserved" for c in counted),
                "runs": sorted({c.run for c in counted}),
                "steps": sum(c.event.count for c in counted),
            }
        )
    if as_json:
        return print_json(found)
    if not found:
        out.print("No training with local differential privacy has been charged.")
        return
    rows = (
        (row["dataset"], _number(row["epsilon"]["value"]), row["budget"], row["trainings"], row["reserved"],
         row["steps"], len(row["runs"]))
        for row in found
    )  # fmt: skip
    columns = ("data set", "epsilon", "budget", "trainings", "of them reserved", "steps", "runs")
    print_table(f"Spent at delta {policy.delta:g}, per training example", columns, rows)
    said = found[0]["epsilon"]
    out.print(f"Accountant: {said['accountant']}. " + "; ".join(said["assumptions"]) + ".")


def _number(value: float | None) -> float | str:
    return "unbounded" if value is None else value
