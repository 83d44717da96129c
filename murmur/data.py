"""`murmur data`: how a data set is divided among the clients of a simulation."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from murmur.coordinating import Json
from murmur.output import out, print_json, print_table, told

if TYPE_CHECKING:
    from murmur.simulation.partitioning import Partition

data = typer.Typer(help="Data for simulations.", no_args_is_help=True, suggest_commands=False)
SHOWN = 12  # clients in the table; the picture has them all


class Method(StrEnum):
    """How to divide; `murmur.simulation.partitioning` has a function of each name."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    SHARDS = "shards"
    QUANTITY = "quantity"
    FEATURE = "feature"
    GROUP = "group"


@data.callback()
def _group() -> None:
    """A group of its own though it has one command, so that the name of that stays."""


@data.command()
def partition(
    file: Annotated[Path, typer.Argument(help=".npz with arrays or .csv with a header")],
    column: Annotated[str, typer.Option(help="array or column: labels, features or groups, as the method needs")],
    method: Annotated[Method, typer.Option()] = Method.DIRICHLET,
    clients: Annotated[int, typer.Option(min=1)] = 10,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    alpha: Annotated[float, typer.Option(help="dirichlet: small gives each client few classes")] = 0.5,
    per_client: Annotated[int, typer.Option(help="shards: of sorted labels at each client")] = 2,
    sigma: Annotated[float, typer.Option(help="quantity: deviation of the logarithm of sizes")] = 1.0,
    mix: Annotated[float, typer.Option(help="feature: the part that is dealt out evenly")] = 0.0,
    smallest: Annotated[int, typer.Option(min=0, help="examples that every client has at least")] = 1,
    labels: Annotated[str, typer.Option(help="array or column whose values are shown; by default `column`")] = "",
    plot: Annotated[Path | None, typer.Option(help="write a picture here (.svg)")] = None,
    save: Annotated[Path | None, typer.Option(help="write each client's indices here (.npz)")] = None,
    json_: Json = False,
) -> None:
    """Divide a data set among clients and show who holds what; the same for the same seed."""
    import numpy as np

    from murmur.simulation.partition_picture import picture
    from murmur.simulation.partitioning import METHODS

    with told():
        values = _column(file, column)
        shown = _column(file, labels) if labels else values if method in ("dirichlet", "shards") else None
        given: dict[str, Any] = {
            "iid": {"clients": clients, "seed": seed},
            "dirichlet": {"clients": clients, "alpha": alpha, "seed": seed, "smallest": smallest},
            "shards": {"clients": clients, "per_client": per_client, "seed": seed},
            "quantity": {"clients": clients, "sigma": sigma, "seed": seed, "smallest": smallest},
            "feature": {"clients": clients, "mix": mix, "seed": seed},
            "group": {"smallest": smallest},
        }[method]
        about = len(values) if method in ("iid", "quantity") else values
        found = METHODS[method](about, **given)
        if plot:
            plot.write_text(picture(found, shown))
        if save:
            names = found.names or [str(k) for k in range(len(found))]
            arrays: dict[str, Any] = {name: part for name, part in zip(names, found.parts, strict=True)}
            np.savez(save, **arrays)
        facts = found.facts(shown)
    if json_:
        print_json({"described": found.described, **facts})
        return
    _print(found, shown, facts)


def _print(found: Partition, labels: Any, facts: dict[str, float]) -> None:
    out.print(found.described, highlight=False)
    counts = found.counts(labels) if labels is not None else None
    rows: list[list[str]] = []
    for k, size in list(enumerate(found.sizes.tolist()))[:SHOWN]:
        classes = " ".join(map(str, counts[k].tolist())) if counts is not None and counts.shape[1] <= 20 else ""
        rows.append([found.names[k] if found.names else str(k), str(size), classes])
    print_table("", ["client", "examples", "by class"], rows)
    if len(found) > SHOWN:
        out.print(f"and {len(found) - SHOWN} more clients", highlight=False)
    skew = f", classes lie {facts['skew']:.2f} from the whole's mix (0: the same, 1: apart)" if "skew" in facts else ""
    sizes = f"{facts['smallest']:.0f} to {facts['largest']:.0f} examples, median {facts['median']:.0f}"
    out.print(f"{sizes}{skew}", highlight=False)


def _column(file: Path, name: str) -> Any:
    """An array of the file, by name; raises OperatorError that says which there are."""
    import csv

    import numpy as np

    from murmur.protocol.errors import OperatorError

    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                there = list(arrays.files)
                if name in there:
                    return arrays[name]
        else:
            with file.open(newline="") as text:
                rows = csv.DictReader(text)
                there = list(rows.fieldnames or [])
                if name in there:
                    values = [row[name] or "" for row in rows]
                    try:
                        return np.array([float(v) for v in values])
                    except ValueError:
                        return np.array(values)
    except OSError as error:
        raise OperatorError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise OperatorError(f"{file} is neither an .npz of plain arrays nor a .csv: {error}") from None
    raise OperatorError(f"{file} has no {name!r}; there are {', '.join(there) or 'none'}")
